"""The Engine protocol over DeepSpeed-MII: vision in batched torch, the language model in FastGen.

    engine = MiiEngine(load_dam("checkpoints/DAM-3B", device="cuda", dtype=torch.bfloat16))
    results = engine.generate(requests)

Invariants:
- A request's tokens do not depend on the others (float32), on where its prompt was cut, or on a preemption.
- Visual rows live until their request is released; at the end all cache blocks are free.
- The engine takes the language model's weights out of the Dam it is given, unless it is told to keep them there.
"""

from __future__ import annotations

import gc
from collections.abc import Collection

import torch

from meddam_core.dam.model import Dam
from meddam_core.engines.admission import Prompt
from meddam_core.engines.local_engine import LocalEngine
from meddam_core.engines.mii import compat
from meddam_core.engines.mii.startup import (
    Limits,
    build_ragged_engine,
    check_logits,
    check_supported,
    logit_reference,
)
from meddam_core.engines.mii.tensor_parallel import join
from meddam_core.records import Reason, RowError

GPU_SEQUENCES, GPU_TOKEN_BUDGET, GPU_VISION_BATCH = 256, 4096, 32
CPU_SEQUENCES, CPU_TOKEN_BUDGET, CPU_VISION_BATCH = 64, 2048, 16


class MiiEngine(LocalEngine):
    """An Engine; see meddam_core.engines.base.

    Args:
        dam: its device and dtype are the engine's. float32 only with torch kernels.
        kernels: "cuda" or "torch"; None takes cuda on a GPU and torch on a CPU. Never changed behind your back.
        max_sequences: captions decoded at once.
        token_budget: most tokens in a forward; prompts are cut to fit.
        cache_bytes, num_blocks: size of the key-value cache, in bytes or in blocks; see startup.Limits.
        vision_batch: views in one pass of the vision tower.
        eos_ids: ids that end a caption, instead of the checkpoint's; () decodes every caption to its limit.
        keep_weights: leave the Dam's language model as it is, at the price of a second copy of its weights.
        startup_check: compare logits with the torch model before serving.
        tp_size: processes that share the language model; see tensor_parallel. This one is rank 0.

    Raises:
        MiiUnavailable: wrong versions, a device or model the kernels do not fit, or a failed check.
    """

    name = "mii"

    def __init__(
        self, dam: Dam, *, kernels: str | None = None, max_sequences: int | None = None,
        token_budget: int | None = None, cache_bytes: int | None = None, num_blocks: int | None = None,
        vision_batch: int | None = None, eos_ids: Collection[int] | None = None, keep_weights: bool = False,
        startup_check: bool = True, tp_size: int = 1,
    ) -> None:  # fmt: skip
        on_gpu = dam.device.type == "cuda"
        self.kernels = load_kernels(dam, kernels)
        from meddam_core.engines.mii.scheduler import Scheduler

        super().__init__(
            dam, vision_batch=vision_batch or (GPU_VISION_BATCH if on_gpu else CPU_VISION_BATCH), eos_ids=eos_ids
        )
        limits = Limits(
            max_sequences=max_sequences or (GPU_SEQUENCES if on_gpu else CPU_SEQUENCES),
            token_budget=token_budget or (GPU_TOKEN_BUDGET if on_gpu else CPU_TOKEN_BUDGET),
            max_length=dam.config.context_length,
            cache_bytes=cache_bytes,
            num_blocks=num_blocks,
        )
        self._group = None
        if tp_size > 1:
            self._group = join(tp_size, self._device)
            self._group.send((self.kernels, limits, keep_weights))
        with self._on_device():
            reference = logit_reference(dam, limits.max_length) if startup_check else None
            self._ragged = build_ragged_engine(dam, self.kernels, limits, keep_weights, self._group)
            self.logit_difference = check_logits(self._ragged, reference, dam.dtype) if reference else None
            """The start-up check's largest relative difference; None if it was not made."""
        self._max_sequences = limits.max_sequences
        self.scheduler = Scheduler(
            self._ragged, max_length=limits.max_length, stats=self.stats, launched=self._encode_ahead
        )
        """MII's scheduler; `counts` and `num_free_blocks` are of interest to tests and benchmarks."""
        self.num_blocks = self.scheduler.num_free_blocks
        """Cache blocks in all."""
        self.block_size: int = self._ragged._model.attn.kv_block_size
        """Tokens a cache block."""

    def close(self) -> None:
        """Frees weights, cache and buffers. The process and other engines in it go on."""
        self._closed = True
        if self._group is not None:
            self._group.send(None)
            self._group.leave()
            self._group = None
        for name in ("scheduler", "_ragged", "_vision", "_generations"):
            if hasattr(self, name):
                delattr(self, name)
        compat.forget_buffers()
        gc.collect()  # FastGen's model and containers refer to each other
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _check_fits(self, prompt: Prompt) -> None:
        positions = len(prompt.token_ids) + prompt.num_new_tokens - 1
        needed = -(-positions // self.block_size)
        if needed > self.num_blocks:
            raise RowError(
                Reason.PROMPT_TOO_LONG,
                f"prompt and caption take up to {positions} positions, {needed} blocks of a key-value cache that has "
                f"{self.num_blocks}",
            )

    def _drop(self, uid: int) -> None:
        self.scheduler.cancel(uid)

    def _work(self) -> None:
        with self._on_device():
            self._admit()
            for uid in self.scheduler.step() if self.scheduler.num_active else []:
                self._finish(uid)

    def _admit(self) -> None:
        from meddam_core.engines.mii.model import VisualRows

        while len(self._vision) and self.scheduler.num_active < self._max_sequences:
            pending = self._vision.take()
            if pending.generation.error is not None or pending.rows is None:
                self._finish(pending.uid)
                continue
            visual = VisualRows(pending.prompt.visual_positions, pending.rows)
            self.scheduler.add(pending.uid, pending.prompt.token_ids, visual, pending.generation)

    def _encode_ahead(self) -> None:
        """Called while a forward runs on the device: the next views, so that a free place is filled at once."""
        if self._vision.overlaps and len(self._vision) and not self._vision.num_ready:
            self._vision.encode_batch()

    def _on_device(self) -> torch.cuda.device:
        return torch.cuda.device(self._device if self._device.type == "cuda" else -1)


def load_kernels(dam: Dam, kernels: str | None) -> str:
    """Loads what serves this model; "cuda" or "torch", by the device if `kernels` is None. Raises MiiUnavailable."""
    chosen = kernels or ("cuda" if dam.device.type == "cuda" else "torch")
    if chosen not in ("cuda", "torch"):
        raise ValueError(f"kernels is {kernels!r}; choose cuda or torch")
    compat.check_versions()
    check_supported(dam.config.llm, dam.llm.vocab_size, dam.device, dam.dtype, chosen)
    compat.import_deepspeed()
    if chosen == "cuda":
        from meddam_core.engines.mii.ops import load_ops

        load_ops()
    return chosen
