"""One thread that drives an engine for many callers: requests join while others decode.

The batch job's actors and the online server share an engine through it. Whole blocks of requests overlap, so that the
stragglers of one block do not leave the device waiting for the next.

    loop = EngineLoop(engine)
    results = loop.generate(requests)      # blocks; call from as many threads as you like
    future = loop.submit(request, on_text=print)       # a stream: its text piece by piece, then the result
    loop.cancel(request.request_id)        # the future's result says "cancelled"

Invariants:
- the engine is touched by the loop's own thread only;
- every future ends: with a result, or with what broke the engine;
- the pieces of a stream joined are the result's text.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Protocol

from meddam_core.engines.base import Engine, EngineDied, ReportsText, Request, Result
from meddam_core.records import FinishReason, Reason

STREAM_INTERVAL_S = 0.02
"""Least time between two pieces of one stream: reading text out of an engine costs more than a token."""


@dataclass(slots=True)
class _Caller:
    """A request with who waits for it."""

    request: Request
    on_text: Callable[[str], None] | None = None
    future: Future[Result] = field(default_factory=Future)
    num_sent: int = 0
    """Characters of the text that were handed to `on_text`."""
    looked_s: float = 0.0


class Loop(Protocol):
    """What callers use: EngineLoop, or ApartLoop, whose engine has a process of its own (apart.py)."""

    @property
    def failure(self) -> BaseException | None: ...
    @property
    def num_unfinished(self) -> int: ...
    @property
    def max_batch(self) -> int | None:
        """Captions decoded at once; None where the engine does not say."""
        ...

    def generate(self, requests: Sequence[Request]) -> list[Result]: ...
    def submit(self, request: Request, on_text: Callable[[str], None] | None = None) -> Future[Result]: ...
    def cancel(self, request_id: str) -> None: ...
    def close(self) -> None: ...


class EngineLoop:
    """Drives `engine` from a daemon thread until `close`.

    `busy_s` is the time in which the engine had requests to work on, for the speed line of a run.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.busy_s = 0.0
        self._inbox: queue.SimpleQueue[_Caller | str | None] = queue.SimpleQueue()
        self._waiting: dict[str, _Caller] = {}
        self._failure: BaseException | None = None
        self._door = threading.Lock()
        """Held where requests enter and where the loop ends, so that none enters after that."""
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def failure(self) -> BaseException | None:
        """What ended the loop; None while it works."""
        return self._failure

    @property
    def num_unfinished(self) -> int:
        """Requests that were taken in and have not ended."""
        return len(self._waiting) + self._inbox.qsize()

    @property
    def max_batch(self) -> int | None:
        """Captions that the engine decodes at once; None where it does not say."""
        return getattr(self.engine, "max_batch", None)

    def generate(self, requests: Sequence[Request]) -> list[Result]:
        """All requests to the end; results in the order of the requests. Raises what broke the engine, if it broke."""
        futures = [self.submit(request) for request in requests]
        return [f.result() for f in futures]

    def submit(self, request: Request, on_text: Callable[[str], None] | None = None) -> Future[Result]:
        """Queues a request. Raises what broke the engine, if it broke.

        `on_text` is called from the loop's thread with each piece of text; it must be quick and must not raise. The
        last piece comes before the future's result. Engines that do not report text give it in one piece.
        """
        caller = _Caller(request, on_text)
        with self._door:
            if self._failure is not None:
                raise self._failure
            self._inbox.put(caller)
        return caller.future

    def cancel(self, request_id: str) -> None:
        """Gives a request up; its future gets a result whose finish reason is "cancelled". Unknown ids are ignored."""
        self._inbox.put(request_id)

    def close(self) -> None:
        """Stops the thread and closes the engine; what is still in flight ends with EngineDied."""
        self._inbox.put(None)
        self._thread.join()
        self.engine.close()

    def _run(self) -> None:
        try:
            while self._admit():
                started = time.perf_counter()
                for result in self.engine.step():
                    self._end(result)
                self._send_texts()
                self.busy_s += time.perf_counter() - started
        except BaseException as error:  # noqa: BLE001 - the callers raise it; otherwise they would wait for ever
            self._stop(error)
        else:
            self._stop(EngineDied("the engine was closed"))

    def _stop(self, error: BaseException) -> None:
        with self._door:
            self._failure = error
            while not self._inbox.empty():
                item = self._inbox.get()
                if isinstance(item, _Caller):
                    item.future.set_exception(error)
        for caller in self._waiting.values():
            caller.future.set_exception(error)
        self._waiting.clear()

    def _admit(self) -> bool:
        """Takes in what has arrived; sleeps while there is nothing at all. False when it is time to stop."""
        while not self._inbox.empty() or not self._waiting:
            item = self._inbox.get()
            if item is None:
                return False
            if isinstance(item, str):
                self._give_up(item)
            elif item.request.request_id in self._waiting:
                detail = "two requests in flight have the same id"
                item.future.set_result(_unserved(item.request.request_id, "error", Reason.ENGINE_ERROR, detail))
            else:
                self._waiting[item.request.request_id] = item
                self.engine.submit([item.request])
        return True

    def _give_up(self, request_id: str) -> None:
        caller = self._waiting.pop(request_id, None)
        if caller is not None:
            self.engine.cancel(request_id)
            caller.future.set_result(_unserved(request_id, "cancelled"))

    def _end(self, result: Result) -> None:
        caller = self._waiting.pop(result.request_id)
        rest = result.text[caller.num_sent :]
        if caller.on_text is not None and rest:
            caller.on_text(rest)
        caller.future.set_result(result)

    def _send_texts(self) -> None:
        """Hands streams what is new in their texts."""
        engine = self.engine
        if not isinstance(engine, ReportsText):
            return
        now = time.perf_counter()
        for caller in self._waiting.values():
            if caller.on_text is None or now - caller.looked_s < STREAM_INTERVAL_S:
                continue
            piece = engine.text_so_far(caller.request.request_id)[caller.num_sent :]
            if piece:
                caller.looked_s = now
                caller.num_sent += len(piece)
                caller.on_text(piece)


def _unserved(
    request_id: str, finish_reason: FinishReason, reason: Reason | None = None, detail: str | None = None
) -> Result:
    return Result(
        request_id=request_id, text="", token_ids=(), mean_logprob=None, finish_reason=finish_reason, reason=reason,
        detail=detail,
    )  # fmt: skip
