"""DAM's vision: SigLIP with a mask channel, the gated cross-attention adapters, and the 2x2 projector.

One tower reads both views. Its features are those after layer `config.num_used_layers`; later layers, the last norm and
the pooling head exist only because the checkpoint has them, and are never run. Parameter names are the reference's.

Axes: B views, S pixels a side, N = grid * grid patches in row-major order, C vision hidden size, T image tokens,
D language model hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meddam_core.dam.activations import gelu_tanh
from meddam_core.dam.architecture import ContextConfig, DamConfig, VisionConfig


class _Mlp(nn.Module):
    def __init__(self, size: int, inner: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(size, inner)
        self.fc2 = nn.Linear(inner, size)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(gelu_tanh(self.fc1(x)))
        return out


class _Attention(nn.Module):
    """Multi-head attention with biases; queries from one sequence, keys and values from another."""

    def __init__(self, size: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(size, size)
        self.k_proj = nn.Linear(size, size)
        self.v_proj = nn.Linear(size, size)
        self.out_proj = nn.Linear(size, size)

    def forward(self, queries_BNC: Tensor, context_BNC: Tensor, bias: Tensor | None = None) -> Tensor:
        batch, length, size = queries_BNC.shape
        q, k, v = (
            proj(x).view(batch, -1, self.heads, size // self.heads).transpose(1, 2)
            for proj, x in ((self.q_proj, queries_BNC), (self.k_proj, context_BNC), (self.v_proj, context_BNC))
        )
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        result: Tensor = self.out_proj(out.transpose(1, 2).reshape(batch, length, size))
        return result


class _VisionLayer(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.self_attn = _Attention(config.hidden_size, config.num_heads)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = _Mlp(config.hidden_size, config.intermediate_size)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer_norm1(x)
        x = x + self.self_attn(h, h)
        out: Tensor = x + self.mlp(self.layer_norm2(x))
        return out


class _Embeddings(nn.Module):
    """Patches of RGB and of the mask, each by its own convolution, plus a learned position."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        side, size = config.patch_size, config.hidden_size
        self.patch_embedding = nn.Conv2d(3, size, kernel_size=side, stride=side)
        self.mask_patch_embedding = nn.Conv2d(1, size, kernel_size=side, stride=side)
        self.position_embedding = nn.Embedding(config.grid**2, size)

    def forward(self, pixels_B4SS: Tensor) -> Tensor:
        patches = self.patch_embedding(pixels_B4SS[:, :3]) + self.mask_patch_embedding(pixels_B4SS[:, 3:])
        rows = patches.flatten(2).transpose(1, 2).contiguous()  # otherwise every later layer works on a strided tensor
        embedded: Tensor = rows + self.position_embedding.weight
        return embedded


class _PoolingHead(nn.Module):
    """Dead weight of the checkpoint: parameters only."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.probe = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.attention = nn.MultiheadAttention(config.hidden_size, config.num_heads, batch_first=True)
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = _Mlp(config.hidden_size, config.intermediate_size)


class _Encoder(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_VisionLayer(config) for _ in range(config.num_layers))


class _VisionModel(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.embeddings = _Embeddings(config)
        self.encoder = _Encoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.head = _PoolingHead(config)


class VisionTower(nn.Module):
    def __init__(self, config: VisionConfig, num_used_layers: int) -> None:
        super().__init__()
        self.vision_model = _VisionModel(config)
        self.num_used_layers = num_used_layers

    def embed(self, pixels_B4SS: Tensor) -> Tensor:
        """Normalised RGB and mask -> embeddings (B, N, C)."""
        out: Tensor = self.vision_model.embeddings(pixels_B4SS)
        return out

    def run(
        self,
        x_BNC: Tensor,
        adapters: Sequence[nn.Module] | None = None,
        context_BNC: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """Embeddings -> features (B, N, C), with an adapter after every layer if a context is given."""
        for i in range(self.num_used_layers):
            x_BNC = self.vision_model.encoder.layers[i](x_BNC)
            if adapters is not None:
                x_BNC = adapters[i](x_BNC, context_BNC, bias)
        return x_BNC


class _Adapter(nn.Module):
    """Gated cross-attention and MLP. Gates are raw scalars (no tanh, unlike the paper); the context is not normed."""

    def __init__(self, config: ContextConfig, size: int) -> None:
        super().__init__()
        self.cross_attn = _Attention(size, config.num_heads)
        self.layer_norm1 = nn.LayerNorm(size, eps=config.layer_norm_eps)
        self.mlp = _Mlp(size, config.intermediate_size)
        self.layer_norm2 = nn.LayerNorm(size, eps=config.layer_norm_eps)
        self.gated = config.zero_init_output
        if self.gated:
            self.attn_factor = nn.Parameter(torch.zeros(1))
            self.mlp_factor = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, context: Tensor, bias: Tensor | None) -> Tensor:
        attended = self.cross_attn(self.layer_norm1(x), context, bias)
        x = x + (self.attn_factor * attended if self.gated else attended)
        mixed: Tensor = self.mlp(self.layer_norm2(x))
        return x + (self.mlp_factor * mixed if self.gated else mixed)


class _Adapters(nn.Module):
    def __init__(self, config: ContextConfig, size: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Adapter(config, size) for _ in range(config.num_layers))


class ContextProvider(nn.Module):
    def __init__(self, config: ContextConfig, size: int) -> None:
        super().__init__()
        self.config = config
        self.context_provider_module = _Adapters(config, size)

    @property
    def adapters(self) -> nn.ModuleList:
        return self.context_provider_module.layers

    def attention_bias(self, pixels_B8SS: Tensor) -> Tensor | None:
        """0 or -inf for each patch of the full view, (B, 1, 1, N), where only masked patches may be attended to.

        A mask that touches no patch gives NaN, as in the reference: the engine then reports the region as failed.
        """
        if not self.config.masked_cross_attn:
            return None
        side = self.config.patch_size
        mask = (pixels_B8SS[:, 3:4].float() + 1) / 2
        sums = F.conv2d(mask, torch.ones(1, 1, side, side, device=mask.device), stride=side).flatten(1)
        bias = torch.zeros_like(sums).masked_fill_(sums < 1e-5, float("-inf"))
        bias[torch.isinf(bias).all(dim=1)] = float("nan")
        return bias[:, None, None].to(pixels_B8SS.dtype)


class _Group2x2(nn.Module):
    """Patches (B, N, C) -> groups of 2 x 2, (B, T, 4C), in column-major order, as the reference leaves them.

    An odd grid first gets a row of zeros at the bottom and a column of zeros at the right.
    """

    def forward(self, x: Tensor) -> Tensor:
        batch, num, size = x.shape
        grid = int(num**0.5)
        x = F.pad(x.view(batch, grid, grid, size), (0, 0, 0, grid % 2, 0, grid % 2))
        half = (grid + 1) // 2
        x = x.view(batch, half, 2, half, 2, size).permute(0, 3, 1, 2, 4, 5)
        return x.reshape(batch, half * half, 4 * size)


class Projector(nn.Module):
    """Vision features (B, N, C) -> rows of the language model (B, T, D)."""

    def __init__(self, config: DamConfig) -> None:
        super().__init__()
        inner, size = 4 * config.vision.hidden_size, config.llm.hidden_size
        self.layers = nn.Sequential(
            _Group2x2(), nn.LayerNorm(inner), nn.Linear(inner, size), nn.GELU(), nn.Linear(size, size)
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x)
        return out
