"""One thread that drives an engine for many callers: requests join while others decode.

The batch job's actors and the online server share an engine through it. Whole blocks of requests overlap, so that the
stragglers of one block do not leave the device waiting for the next.

    loop = EngineLoop(engine)
    results = loop.generate(requests)      # blocks; call from as many threads as you like
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future

from meddam_core.engines.base import Engine, Request, Result
from meddam_core.records import Reason


class EngineLoop:
    """Drives `engine` from a daemon thread until `close`.

    `busy_s` is the time in which the engine had requests to work on, for the speed line of a run.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.busy_s = 0.0
        self._inbox: queue.SimpleQueue[tuple[Request, Future[Result]] | None] = queue.SimpleQueue()
        self._waiting: dict[str, Future[Result]] = {}
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def generate(self, requests: Sequence[Request]) -> list[Result]:
        """All requests to the end; results in the order of the requests. Raises what broke the engine, if it broke."""
        if self._failure is not None:
            raise self._failure
        futures: list[Future[Result]] = [Future() for _ in requests]
        for item in zip(requests, futures, strict=True):
            self._inbox.put(item)
        return [f.result() for f in futures]

    def close(self) -> None:
        """Stops the thread after the requests in flight and closes the engine."""
        self._inbox.put(None)
        self._thread.join()
        self.engine.close()

    def _run(self) -> None:
        try:
            while self._admit():
                started = time.perf_counter()
                for result in self.engine.step():
                    self._waiting.pop(result.request_id).set_result(result)
                self.busy_s += time.perf_counter() - started
        except BaseException as error:  # noqa: BLE001 - the callers raise it; otherwise they would wait for ever
            self._failure = error
            for future in self._waiting.values():
                future.set_exception(error)
            while not self._inbox.empty():
                item = self._inbox.get()
                if item is not None:
                    item[1].set_exception(error)

    def _admit(self) -> bool:
        """Takes in what has arrived; sleeps while there is nothing at all. False when it is time to stop."""
        arrived: list[tuple[Request, Future[Result]]] = []
        while not self._inbox.empty() or not (self._waiting or arrived):
            item = self._inbox.get()
            if item is None:
                return False
            arrived.append(item)
        for request, future in arrived:
            if request.request_id in self._waiting:
                future.set_result(_refused(request, "two requests in flight have the same id"))
            else:
                self._waiting[request.request_id] = future
                self.engine.submit([request])
        return True


def _refused(request: Request, detail: str) -> Result:
    return Result(
        request_id=request.request_id, text="", token_ids=(), mean_logprob=None, finish_reason="error",
        reason=Reason.ENGINE_ERROR, detail=detail,
    )  # fmt: skip
