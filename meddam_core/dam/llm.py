"""Llama as DAM uses it: rows of embeddings in, hidden states and logits out.

Parameter names are those of Hugging Face's LlamaForCausalLM, so checkpoints load without conversion. This is the plain
form, for training and for checking; meddam_core.engines drives the same weights with a static key-value cache.

Axes: B batch, L positions, P earlier positions, D hidden size, V vocabulary, H heads, K key-value heads, E head size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meddam_core.dam.activations import gated_silu
from meddam_core.dam.architecture import LlmConfig

KeyValue = tuple[Tensor, Tensor]
"""Rotated keys and values of one layer, each (B, K, P, E)."""


def rotary_table(
    config: LlmConfig, num_positions: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """cos and sin, each (num_positions, E), computed in float32 as Hugging Face does."""
    half = torch.arange(0, config.head_dim, 2, device=device, dtype=torch.int64).float() / config.head_dim
    angles = torch.outer(torch.arange(num_positions, device=device).float(), 1.0 / config.rope_theta**half)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding; x is (..., E), cos and sin broadcast against it."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class RmsNorm(nn.Module):
    """Root-mean-square normalisation, in float32 inside."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


class Attention(nn.Module):
    """Causal grouped-query attention."""

    def __init__(self, config: LlmConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, self.heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, self.kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, self.kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.heads * self.head_dim, config.hidden_size, bias=False)

    def forward(self, x_BLD: Tensor, cos: Tensor, sin: Tensor, past: KeyValue | None) -> tuple[Tensor, KeyValue]:
        batch, length, _ = x_BLD.shape
        q = rotate(self.q_proj(x_BLD).view(batch, length, self.heads, self.head_dim).transpose(1, 2), cos, sin)
        k = rotate(self.k_proj(x_BLD).view(batch, length, self.kv_heads, self.head_dim).transpose(1, 2), cos, sin)
        v = self.v_proj(x_BLD).view(batch, length, self.kv_heads, self.head_dim).transpose(1, 2)
        if past is not None:
            k, v = torch.cat((past[0], k), dim=2), torch.cat((past[1], v), dim=2)
        out = attend(q, k, v)
        return self.o_proj(out.transpose(1, 2).reshape(batch, length, -1)), (k, v)


def attend(q_BHLE: Tensor, k_BKPE: Tensor, v_BKPE: Tensor) -> Tensor:
    """Causal attention of the last L of P positions, (B, H, L, E); key-value heads are shared by groups of heads."""
    num_new, num_all = q_BHLE.shape[2], k_BKPE.shape[2]
    grouped = q_BHLE.shape[1] != k_BKPE.shape[1]
    if num_new == num_all:
        return F.scaled_dot_product_attention(q_BHLE, k_BKPE, v_BKPE, is_causal=True, enable_gqa=grouped)
    mask = torch.ones(num_new, num_all, dtype=torch.bool, device=q_BHLE.device).tril(num_all - num_new)
    return F.scaled_dot_product_attention(q_BHLE, k_BKPE, v_BKPE, attn_mask=mask, enable_gqa=grouped)


class Mlp(nn.Module):
    """SwiGLU."""

    def __init__(self, config: LlmConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(gated_silu(self.gate_proj(x), self.up_proj(x)))
        return out


class Layer(nn.Module):
    def __init__(self, config: LlmConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = Mlp(config)
        self.input_layernorm = RmsNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RmsNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x_BLD: Tensor, cos: Tensor, sin: Tensor, past: KeyValue | None) -> tuple[Tensor, KeyValue]:
        attended, kept = self.self_attn(self.input_layernorm(x_BLD), cos, sin, past)
        x_BLD = x_BLD + attended
        return x_BLD + self.mlp(self.post_attention_layernorm(x_BLD)), kept


class _Body(nn.Module):
    """The part that Hugging Face calls `model`."""

    def __init__(self, config: LlmConfig, vocab_size: int) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.norm = RmsNorm(config.hidden_size, config.rms_norm_eps)


class Llama(nn.Module):
    """The language model. `vocab_size` may be below the configuration's: rows beyond the tokenizer are cut."""

    def __init__(self, config: LlmConfig, vocab_size: int | None = None) -> None:
        super().__init__()
        self.config = config
        self.vocab_size = config.vocab_size if vocab_size is None else vocab_size
        self.model = _Body(config, self.vocab_size)
        self.lm_head = nn.Linear(config.hidden_size, self.vocab_size, bias=False)
        self.tie_weights()

    def tie_weights(self) -> None:
        """Share the embedding with the output layer where the configuration says so (again after loading)."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def layers(self) -> list[Layer]:
        """The transformer layers, in order."""
        return [layer for layer in self.model.layers if isinstance(layer, Layer)]

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids (...) -> rows (..., D)."""
        rows: Tensor = self.model.embed_tokens(ids)
        return rows

    def forward(self, embeds_BLD: Tensor, past: list[KeyValue] | None = None) -> tuple[Tensor, list[KeyValue]]:
        """Final hidden states (B, L, D), before the output layer, and the keys and values of all positions so far.

        Rows padded on the right need no mask: nothing looks at positions after its own.
        """
        start = 0 if past is None else past[0][0].shape[2]
        num_positions = start + embeds_BLD.shape[1]
        cos, sin = rotary_table(self.config, num_positions, embeds_BLD.device, embeds_BLD.dtype)
        x, kept = embeds_BLD, []
        for i, layer in enumerate(self.model.layers):
            x, key_value = layer(x, cos[start:], sin[start:], None if past is None else past[i])
            kept.append(key_value)
        return self.model.norm(x), kept

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states (..., D) -> float32 logits (..., V)."""
        out: Tensor = self.lm_head(hidden).float()
        return out
