"""An engine in a process of its own: the same captions, and an end for everybody when either process dies."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from meddam_core.dam.checkpoint import load_dam
from meddam_core.engines.apart import ApartLoop
from meddam_core.engines.base import EngineDied, Request, Sampling
from meddam_core.engines.torch_engine import TorchEngine

MODEL = "tests/data/oracle/dam_tiny/checkpoint"
WAITS = "benchmarks.waiting_engine:WaitingEngine"


def _request(number: int, max_new_tokens: int = 24) -> Request:
    views = np.random.default_rng(number).integers(0, 256, (1, 8, 112, 112), np.uint8)
    sampling = Sampling(max_new_tokens=max_new_tokens)
    return Request(request_id=f"r{number}", views_N8SS=views, query="<image>\nWhat is it?", sampling=sampling)


def test_the_same_captions_streams_and_cancels() -> None:
    loop = ApartLoop("torch", MODEL, device="cpu", num_threads=1, slots=4)
    assert loop.max_batch == 4
    pieces: dict[int, list[str]] = {n: [] for n in range(3)}
    futures = [loop.submit(_request(n), on_text=pieces[n].append) for n in pieces]
    results = [f.result(60) for f in futures]
    assert ["".join(p) for p in pieces.values()] == [r.text for r in results]
    assert results == TorchEngine(load_dam(MODEL)).generate([_request(n) for n in pieces])
    given_up = loop.submit(_request(7, 900))
    loop.cancel("r7")
    assert given_up.result(60).finish_reason == "cancelled"
    assert loop.num_unfinished == 0
    held = loop.submit(_request(8, 900))
    loop.close()
    with pytest.raises(EngineDied):
        held.result(60)


def test_when_the_engines_process_is_killed_nothing_waits_for_ever() -> None:
    loop = ApartLoop(WAITS, MODEL)
    held = [loop.submit(_request(n)) for n in range(200)]
    os.kill(loop.pid, signal.SIGKILL)
    ends = [future.exception(60) for future in held]
    assert isinstance(ends[-1], EngineDied) and "-9" in str(ends[-1])
    assert all(end is None or isinstance(end, EngineDied) for end in ends)
    assert isinstance(loop.failure, EngineDied)
    with pytest.raises(EngineDied):
        loop.submit(_request(201))


def test_when_its_owner_is_killed_the_engines_process_ends() -> None:
    code = f"from meddam_core.engines.apart import ApartLoop; print(ApartLoop({WAITS!r}, '').pid, flush=True); input()"
    owner = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert owner.stdout is not None
    engine = int(owner.stdout.readline())
    watched = os.pidfd_open(engine)
    owner.kill()
    owner.wait()
    assert _ends_within(watched, 60), "the engine outlives its owner"
    os.close(watched)


def _ends_within(descriptor: int, seconds: float) -> bool:
    return bool(select.select([descriptor], [], [], seconds)[0])


def test_a_model_that_cannot_be_loaded_is_a_value_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no engine class"):
        ApartLoop("no.such:Engine", str(tmp_path))
