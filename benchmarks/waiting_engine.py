"""A captioner that only waits, as a GPU does while its host is free: 8 regions in 40 ms, no CPU used.

    meddam caption SHARDS --out RUN --model DIR --engine benchmarks.waiting_engine:WaitingEngine

Put behind the real pipeline it shows what the pipeline itself costs (benchmarks/pipeline.py).
"""

from __future__ import annotations

import time
import zlib
from collections import deque
from collections.abc import Iterator, Sequence

from meddam_core.engines.base import Delta, EngineStats, Request, Result

REGIONS_PER_STEP = 8
STEP_S = 0.040


class WaitingEngine:
    """Captions name the checksum of their input, so that a mixed-up row would be seen."""

    name = "waiting"
    kernels = "sleep"
    step_s = STEP_S

    def __init__(self, folder: str, *, device: str, dtype: str, slots: int | None = None) -> None:
        self.stats = EngineStats()
        self._queue: deque[Request] = deque()

    @property
    def num_unfinished(self) -> int:
        return len(self._queue)

    def submit(self, requests: Sequence[Request]) -> None:
        self._queue.extend(requests)

    def step(self) -> list[Result]:
        batch = [self._queue.popleft() for _ in range(min(REGIONS_PER_STEP, len(self._queue)))]
        time.sleep(self.step_s * len(batch) / REGIONS_PER_STEP)
        self.stats.num_requests += len(batch)
        return [_result(r) for r in batch]

    def generate(self, requests: Sequence[Request]) -> list[Result]:
        self.submit(requests)
        done = [r for _ in iter(lambda: bool(self._queue), False) for r in self.step()]
        by_id = {r.request_id: r for r in done}
        return [by_id[r.request_id] for r in requests]

    def stream(self, request: Request) -> Iterator[Delta]:
        (result,) = self.generate([request])
        yield Delta(text=result.text, result=result)

    def cancel(self, request_id: str) -> None:
        self._queue = deque(r for r in self._queue if r.request_id != request_id)

    def close(self) -> None:
        self._queue.clear()


class Waiting80(WaitingEngine):
    """8 regions in 80 ms."""

    step_s = 0.080


class Waiting160(WaitingEngine):
    """8 regions in 160 ms."""

    step_s = 0.160


ENGINES: dict[int, type[WaitingEngine]] = {40: WaitingEngine, 80: Waiting80, 160: Waiting160}
"""By milliseconds a step."""


def path_of(step_ms: int) -> str:
    """What `--engine` is given for the captioner with such a step. Raises KeyError where there is none."""
    return f"{__name__}:{ENGINES[step_ms].__name__}"


class SlowWaitingEngine(WaitingEngine):
    """8 regions in 400 ms: a larger model."""

    step_s = 10 * STEP_S


def _result(request: Request) -> Result:
    text = f"region {zlib.crc32(request.views_N8SS[:, :, ::16, ::16].tobytes()):08x}"
    return Result(request_id=request.request_id, text=text, token_ids=(0,) * 8, mean_logprob=-1.0, finish_reason="stop")
