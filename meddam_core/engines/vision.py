"""Views to visual rows, in batches: what the vision tower does while the language model is busy.

On a GPU the tower runs on a stream of its own, so that its kernels fill what decoding leaves idle; rows are handed over
with an event. Batches that do not fit in memory are halved; a request that does not fit alone fails alone.

Axes: M views, 8 channels, S pixels a side, T tokens a view, D hidden size of the language model.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from meddam_core.dam.model import Dam
from meddam_core.engines.admission import Prompt
from meddam_core.engines.base import EngineStats
from meddam_core.engines.faults import out_of_memory
from meddam_core.engines.generation import Generation
from meddam_core.records import Reason


@dataclass(slots=True)
class Pending:
    """A request on its way to the language model."""

    uid: int
    prompt: Prompt
    generation: Generation
    rows: Tensor | None = None
    """(N * T, D) once encoded."""
    encoded: torch.cuda.Event | None = None
    """Recorded on the vision stream after `rows` was launched."""


class VisionQueue:
    """Requests that wait for the vision tower, and requests whose rows are ready.

    Args:
        batch_size: views in one pass of the tower.
        stats: times and out-of-memory events are added here. On a GPU the time is the host's, without waiting.
    """

    def __init__(self, dam: Dam, batch_size: int, stats: EngineStats) -> None:
        self._dam = dam
        self._batch_size = batch_size
        self._stats = stats
        self._waiting: deque[Pending] = deque()
        self._ready: deque[Pending] = deque()
        self._stream: torch.cuda.Stream | None = None
        if dam.device.type == "cuda":
            self._stream = torch.cuda.Stream(dam.device)  # type: ignore[no-untyped-call]

    def __len__(self) -> int:
        return len(self._waiting) + len(self._ready)

    @property
    def num_ready(self) -> int:
        return len(self._ready)

    @property
    def overlaps(self) -> bool:
        """Whether encoding can go on beside the language model."""
        return self._stream is not None

    def put(self, pending: Pending) -> None:
        self._waiting.append(pending)

    def cancel(self, uid: int) -> None:
        for name in ("_waiting", "_ready"):
            setattr(self, name, deque(p for p in getattr(self, name) if p.uid != uid))

    def take(self) -> Pending:
        """The next request, with its rows safe to use on the current stream."""
        if not self._ready:
            self.encode_batch()
        pending = self._ready.popleft()
        if pending.encoded is not None and pending.rows is not None:
            torch.cuda.current_stream().wait_event(pending.encoded)
            pending.rows.record_stream(torch.cuda.current_stream())
        return pending

    def encode_batch(self) -> None:
        """Runs the tower over the next requests, as many as fill a batch."""
        batch: list[Pending] = []
        num_views = 0
        while self._waiting:
            views = len(self._waiting[0].generation.request.views_N8SS)
            if batch and num_views + views > self._batch_size:
                break
            num_views += views
            batch.append(self._waiting.popleft())
        started = time.perf_counter()
        if batch:
            self._encode(batch)
        self._stats.vision_s += time.perf_counter() - started
        self._ready.extend(batch)

    def _encode(self, batch: Sequence[Pending]) -> None:
        if self._try_encode(batch):
            return
        self._stats.num_out_of_memory += 1
        if self._dam.device.type == "cuda":
            torch.cuda.empty_cache()
        if len(batch) == 1:
            batch[0].generation.fail(Reason.OUT_OF_MEMORY, "the device has no memory left for a single region's views")
            return
        middle = len(batch) // 2
        self._batch_size = max(1, min(self._batch_size, middle))
        self._encode(batch[:middle])
        self._encode(batch[middle:])

    def _try_encode(self, batch: Sequence[Pending]) -> bool:
        try:
            with torch.inference_mode(), torch.cuda.stream(self._stream):
                self._launch(batch)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            return False
        return True

    def _launch(self, batch: Sequence[Pending]) -> None:
        views_M8SS = torch.from_numpy(np.concatenate([p.generation.request.views_N8SS for p in batch]))
        if self._stream is not None:
            views_M8SS = views_M8SS.pin_memory()
        tokens_MTD = self._dam.encode(views_M8SS)
        event = None
        if self._stream is not None:
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(self._stream)
        start = 0
        for pending in batch:
            end = start + len(pending.generation.request.views_N8SS)
            pending.rows = tokens_MTD[start:end].flatten(0, 1)
            pending.encoded = event
            start = end
