"""Llama's layers in plain torch, over FastGen's ragged batches and blocked key-value cache.

Used for kernels="torch": on CPUs, on GPUs that the compiled kernels do not know, and in float32. Attention is done for
groups of sequences at once, not one by one; what a forward needs to know of the batch is worked out once in a
`BatchPlan`, not in every layer.

Axes: T new tokens of the batch, S sequences of a group, N new tokens of a sequence, P positions of its cache (padded),
B blocks of it, H heads, K key-value heads, G = H / K, E head size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

BLOCK_SIZE = 16
"""Tokens a block of the cache. Small: less is wasted at the end of a sequence, and gathering blocks costs the same."""


class SequenceState(NamedTuple):
    """One sequence's part in a ragged batch."""

    num_new: int
    num_seen: int
    blocks: NDArray[np.int32]
    """Its blocks of the cache, in order, those of the new tokens included."""


@dataclass(frozen=True, slots=True)
class Group:
    """Sequences whose attention is computed together, padded to the longest."""

    rows_SN: Tensor
    """Rows of the batch; the padding repeats a sequence's last row."""
    real: Tensor | None
    """Indices into the flattened (S, N) that are not padding; None: all."""
    blocks_SB: Tensor | None
    """None: the sequences begin with these tokens, and attend to nothing but them."""
    bias_S1NP: Tensor | None
    """0 where a new token may look, -inf elsewhere; None with `blocks_SB`: plain causal."""


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """What all layers of one forward share."""

    slots_T: Tensor
    """Where each new token's key and value go: block * BLOCK_SIZE + offset."""
    cos_T1E: Tensor
    sin_T1E: Tensor
    last_S: Tensor
    """The row of each sequence's last new token, in the batch's order of sequences."""
    groups: tuple[Group, ...]


def rotary_frequencies(theta: float, head_size: int) -> Tensor:
    """(E / 2,) in float32, as Hugging Face's Llama computes them, for unscaled rotary positions."""
    return 1.0 / theta ** (torch.arange(0, head_size, 2, dtype=torch.int64).float() / head_size)


def rotary_table(theta: float, head_size: int, num_positions: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin (positions, E) in float32."""
    angles = torch.outer(torch.arange(num_positions).float(), rotary_frequencies(theta, head_size))
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(device), angles.sin().to(device)


def plan_batch(
    states: Sequence[SequenceState], cos_PE: Tensor, sin_PE: Tensor, dtype: torch.dtype, max_positions: int
) -> BatchPlan:
    """The plan of a forward over these sequences, whose new tokens lie in the batch one after the other.

    `max_positions` bounds the positions, padding included, whose keys and values a group gathers.
    """
    device = cos_PE.device
    new = np.array([s.num_new for s in states])
    seen = np.array([s.num_seen for s in states])
    ends = new.cumsum()
    starts = ends - new
    positions = np.concatenate([np.arange(a, a + n) for a, n in zip(seen, new, strict=True)])
    slots = np.concatenate(
        [
            s.blocks[(p := np.arange(s.num_seen, s.num_seen + s.num_new)) // BLOCK_SIZE].astype(np.int64) * BLOCK_SIZE
            + p % BLOCK_SIZE
            for s in states
        ]
    )
    places = torch.from_numpy(positions).to(device)
    return BatchPlan(
        slots_T=torch.from_numpy(slots).to(device),
        cos_T1E=cos_PE[places][:, None].to(dtype),
        sin_T1E=sin_PE[places][:, None].to(dtype),
        last_S=torch.from_numpy(ends - 1).to(device),
        groups=tuple(
            _group(states, starts, members, device, dtype) for members in _memberships(new, seen, max_positions)
        ),
    )


def _memberships(new: NDArray[np.int64], seen: NDArray[np.int64], max_positions: int) -> Iterator[list[int]]:
    """Which sequences to compute together: of one kind (decoding, beginning, continuing) and of similar length."""
    positions = new + seen
    decoding = new == 1
    beginning = ~decoding & (seen == 0)
    for kind, length in ((decoding, seen + 1), (beginning, new), (~decoding & (seen > 0), new)):
        members: list[int] = []
        for i in sorted(np.flatnonzero(kind).tolist(), key=lambda i: -int(length[i])):
            if members:
                # padding is wasted work, a further group is a further round of kernel launches
                uneven = length[i] * 4 < length[members[0]] * 3 and len(members) >= 4
                if uneven or (len(members) + 1) * positions[members[0]] > max_positions:
                    yield members
                    members = []
            members.append(i)
        if members:
            yield members


def _group(
    states: Sequence[SequenceState], starts: NDArray[np.int64], members: list[int], device: torch.device,
    dtype: torch.dtype,
) -> Group:  # fmt: skip
    chosen = [states[i] for i in members]
    new = np.array([s.num_new for s in chosen])
    seen = np.array([s.num_seen for s in chosen])
    offsets = np.minimum(np.arange(new.max())[None], new[:, None] - 1)
    rows = torch.from_numpy(starts[members][:, None] + offsets).to(device)
    padding = np.arange(new.max())[None] >= new[:, None]
    real = torch.from_numpy(np.flatnonzero(~padding)).to(device) if padding.any() else None
    if not seen.any() and new.max() > 1:
        return Group(rows, real, None, None)
    num_blocks = -(-int((seen + new).max()) // BLOCK_SIZE)
    blocks = np.zeros((len(chosen), num_blocks), np.int64)
    for row, s in zip(blocks, chosen, strict=True):
        used = -(-(s.num_seen + s.num_new) // BLOCK_SIZE)
        row[:used] = s.blocks[:used]
    last_visible = torch.from_numpy(seen[:, None] + offsets).to(device)
    hidden = torch.arange(num_blocks * BLOCK_SIZE, device=device) > last_visible[..., None]
    bias = torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, float("-inf"))
    return Group(rows, real, torch.from_numpy(blocks).to(device), bias[:, None])


def attend(
    qkv_TX: Tensor, cache: Tensor, plan: BatchPlan, *, num_heads: int, num_kv_heads: int, head_size: int
) -> Tensor:
    """Rotates, writes keys and values to the cache, attends. Returns (T, H * E).

    Args:
        qkv_TX: X = (H + 2 K) * E.
        cache: one layer's (blocks, BLOCK_SIZE, 2, K, E); written at the new tokens' slots.
    """
    num_tokens = qkv_TX.shape[0]
    heads = qkv_TX.view(num_tokens, num_heads + 2 * num_kv_heads, head_size)
    rotated = _rotate(heads[:, : num_heads + num_kv_heads], plan.cos_T1E, plan.sin_T1E)
    q_THE = rotated[:, :num_heads]
    # (T, 2, K, E): keys, then values, as the cache holds them
    new_T2KE = torch.stack((rotated[:, num_heads:], heads[:, num_heads + num_kv_heads :]), dim=1)
    cache.view(-1, 2, num_kv_heads, head_size).index_copy_(0, plan.slots_T, new_T2KE)
    out = torch.empty_like(q_THE, memory_format=torch.contiguous_format)
    for group in plan.groups:
        _attend_group(q_THE, new_T2KE, cache, group, out)
    return out.view(num_tokens, num_heads * head_size)


def _rotate(x_THE: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x_THE.chunk(2, dim=-1)
    return x_THE * cos + torch.cat((-second, first), dim=-1) * sin


def _attend_group(q_THE: Tensor, new_T2KE: Tensor, cache: Tensor, group: Group, out_THE: Tensor) -> None:
    num_sequences, num_new = group.rows_SN.shape
    num_heads, head_size = q_THE.shape[1:]
    num_kv_heads = new_T2KE.shape[2]
    rows = group.rows_SN.flatten()
    q_SHNE = q_THE[rows].view(num_sequences, num_new, num_heads, head_size).transpose(1, 2)
    if group.blocks_SB is None:
        kv = new_T2KE[rows].view(num_sequences, num_new, 2, num_kv_heads, head_size)
    else:
        flat = cache.view(cache.shape[0], -1).index_select(0, group.blocks_SB.flatten())
        kv = flat.view(num_sequences, -1, 2, num_kv_heads, head_size)
    k_SKPE, v_SKPE = kv[:, :, 0].transpose(1, 2), kv[:, :, 1].transpose(1, 2)
    if num_new == 1 and group.blocks_SB is not None:
        # one query a sequence: the heads that share a key head are its rows
        q_SKGE = q_SHNE.reshape(num_sequences, num_kv_heads, num_heads // num_kv_heads, head_size)
        found = F.scaled_dot_product_attention(q_SKGE, k_SKPE, v_SKPE, attn_mask=group.bias_S1NP)
    else:
        found = F.scaled_dot_product_attention(
            q_SHNE, k_SKPE, v_SKPE, attn_mask=group.bias_S1NP, is_causal=group.bias_S1NP is None,
            enable_gqa=num_heads != num_kv_heads,
        )  # fmt: skip
        found = found.transpose(1, 2)
    found = found.reshape(-1, num_heads, head_size)
    if group.real is not None:
        found, rows = found[group.real], rows[group.real]
    out_THE.index_copy_(0, rows, found)


class TorchNorm:
    """RMSNorm with the residual added first: (residual, hidden) -> (new residual, normalised)."""

    def __init__(self, eps: float) -> None:
        self.eps = eps

    def transform_param(self, param: Tensor) -> Tensor:
        return param

    def rms(self, x: Tensor, gamma: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), gamma, self.eps)

    def __call__(
        self, residual: Tensor, hidden: Tensor | None, gamma: Tensor, beta: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        del beta  # RMSNorm has none; the name is part of FastGen's call
        if hidden is not None:
            residual = residual + hidden
        return residual, self.rms(residual, gamma)


class TorchLinear:
    """A linear layer without bias."""

    def transform_param(self, param: Tensor) -> Tensor:
        return param

    def __call__(self, x: Tensor, weight: Tensor, b: Tensor | None = None) -> Tensor:
        return F.linear(x, weight, b)


class TorchSwiGlu:
    """The first half of the MLP. FastGen hands over gate and up rows in turns; here all gate rows come first."""

    def transform_param(self, param: Tensor) -> Tensor:
        return torch.cat((param[0::2], param[1::2]))

    def __call__(self, x: Tensor, weight: Tensor, b: Tensor | None = None) -> Tensor:
        gate, up = F.linear(x, weight, b).chunk(2, dim=-1)
        return F.silu(gate) * up
