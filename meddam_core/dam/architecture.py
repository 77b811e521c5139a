"""The dimensions and switches of a DAM, as plain values. meddam_core.dam.config reads them from a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class LlmConfig:
    """Llama: pre-norm, grouped-query attention, unscaled rotary positions, SwiGLU, no biases."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 2048
    tokenizer_model_max_length: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionConfig:
    """SigLIP's vision tower with one mask channel beside RGB."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    image_size: int
    patch_size: int
    layer_norm_eps: float = 1e-6

    @property
    def grid(self) -> int:
        """Patches along a side; pixels beyond the last whole patch are dropped."""
        return self.image_size // self.patch_size


@dataclass(frozen=True, slots=True, kw_only=True)
class ContextConfig:
    """The adapters after every vision layer that let the focal view look at the global one."""

    num_layers: int
    num_heads: int
    intermediate_size: int
    patch_size: int
    layer_norm_eps: float = 1e-6
    zero_init_output: bool = True
    """Whether the gates are parameters; without them both are 1."""
    context_image_as_queries: bool = False
    """Swap the roles of full image and focal crop."""
    masked_cross_attn: bool = False
    """Attend only to patches of the full image that the mask touches."""
    treat_image_as_cimage: bool = False
    """Take the adapter route even where focal crop and full image are equal."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ViewConfig:
    """uint8 -> network input: (x * rescale_factor - mean) / std; the mask channel uses the first channel's numbers."""

    size: int
    """S: the side of the square views, pixels."""
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    rescale_factor: float = 1 / 255


@dataclass(frozen=True, slots=True, kw_only=True)
class DamConfig:
    """All that is needed to build the network; `files` are the JSON documents it was read from, by relative path."""

    llm: LlmConfig
    vision: VisionConfig
    context: ContextConfig
    view: ViewConfig
    select_layer: int = -2
    """Index into [embeddings, after layer 0, ..., after the last layer] of the features that are used."""
    files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, compare=False)

    @property
    def view_size(self) -> int:
        """S: the side of the 8-channel input, pixels."""
        return self.view.size

    @property
    def num_image_tokens(self) -> int:
        """T: tokens a view takes in the prompt, after the 2x2 grouping of an (odd, zero-padded) grid."""
        return ((self.vision.grid + 1) // 2) ** 2

    @property
    def num_used_layers(self) -> int:
        """Vision layers whose output matters; the rest of the tower is never run."""
        return self.select_layer if self.select_layer >= 0 else self.vision.num_layers + 1 + self.select_layer

    @property
    def context_length(self) -> int:
        """Positions that prompt, image tokens and caption may take together."""
        limit = self.llm.tokenizer_model_max_length
        return self.llm.max_position_embeddings if limit is None else min(limit, self.llm.max_position_embeddings)
