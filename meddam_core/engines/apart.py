"""An engine in a process of its own, for whoever has other work to do in this one: HTTP, pictures, JSON.

Python runs one thread of a process at a time, so that an engine slows whatever shares its interpreter, and is slowed
by it. Here both have their own; requests and results go over a socket.

    loop = ApartLoop("torch", folder, device="cuda", dtype="bfloat16")     # as EngineLoop(make_engine(...))
    future = loop.submit(request, on_text=print)

Invariants, beside those of EngineLoop:
- where either process ends, however it ends, the other notices: here every future ends with EngineDied, there the
  process ends and its memory is free;
- a model that cannot be loaded is the same ValueError as in this process.
"""

from __future__ import annotations

import os
import queue
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

from meddam_core.engines.base import EngineDied, Request, Result
from meddam_core.engines.loop import EngineLoop

_END_S = 10.0


@dataclass(slots=True)
class _Caller:
    on_text: Callable[[str], None] | None
    future: Future[Result] = field(default_factory=Future)


class ApartLoop:
    """A Loop whose engine is elsewhere; the arguments are make_engine's, device "auto" and dtype "auto" included.

    Raises ValueError as make_engine does, and EngineDied where the process ends while it loads the model.
    """

    def __init__(
        self, engine: str, folder: str, *, device: str = "cpu", dtype: str = "float32", slots: int | None = None,
        num_threads: int | None = None,
    ) -> None:  # fmt: skip
        self._waiting: dict[str, _Caller] = {}
        self._failure: BaseException | None = None
        self._door = threading.Lock()
        """Held where requests enter and where the connection ends, so that none enters after that."""
        self._outbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._process, self._connection = _start()
        asked = {"engine": engine, "folder": folder, "device": device, "dtype": dtype, "slots": slots}
        try:
            self._connection.send({**asked, "num_threads": num_threads})
            kind, told = self._connection.recv()
        except (EOFError, OSError):
            raise EngineDied(f"the engine's process ended while it loaded the model ({self._exit_code()})") from None
        if kind == "refused":
            self._process.wait()
            raise ValueError(told)
        self.max_batch: int | None = told
        for name, work in (("engine-out", self._send), ("engine-in", self._receive)):
            threading.Thread(target=work, name=name, daemon=True).start()

    @property
    def pid(self) -> int:
        """The engine's process."""
        return self._process.pid

    @property
    def failure(self) -> BaseException | None:
        """What ended the loop; None while it works."""
        return self._failure

    @property
    def num_unfinished(self) -> int:
        """Requests that were taken in and have not ended."""
        return len(self._waiting)

    def generate(self, requests: Sequence[Request]) -> list[Result]:
        """As EngineLoop.generate."""
        futures = [self.submit(request) for request in requests]
        return [f.result() for f in futures]

    def submit(self, request: Request, on_text: Callable[[str], None] | None = None) -> Future[Result]:
        """As EngineLoop.submit."""
        caller = _Caller(on_text)
        with self._door:
            if self._failure is not None:
                raise self._failure
            if request.request_id in self._waiting:
                raise ValueError(f"a request with the id {request.request_id} is in flight already")
            self._waiting[request.request_id] = caller
            self._outbox.put((request, on_text is not None))
        return caller.future

    def cancel(self, request_id: str) -> None:
        """As EngineLoop.cancel."""
        self._outbox.put(request_id)

    def close(self) -> None:
        """Ends the process; what is still in flight ends with EngineDied."""
        self._outbox.put(None)
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _send(self) -> None:
        try:
            while (message := self._outbox.get()) is not None:
                self._connection.send(message)
            self._connection.send(None)
        except OSError:
            return  # the other side is gone, as `_receive` sees too

    def _receive(self) -> None:
        try:
            while True:
                name, piece = self._connection.recv()
                if isinstance(piece, str):
                    caller = self._waiting[name]
                    assert caller.on_text is not None
                    caller.on_text(piece)
                else:
                    self._waiting.pop(name).future.set_result(piece)
        except (EOFError, OSError):
            self._stop(EngineDied(f"the engine's process ended ({self._exit_code()})"))

    def _stop(self, error: EngineDied) -> None:
        with self._door:
            self._failure = error
            waiting = list(self._waiting.values())
            self._waiting.clear()
        self._outbox.put(None)
        for caller in waiting:
            caller.future.set_exception(error)

    def _exit_code(self) -> str:
        try:
            return f"exit code {self._process.wait(_END_S)}"
        except subprocess.TimeoutExpired:
            return "still running"


def _start() -> tuple[subprocess.Popen[bytes], Connection]:
    ours, theirs = socket.socketpair()
    path = os.pathsep.join(part for part in sys.path if part)  # also what was added at run time
    process = subprocess.Popen(
        [sys.executable, "-m", "meddam_core.engines.apart", str(theirs.fileno())], stdin=subprocess.DEVNULL,
        pass_fds=[theirs.fileno()], env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    theirs.close()
    return process, Connection(ours.detach())


# -- the other side ---------------------------------------------------------------------------------------------------


def main(descriptor: int) -> None:
    """The engine's process: loads the model it is told, then serves until the connection ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is for the process that started this one
    connection = Connection(descriptor)
    try:
        loop = _load(connection.recv())
    except ValueError as error:
        connection.send(("refused", str(error)))
        return
    connection.send(("ready", loop.max_batch))
    try:
        while (message := connection.recv()) is not None:
            if isinstance(message, str):
                loop.cancel(message)
            else:
                _submit(loop, connection, *message)
    except (EOFError, OSError):
        os._exit(0)  # nobody is there to be told anything
    loop.close()


def _load(asked: dict[str, Any]) -> EngineLoop:
    from meddam_core.engines import make_engine

    device, num_threads = asked["device"], asked["num_threads"]
    if device == "auto" or num_threads is not None:
        import torch

        device = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        if num_threads is not None and device == "cpu":
            torch.set_num_threads(num_threads)
    dtype = asked["dtype"] if asked["dtype"] != "auto" else "bfloat16" if device == "cuda" else "float32"
    engine, _ = make_engine(asked["engine"], asked["folder"], device=device, dtype=dtype, slots=asked["slots"])
    return EngineLoop(engine)


def _submit(loop: EngineLoop, connection: Connection, request: Request, streams: bool) -> None:
    name = request.request_id
    on_text = partial(_tell, connection, name) if streams else None
    loop.submit(request, on_text).add_done_callback(lambda future: _tell_end(connection, name, future))


def _tell_end(connection: Connection, name: str, future: Future[Result]) -> None:
    error = future.exception()
    if error is not None:  # the engine is broken: what ended it goes to the log, and this process with it
        print(f"engine: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)
    _tell(connection, name, future.result())


def _tell(connection: Connection, name: str, piece: str | Result) -> None:
    """Called from the loop's thread only."""
    try:
        connection.send((name, piece))
    except OSError:
        os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]))
