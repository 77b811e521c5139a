"""The engine in plain torch: the default on a CPU, the fallback on a GPU, and what other engines are compared with.

    engine = TorchEngine(load_dam("checkpoints/DAM-3B"))
    results = engine.generate(requests)

Requests wait for the vision tower, then for a slot; up to `max_batch` decode at once, and slots are refilled as
captions end. Prompts are prefilled together with others of about their length.

Invariants:
- float32 on the CPU: a request's tokens do not depend on the others, on `max_batch`, or on the order of arrival.
- A request that cannot be served gets a Result that says why; running out of memory makes the batch smaller, not fail.
"""

from __future__ import annotations

import os
import time
from collections import defaultdict, deque
from collections.abc import Collection
from pathlib import Path

import torch

from meddam_core.dam.model import Dam
from meddam_core.engines.decoder import LENGTH_STEP, Decoder, round_up
from meddam_core.engines.faults import out_of_memory
from meddam_core.engines.local_engine import LocalEngine
from meddam_core.engines.sampling import choose_tokens
from meddam_core.engines.vision import Pending
from meddam_core.records import Reason

MAX_DEFAULT_BATCH = 128
_TYPICAL_LENGTH = 512
_CACHE_SHARE = 0.25
"""Of the memory that is free when the engine starts, what the default batch may fill with keys and values."""


class TorchEngine(LocalEngine):
    """An Engine; see meddam_core.engines.base.

    Args:
        dam: its device and dtype are the engine's. Its weights stay its own and usable.
        max_batch: captions decoded at once; by default as many as fit a quarter of the free memory, at most 128.
        vision_batch: views in one pass of the vision tower.
        prefill_tokens: positions in one prefill.
        eos_ids: ids that end a caption, instead of the checkpoint's; () decodes every caption to its limit.
    """

    name = "torch"
    kernels = "torch"

    def __init__(
        self, dam: Dam, *, max_batch: int | None = None, vision_batch: int | None = None,
        prefill_tokens: int | None = None, eos_ids: Collection[int] | None = None,
    ) -> None:  # fmt: skip
        if max_batch is not None and max_batch < 1:
            raise ValueError(f"max_batch is {max_batch}; it must be at least 1")
        on_gpu = dam.device.type == "cuda"
        super().__init__(dam, vision_batch=vision_batch or (64 if on_gpu else 16), eos_ids=eos_ids)
        self._decoder = Decoder(dam.llm)
        self._prefill_tokens = prefill_tokens or (16384 if on_gpu else 2048)
        self.max_batch = max_batch or _default_batch(self._decoder)
        self._ready: deque[Pending] = deque()  # encoded, and put back for want of memory
        self._active: list[Pending] = []  # by slot

    def _drop(self, uid: int) -> None:
        self._ready = deque(p for p in self._ready if p.uid != uid)
        for slot, pending in enumerate(self._active):
            if pending.uid == uid:
                self._leave(slot)
                return

    def close(self) -> None:
        self._closed = True
        for name in ("_decoder", "_vision", "_active", "_ready", "_generations"):
            if hasattr(self, name):
                delattr(self, name)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _work(self) -> None:
        """Refill the slots if that is worth a prefill, then one token for every active row."""
        waiting, free = len(self._vision) + len(self._ready), self.max_batch - len(self._active)
        # One prefill for several free slots costs less than one for each; a lone request never waits for others.
        if waiting and free >= min(waiting, max(1, self.max_batch // 8)):
            self._admit(min(waiting, free))
        if self._active:
            started = time.perf_counter()
            self._decode()
            self.stats.decode_s += time.perf_counter() - started

    def _admit(self, num: int) -> None:
        """Encode up to `num` waiting requests and prefill them, those of like length together."""
        groups: dict[int, list[Pending]] = defaultdict(list)
        for _ in range(num):
            pending = self._ready.popleft() if self._ready else self._vision.take()
            if pending.generation.error is not None:
                self._finish(pending.uid)
            else:
                groups[round_up(_length(pending), LENGTH_STEP)].append(pending)
        started = time.perf_counter()
        for padded, group in sorted(groups.items()):
            size = max(1, self._prefill_tokens // padded)
            for first in range(0, len(group), size):
                self._prefill(group[first : first + size])
        self.stats.prefill_s += time.perf_counter() - started

    def _prefill(self, group: list[Pending]) -> None:
        first_slot = len(self._active)
        try:
            self._reserve(group)
            logits = self._decoder.prefill(
                [[*p.prompt.token_ids, *p.generation.token_ids] for p in group],
                [p.prompt.visual_positions for p in group],
                [p.rows for p in group if p.rows is not None],
                first_slot,
            )
        except (RuntimeError, MemoryError) as error:
            self._note_out_of_memory(error)
            self._prefill_less(group)
            return
        self._active += group
        self._take(logits, first_slot)

    def _prefill_less(self, group: list[Pending]) -> None:
        """After running out of memory: halves; a single request waits for others to end, or fails."""
        if len(group) > 1:
            middle = len(group) // 2
            self._prefill(group[:middle])
            self._prefill(group[middle:])
        elif self._active:
            self.max_batch = len(self._active)
            self._ready.append(group[0])
        else:
            self._fail(group[0])

    def _reserve(self, group: list[Pending]) -> None:
        length = max(len(p.prompt.token_ids) + p.generation.limit for p in group)
        needed = len(self._active) + len(group)
        if needed > self._decoder.num_slots:  # grow by doubling, as every growth copies the cache
            needed = max(needed, min(2 * self._decoder.num_slots, self.max_batch))
        self._decoder.reserve(needed, length)

    def _decode(self) -> None:
        try:
            logits = self._decoder.step([p.generation.token_ids[-1] for p in self._active])
        except (RuntimeError, MemoryError) as error:
            self._note_out_of_memory(error)
            self._decode_less()
            return
        self._take(logits, 0)

    def _decode_less(self) -> None:
        """After running out of memory: half of the rows go back to waiting, with what they have; a single one fails."""
        if len(self._active) == 1:
            lost = self._active[0]
            self._leave(0)
            self._fail(lost)
            return
        self.max_batch = max(1, len(self._active) // 2)
        while len(self._active) > self.max_batch:
            self._ready.appendleft(self._active[-1])
            self._leave(len(self._active) - 1)

    def _take(self, logits: torch.Tensor, first_slot: int) -> None:
        """Choose a token for every row from `first_slot` on; the captions that end leave their slots."""
        rows = self._active[first_slot:]
        samplings = [p.generation.request.sampling for p in rows]
        choice = choose_tokens(logits, samplings, [p.generation.num_chosen for p in rows])
        ended = [
            slot
            for slot, (pending, token, logprob) in enumerate(
                zip(rows, choice.token_ids, choice.logprobs, strict=True), start=first_slot
            )
            if pending.generation.push(token, logprob)
        ]
        for slot in reversed(ended):
            pending = self._active[slot]
            self._leave(slot)
            self._finish(pending.uid)

    def _leave(self, slot: int) -> None:
        """Empty a slot; other rows move up."""
        for source, target in self._decoder.remove(slot, len(self._active)):
            self._active[target] = self._active[source]
        self._active.pop()

    def _fail(self, pending: Pending) -> None:
        pending.generation.fail(Reason.OUT_OF_MEMORY, "the device has no memory left for a single caption")
        self._finish(pending.uid)

    def _note_out_of_memory(self, error: RuntimeError | MemoryError) -> None:
        """Count it and free what can be freed; any other error goes on up."""
        if not out_of_memory(error):
            raise error
        self.stats.num_out_of_memory += 1
        if self._decoder.device.type == "cuda":
            torch.cuda.empty_cache()


def _length(pending: Pending) -> int:
    """Positions to prefill: the prompt, and what was generated before the row was put back."""
    return len(pending.prompt.token_ids) + len(pending.generation.token_ids)


def _default_batch(decoder: Decoder) -> int:
    if decoder.device.type == "cuda":
        free_bytes = torch.cuda.mem_get_info(decoder.device)[0]
    else:
        free_bytes = _available_bytes()
    fits = int(_CACHE_SHARE * free_bytes) // (decoder.bytes_per_position * _TYPICAL_LENGTH)
    return max(1, min(MAX_DEFAULT_BATCH, fits))


def _available_bytes() -> int:
    """Memory of the host that can be had without swapping; pages that only cache files count as free."""
    info = Path("/proc/meminfo")
    if info.is_file():
        return int(info.read_text().partition("MemAvailable:")[2].split()[0]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
