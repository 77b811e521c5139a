"""Starting FastGen for a DAM: what is supported, how large the cache is, and proof that the logits are right.

The order matters: the reference logits are taken from DAM's own language model before its weights are handed over, and
compared with FastGen's before the first request is served. Anything that speaks against serving raises MiiUnavailable.

Axes: L positions of the check's prompt, V vocabulary.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from meddam_core.dam.config import LlmConfig
from meddam_core.dam.model import Dam
from meddam_core.engines.admission import PLACEHOLDER_ID
from meddam_core.engines.mii.compat import MiiUnavailable, deepspeed_session
from meddam_core.engines.mii.tensor_parallel import TensorGroup

HEAD_SIZES = (64, 80, 96, 128)
"""Of DeepSpeed's rotary kernel (BlockedTrainedRotaryEmbeddings.supported_head_sizes)."""
GROUP_SIZES = (1, 2, 4, 5, 8)
"""Query heads a key-value head, of the same kernel (supported_q_ratios)."""
MAX_CACHE_ELEMENTS = 2**31
"""Of one layer: that kernel computes places in the cache with 32-bit integers."""
LOGIT_TOLERANCE = {torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.1}
"""Largest allowed ||FastGen - torch|| / ||torch - mean|| over the logits of a position. An error in a kernel makes it
about 1; two correct implementations differ by rounding."""
NUM_CHECKED_TOKENS = 4
"""Positions decoded one at a time in the check, after its prompt."""
VISION_RESERVE_BYTES = 3 << 30
"""GPU memory left for the vision tower's activations when the cache takes the rest."""
CPU_CACHE_BYTES = 1 << 30
"""Default size of the cache on a CPU, if that many blocks can be used at all."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Limits:
    """Sizes of a FastGen engine."""

    max_sequences: int
    """Sequences that run at once."""
    token_budget: int
    """Most tokens a forward takes; longer prompts are spread over several."""
    max_length: int
    """Positions a sequence may take."""
    cache_bytes: int | None = None
    """Memory for keys and values; None: what is free on a GPU, up to 1 GiB on a CPU, never more than can be used."""
    num_blocks: int | None = None
    """Cache blocks outright, instead of `cache_bytes`."""


def check_supported(
    llm: LlmConfig, vocab_size: int, device: torch.device, dtype: torch.dtype, kernels: str
) -> None:  # fmt: skip
    """Raises MiiUnavailable, with all reasons, for a model or device that these kernels cannot serve."""
    problems = []
    if kernels == "cuda":
        if device.type != "cuda":
            problems.append(f"the device is {device.type}")
        else:
            major, minor = torch.cuda.get_device_capability(device)
            if not (major == 8 or (major, minor) == (9, 0)):
                problems.append(f"the GPU is SM {major}.{minor}, and the kernels are for SM 8.x and 9.0")
        if dtype not in (torch.float16, torch.bfloat16):
            problems.append(f"the dtype is {dtype}, and the kernels are for float16 and bfloat16")
        if llm.head_dim not in HEAD_SIZES:
            problems.append(f"heads have size {llm.head_dim}, and the kernels know {HEAD_SIZES}")
        if llm.num_heads // llm.num_kv_heads not in GROUP_SIZES:
            problems.append(f"{llm.num_heads} heads for {llm.num_kv_heads} key-value heads is a ratio the kernels lack")
        for what, size, multiple in (
            ("the MLP", llm.intermediate_size, 32),
            ("the hidden state", llm.hidden_size, 32),
            ("the vocabulary", vocab_size, 8),
        ):
            if size % multiple:
                problems.append(f"{what} has size {size}, which is no multiple of {multiple}")
    if problems:
        raise MiiUnavailable(f"the compiled kernels do not fit: {'; '.join(problems)}. kernels='torch' works here")


def build_ragged_engine(
    dam: Dam, kernels: str, limits: Limits, keep_weights: bool, group: TensorGroup | None = None
) -> Any:  # fmt: skip
    """A RaggedEngine with DAM's language model, which is empty afterwards unless it is kept (see weights.Handover)."""
    from deepspeed.inference import RaggedInferenceEngineConfig

    from meddam_core.engines.mii.model import DamPolicy, RaggedEngine, fastgen_config
    from meddam_core.engines.mii.torch_kernels import BLOCK_SIZE
    from meddam_core.engines.mii.weights import Handover

    device, dtype, llm = dam.device, dam.dtype, dam.config.llm
    with deepspeed_session(device, kernels):
        block_size = BLOCK_SIZE if kernels == "torch" else _compiled_block_size(llm.head_dim)
        num_blocks = limits.num_blocks or _affordable_blocks(llm, dtype, device, block_size, limits, group)
        config = RaggedInferenceEngineConfig(
            tensor_parallel={"tp_size": 1 if group is None else group.size},
            state_manager={
                "max_tracked_sequences": limits.max_sequences + _spare_atoms(kernels, limits),
                "max_ragged_batch_size": limits.token_budget,
                "max_ragged_sequence_count": _sequence_count(kernels, limits),
                "max_context": limits.max_length,
                "memory_config": {"mode": "allocate", "size": num_blocks},
            },
        )
        model_config = fastgen_config(llm, dam.llm.vocab_size, limits.max_length, dtype)
        policy = DamPolicy(model_config, Handover(dam.llm, device=device, dtype=dtype, keep=keep_weights), kernels)
        engine = RaggedEngine(policy, config, group)
    _log.info(
        "FastGen is up: %s kernels, %d cache blocks of %d tokens, %d tokens a forward, %d sequences",
        kernels, num_blocks, block_size, limits.token_budget, limits.max_sequences,
    )  # fmt: skip
    return engine


def _compiled_block_size(head_size: int) -> int:
    from deepspeed.inference.v2.kernels.ragged_ops import get_kv_block_size

    return int(get_kv_block_size(head_size))


def _spare_atoms(kernels: str, limits: Limits) -> int:
    """Room in the attention kernel's list of work items ("atoms"): one a sequence, and one for every 64 tokens more.

    FastGen sizes the list by the number of sequences alone and does not check; long prompts beside many decoding
    sequences would write past its end.
    """
    return 0 if kernels == "torch" else -(-limits.token_budget // 64)


def _sequence_count(kernels: str, limits: Limits) -> int:
    count = limits.max_sequences + _spare_atoms(kernels, limits)
    if kernels == "torch":
        return min(count, limits.token_budget)
    if count > limits.token_budget:
        raise ValueError(
            f"token_budget is {limits.token_budget}; {limits.max_sequences} sequences at once need at least {count}"
        )
    return count


def _affordable_blocks(
    llm: LlmConfig, dtype: torch.dtype, device: torch.device, block_size: int, limits: Limits,
    group: TensorGroup | None,
) -> int:  # fmt: skip
    kv_heads = llm.num_kv_heads if group is None else max(1, llm.num_kv_heads // group.size)
    block_bytes = block_size * 2 * llm.num_layers * kv_heads * llm.head_dim * dtype.itemsize
    usable = limits.max_sequences * -(-limits.max_length // block_size)
    budget = limits.cache_bytes
    if budget is None and device.type == "cuda":
        torch.cuda.empty_cache()
        budget = int(0.95 * (torch.cuda.mem_get_info(device)[0] - VISION_RESERVE_BYTES))
    elif budget is None:
        budget = CPU_CACHE_BYTES
    if budget < block_bytes:
        raise MiiUnavailable(
            f"{max(budget, 0) >> 20} MiB are left for keys and values, and one block of {block_size} tokens takes "
            f"{-(-block_bytes >> 20)} MiB: lower the number of sequences, or use a larger device"
        )
    addressable = MAX_CACHE_ELEMENTS // (block_size * 2 * kv_heads * llm.head_dim) - 1
    num_blocks = min(usable, budget // block_bytes, addressable)
    return num_blocks if group is None else group.smallest(num_blocks)


@dataclass(frozen=True, slots=True)
class LogitReference:
    """A prompt with an image, a few tokens after it, and the torch model's logits for them."""

    token_ids: list[int]
    visual_positions: list[int]
    visual_rows: Tensor
    next_ids: list[int]
    logits: Tensor
    """(1 + len(next_ids), V), float32: after the prompt, and after each of the next ids."""


@torch.inference_mode()
def logit_reference(dam: Dam, max_length: int) -> LogitReference:
    """What DAM's own language model says to a prompt of random visual rows between random tokens."""
    generator = torch.Generator().manual_seed(20)
    llm, num_visual = dam.config.llm, min(dam.config.num_image_tokens, max_length // 2)
    num_before, num_after = (min(n, max_length // 8) for n in (21, 15))
    size = dam.llm.vocab_size
    before, after, following = (
        torch.randint(0, size, (n,), generator=generator).tolist() for n in (num_before, num_after, NUM_CHECKED_TOKENS)
    )
    scale = float(dam.llm.embed(torch.arange(min(size, 512), device=dam.device)).float().std())
    visual = torch.randn(num_visual, llm.hidden_size, generator=generator).mul(scale).to(dam.device, dam.dtype)
    ids = torch.tensor(before + [PLACEHOLDER_ID] * num_visual + after + following, device=dam.device)
    rows = dam.llm.embed(ids).clone()
    rows[num_before : num_before + num_visual] = visual
    hidden, _ = dam.llm(rows[None])
    return LogitReference(
        token_ids=ids[: -len(following)].tolist(),
        visual_positions=list(range(num_before, num_before + num_visual)),
        visual_rows=visual,
        next_ids=following,
        logits=dam.llm.logits(hidden[0, -len(following) - 1 :]).cpu(),
    )


def check_logits(engine: Any, reference: LogitReference, dtype: torch.dtype) -> float:
    """Runs the reference through FastGen, its prompt in two parts; the largest relative difference of a position.

    Raises MiiUnavailable above LOGIT_TOLERANCE.
    """
    from meddam_core.engines.mii.model import VisualRows

    uid, budget = -1, engine._config.state_manager.max_ragged_batch_size
    ids, found = reference.token_ids, []
    engine._model.visual[uid] = VisualRows(reference.visual_positions, reference.visual_rows)
    part = min(budget, -(-len(ids) // 2))
    pieces = [ids[i : i + part] for i in range(0, len(ids), part)]
    for piece in pieces:
        logits = engine.put([uid], [torch.tensor(piece)])
    found.append(logits.float().cpu())
    for token in reference.next_ids:
        found.append(engine.put([uid], [torch.tensor([token])]).float().cpu())
    engine.flush(uid)
    del engine._model.visual[uid]
    expected = reference.logits
    difference = (torch.cat(found) - expected).norm(dim=-1)
    relative = difference / (expected - expected.mean(dim=-1, keepdim=True)).norm(dim=-1)
    worst = float(relative.max())
    if not worst <= LOGIT_TOLERANCE[dtype]:
        raise MiiUnavailable(
            f"the start-up check failed: FastGen's logits differ from the torch model's by {worst:.2g} of their size; "
            f"at most {LOGIT_TOLERANCE[dtype]} is rounding in {dtype}"
        )
    return worst
