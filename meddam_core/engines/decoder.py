"""The language model with a static key-value cache: prompts in, then one token a row and step.

Rows live in slots; active rows are always slots 0 .. num_active - 1, so a step works on views of the cache and copies
nothing. The weights are those of dam.llm.Llama: query, key and value (and gate and up) are laid side by side in one
buffer, of which the module's own parameters become views, so nothing is held twice.

Invariants:
- float32 on the CPU: a row's numbers do not depend on the rows beside it. Matrix products round differently below 16
  rows and attention at lengths that are not a multiple of 16, so rows and lengths are padded to that.
- Columns a row has not written are masked by -inf, never read.

Axes: B rows, L positions, D hidden size, V vocabulary, H heads, K key-value heads, E head size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meddam_core.dam.activations import gated_silu
from meddam_core.dam.llm import Layer, Llama, rotary_table

LENGTH_STEP = 16
"""Lengths are rounded up to a multiple of this."""
GROUP = 32
"""Rows whose attention reads as far as the longest of them."""
MIN_ROWS = 16
"""Fewer rows than this are padded: below it, matrix products take other paths and round differently."""


def round_up(value: int, step: int) -> int:
    return -(-value // step) * step


Rotation = tuple[Tensor, Tensor]
"""cos and sin, each (..., H + K, E); the first half of sin is negated, so that a half-turn is a roll."""

Span = tuple[slice, Tensor]
"""Rows that attend equally far, and their bias (rows, 1, 1, L)."""


class Decoder:
    """Prefill and decode over rows in a cache that grows on demand. All methods run without autograd."""

    def __init__(self, llm: Llama) -> None:
        self.llm = llm
        self.config = llm.config
        weight = llm.model.embed_tokens.weight
        self.device, self.dtype = weight.device, weight.dtype
        with torch.no_grad():
            self._layers = [_FusedLayer(layer, llm.config.rms_norm_eps) for layer in llm.layers()]
            cos, sin = rotary_table(llm.config, llm.config.max_position_embeddings, self.device, self.dtype)
        half = llm.config.head_dim // 2
        self._cos, self._sin = cos, torch.cat((-sin[:, :half], sin[:, half:]), dim=-1)  # signs for a half-turn by roll
        self.release()

    @property
    def bytes_per_position(self) -> int:
        """Size of the cache of one position of one row."""
        c = self.config
        return 2 * c.num_layers * c.num_kv_heads * c.head_dim * self.dtype.itemsize

    @torch.inference_mode()
    def release(self) -> None:
        """Give the cache's memory back; every row is forgotten."""
        self.num_slots = self.length = 0
        self._kv, self._bias, self._next_position = self._new_cache(0, 0)
        self._num_used: list[int] = []  # the same as _next_position, on the host

    @torch.inference_mode()
    def reserve(self, slots: int, length: int) -> None:
        """Make room for at least this many rows and positions; what is cached stays. May run out of memory."""
        slots, length = round_up(slots, MIN_ROWS), round_up(length, LENGTH_STEP)
        if slots <= self.num_slots and length <= self.length:
            return
        slots, length = max(slots, self.num_slots), max(length, self.length)
        kv, bias, next_position = self._new_cache(slots, length)
        kv[:, :, : self.num_slots, :, : self.length] = self._kv
        bias[: self.num_slots, : self.length] = self._bias
        next_position[: self.num_slots] = self._next_position
        self._kv, self._bias, self._next_position = kv, bias, next_position
        self._num_used += [0] * (slots - self.num_slots)
        self.num_slots, self.length = slots, length

    def _new_cache(self, slots: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values (layer, 2, slot, K, L, E); attention bias (slot, L); next position (slot,)."""
        c, device = self.config, self.device
        shape = (c.num_layers, 2, slots, c.num_kv_heads, length, c.head_dim)
        return (
            torch.zeros(shape, dtype=self.dtype, device=device),
            torch.full((slots, length), float("-inf"), dtype=self.dtype, device=device),
            torch.zeros(slots, dtype=torch.int64, device=device),
        )

    @torch.inference_mode()
    def prefill(
        self, ids: Sequence[Sequence[int]], visual_positions: Sequence[Sequence[int]], visual_rows: Sequence[Tensor],
        first_slot: int,
    ) -> Tensor:  # fmt: skip
        """Fill slots from `first_slot` on with prompts; float32 logits (B, V) of what follows each.

        Args:
            ids: token ids of each prompt; their lengths must round up to the same multiple of LENGTH_STEP.
            visual_positions: where, in each prompt, a visual row replaces the token's own.
            visual_rows: those rows, (number of positions, D), a tensor a prompt.
            first_slot: the slots must have been reserved.
        """
        lengths = [len(row) for row in ids]
        batch, padded = len(ids), round_up(max(lengths), LENGTH_STEP)
        table = torch.zeros(batch, padded, dtype=torch.int64)
        for i, row in enumerate(ids):
            table[i, : len(row)] = torch.tensor(row)
        x = self.llm.embed(table.to(self.device))
        places = [i * padded + place for i, row in enumerate(visual_positions) for place in row]
        x.view(-1, x.shape[-1])[torch.tensor(places, device=self.device)] = torch.cat(list(visual_rows)).to(self.dtype)
        slots = slice(first_slot, first_slot + batch)
        num_used = torch.tensor(lengths, device=self.device)
        written = torch.arange(self.length, device=self.device) < num_used[:, None]
        self._bias[slots] = torch.zeros_like(self._bias[slots]).masked_fill_(~written, float("-inf"))
        self._next_position[slots] = num_used
        self._num_used[slots] = lengths
        rotation = self._rotation(torch.arange(padded, device=self.device))
        for layer, kv in zip(self._layers[:-1], self._kv[:-1], strict=True):
            x = layer.prefill(x, rotation, kv[:, slots, :, :padded])
        # Nobody reads the last layer's output but that of the last position.
        bias, kv = self._bias[slots, None, None, :padded], self._kv[-1][:, slots, :, :padded]
        return self._logits(self._layers[-1].prefill_last(x, rotation, kv, num_used - 1, bias))[:batch]

    @torch.inference_mode()
    def step(self, tokens: Sequence[int]) -> Tensor:
        """Append one token to each of the first len(tokens) rows; float32 logits (B, V) of what follows."""
        num_active, batch = len(tokens), max(len(tokens), MIN_ROWS)
        padding = [0] * (batch - num_active)
        x = self.llm.embed(torch.tensor([*tokens, *padding], device=self.device))
        rows, position = torch.arange(batch, device=self.device), self._next_position[:batch]
        self._bias[rows, position] = 0.0
        spans = [(cut, self._bias[cut, None, None, :used]) for cut, used in self._spans(num_active, batch)]
        rotation, places = self._rotation(position), self._places(rows, position)
        for layer, kv in zip(self._layers, self._kv, strict=True):
            x = layer.step(x, rotation, kv, places, spans)
        logits = self._logits(x)[:num_active]
        self._next_position[:num_active] += 1
        self._num_used[:num_active] = [n + 1 for n in self._num_used[:num_active]]
        return logits

    def _spans(self, num_active: int, batch: int) -> list[tuple[slice, int]]:
        """Neighbouring rows that attend equally far, and how far: groups, joined where they agree."""
        spans: list[tuple[slice, int]] = []
        for first in range(0, num_active, GROUP):
            end = min(first + GROUP, num_active)
            used = round_up(max(self._num_used[first:end]) + 1, LENGTH_STEP)
            start = first
            if spans and spans[-1][1] == used:
                start = spans.pop()[0].start
            spans.append((slice(start, batch if end == num_active else end), used))
        return spans

    def _rotation(self, position: Tensor) -> Rotation:
        """cos and signed sin of these positions, written out for every head: adding heads by broadcast is slow."""
        heads = self.config.num_heads + self.config.num_kv_heads
        cos, sin = (table[position][:, None].repeat(1, heads, 1) for table in (self._cos, self._sin))
        return cos, sin

    def _places(self, rows: Tensor, position: Tensor) -> Tensor:
        """Where a layer's keys, then values, of these rows and positions go: (B * 2K,) indices of vectors (E,)."""
        heads = torch.arange(2 * self.config.num_kv_heads, device=self.device)
        kind, head = heads // self.config.num_kv_heads, heads % self.config.num_kv_heads
        slot = kind * self.num_slots + rows[:, None]
        return ((slot * self.config.num_kv_heads + head) * self.length + position[:, None]).flatten()

    @torch.inference_mode()
    def remove(self, slot: int, num_active: int) -> list[tuple[int, int]]:
        """Empty one of the first `num_active` slots; the moves (source, target), in order, that close the gap.

        Rows are kept roughly from the longest to the shortest, so a step's attention reads little more than what its
        rows have written: unless the last row is about as long as the one that leaves, each group of GROUP rows gives
        its longest to the group before it.
        """
        moves, hole, last = [], slot, num_active - 1
        while (following := (hole // GROUP + 1) * GROUP) <= last:
            if self._num_used[hole] - self._num_used[last] < LENGTH_STEP:
                break
            longest = max(range(following, min(following + GROUP, num_active)), key=self._num_used.__getitem__)
            moves.append((longest, hole))
            hole = longest
        if hole != last:
            moves.append((last, hole))
        for source, target in moves:
            used = self._num_used[source]
            self._kv[:, :, target, :, :used] = self._kv[:, :, source, :, :used]
            self._bias[target] = self._bias[source]
            self._next_position[target] = self._next_position[source]
            self._num_used[target] = used
        self._next_position[last] = 0
        self._num_used[last] = 0
        self._bias[last] = float("-inf")
        return moves

    def _logits(self, x_BD: Tensor) -> Tensor:
        return self.llm.logits(self.llm.model.norm(x_BD))


class _FusedLayer:
    """One layer's weights, side by side, and its two forms of forward pass."""

    def __init__(self, layer: Layer, eps: float) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self._heads, self._kv_heads, self._head_dim = attention.heads, attention.kv_heads, attention.head_dim
        self._qkv = _side_by_side([attention.q_proj, attention.k_proj, attention.v_proj])
        self._gate_up = _side_by_side([mlp.gate_proj, mlp.up_proj])
        self._out, self._down = attention.o_proj.weight, mlp.down_proj.weight
        self._norm1, self._norm2 = layer.input_layernorm.weight, layer.post_attention_layernorm.weight
        self._eps = eps

    def prefill(self, x_BLD: Tensor, rotation: Rotation, kv_2BKLE: Tensor) -> Tensor:
        batch, length, _ = x_BLD.shape
        q, k, v = (t.transpose(1, 2) for t in self._project(x_BLD, rotation))
        kv_2BKLE[0], kv_2BKLE[1] = k, v
        grouped = self._heads != self._kv_heads
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        return self._rest(x_BLD, attended.transpose(1, 2).reshape(batch, length, -1))

    def prefill_last(self, x_BLD: Tensor, rotation: Rotation, kv_2BKLE: Tensor, last: Tensor, bias: Tensor) -> Tensor:
        """Like `prefill`, but only the output at position `last` of each row, (B, D), or MIN_ROWS if that is more.

        `bias` masks the positions after `last`.
        """
        rows = torch.arange(len(x_BLD), device=x_BLD.device)
        q, k, v = self._project(x_BLD, rotation)
        kv_2BKLE[0], kv_2BKLE[1] = k.transpose(1, 2), v.transpose(1, 2)
        attended = self._attend(q[rows, last], kv_2BKLE, bias)
        return self._rest(_padded(x_BLD[rows, last]), _padded(attended))

    def step(self, x_BD: Tensor, rotation: Rotation, kv_2SKLE: Tensor, places: Tensor, spans: Sequence[Span]) -> Tensor:
        q, k, v = self._project(x_BD, rotation)
        kv_2SKLE.view(-1, self._head_dim).index_copy_(0, places, torch.cat((k, v), dim=1).view(-1, self._head_dim))
        attended = [self._attend(q[cut], kv_2SKLE[:, cut, :, : bias.shape[-1]], bias) for cut, bias in spans]
        return self._rest(x_BD, attended[0] if len(attended) == 1 else torch.cat(attended))

    def _attend(self, q_BHE: Tensor, kv_2BKLE: Tensor, bias: Tensor) -> Tensor:
        """Attention of one position a row, (B, H * E)."""
        # The heads that share keys and values are the query positions of one attention: nothing is repeated.
        q = q_BHE.reshape(len(q_BHE), self._kv_heads, -1, self._head_dim)
        return F.scaled_dot_product_attention(q, kv_2BKLE[0], kv_2BKLE[1], attn_mask=bias).reshape(len(q), -1)

    def _project(self, x: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries and keys, and values, each (..., heads, E)."""
        cos, sin = rotation
        x = F.rms_norm(x, x.shape[-1:], self._norm1, self._eps)
        qkv = F.linear(x, self._qkv)
        qkv = qkv.view(*qkv.shape[:-1], -1, self._head_dim)
        num_turned = self._heads + self._kv_heads
        turned = qkv.narrow(-2, 0, num_turned)
        # Not addcmul: it may round the end of a tensor differently, and a row's numbers would depend on the batch.
        turned = (turned * cos).add_(turned.roll(self._head_dim // 2, -1).mul_(sin))
        q, k = turned.narrow(-2, 0, self._heads), turned.narrow(-2, self._heads, self._kv_heads)
        return q, k, qkv.narrow(-2, num_turned, self._kv_heads)

    def _rest(self, x: Tensor, attended: Tensor) -> Tensor:
        x = x + F.linear(attended, self._out)
        gate, up = F.linear(F.rms_norm(x, x.shape[-1:], self._norm2, self._eps), self._gate_up).chunk(2, dim=-1)
        return x + F.linear(gated_silu(gate, up), self._down)


def _padded(x_BD: Tensor) -> Tensor:
    """At least MIN_ROWS rows."""
    return x_BD if len(x_BD) >= MIN_ROWS else F.pad(x_BD, (0, 0, 0, MIN_ROWS - len(x_BD)))


def _side_by_side(linears: Sequence[nn.Linear]) -> Tensor:
    """One weight with the rows of all; the layers' own parameters become views of it."""
    wrapped = {type(linear).__name__ for linear in linears if type(linear) is not nn.Linear}
    if wrapped:
        raise ValueError(
            f"the language model's layers are wrapped in {wrapped}; merge adapters before making an engine"
        )
    fused = torch.cat([linear.weight.detach() for linear in linears])
    start = 0
    for linear in linears:
        rows = linear.weight.shape[0]
        linear.weight.data = fused[start : start + rows]
        start += rows
    return fused
