"""The thread between callers and an engine: streams, cancels, and an end for every future."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from meddam_core.dam.checkpoint import load_dam
from meddam_core.engines.base import EngineDied, Request, Result, Sampling
from meddam_core.engines.loop import EngineLoop
from meddam_core.engines.torch_engine import TorchEngine

MODEL = "tests/data/oracle/dam_tiny/checkpoint"


def _request(number: int, max_new_tokens: int = 24) -> Request:
    views = np.random.default_rng(number).integers(0, 256, (1, 8, 112, 112), np.uint8)
    sampling = Sampling(max_new_tokens=max_new_tokens)
    return Request(request_id=f"r{number}", views_N8SS=views, query="<image>\nWhat is it?", sampling=sampling)


@pytest.fixture(scope="module")
def engine() -> TorchEngine:
    return TorchEngine(load_dam(MODEL), max_batch=4, eos_ids=())


@pytest.fixture
def loop(engine: TorchEngine) -> Iterator[EngineLoop]:
    yield (made := EngineLoop(engine))
    made._inbox.put(None)  # ends the thread and leaves the engine, which the module shares, open
    made._thread.join()


def test_the_pieces_of_streams_are_the_texts_of_their_results(loop: EngineLoop) -> None:
    pieces: dict[int, list[str]] = {n: [] for n in range(6)}
    futures = [loop.submit(_request(n), on_text=pieces[n].append) for n in pieces]
    texts = [f.result(60).text for f in futures]
    assert ["".join(p) for p in pieces.values()] == texts
    assert max(len(p) for p in pieces.values()) > 1, "nothing was streamed"
    assert texts == [r.text for r in loop.generate([_request(n) for n in pieces])], "a stream is no other caption"


def test_a_cancelled_request_ends_and_makes_room(loop: EngineLoop) -> None:
    begun = threading.Event()
    future = loop.submit(_request(0, 900), on_text=lambda _: begun.set())
    assert begun.wait(60)
    other = loop.submit(_request(1))
    loop.cancel("r0")
    loop.cancel("unknown")
    assert future.result(60).finish_reason == "cancelled"
    assert other.result(60).finish_reason == "length"
    assert loop.num_unfinished == 0
    assert loop.generate([_request(0)])[0].finish_reason == "length", "its id is free again"


class _Breaks:
    """An engine that breaks in a step."""

    name = kernels = "broken"

    def submit(self, requests: list[Request]) -> None:
        pass

    def step(self) -> list[Result]:
        raise EngineDied("the device is gone")


def test_what_breaks_the_engine_reaches_every_caller() -> None:
    loop = EngineLoop(_Breaks())  # type: ignore[arg-type]
    with ThreadPoolExecutor(8) as pool:
        ends = [pool.submit(loop.generate, [_request(n)]) for n in range(8)]
        assert all(isinstance(end.exception(60), EngineDied) for end in ends)
    assert isinstance(loop.failure, EngineDied)
    with pytest.raises(EngineDied):
        loop.submit(_request(9))


def test_after_the_end_nothing_waits_for_ever(engine: TorchEngine) -> None:
    loop = EngineLoop(engine)
    future = loop.submit(_request(0, 900))
    loop._inbox.put(None)
    with pytest.raises(EngineDied):
        future.result(60)
    with pytest.raises(EngineDied):
        loop.generate([_request(1)])
    engine.cancel("r0")
