"""DAM, the network: a focal prompt in, projected visual tokens out, and the language model that reads them.

    dam = load_dam("checkpoints/DAM-3B")
    tokens_MTD = dam.encode(torch.from_numpy(views_M8SS))
    rows_LD = dam.merge(dam.tokenizer.encode_prompt(query), tokens_MTD)

Follows NVlabs/describe-anything (commit 153ad3d), not the paper, where the two differ: the weights were trained with
the code. Views go in as uint8; they are normalised here, on the device, to the same float32 values as the reference.

Axes: M views, 8 channels (full RGB and mask, focal RGB and mask), S pixels a side, N patches, C vision hidden size,
T tokens a view, D language model hidden size, L prompt positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from meddam_core.dam.architecture import DamConfig, ViewConfig
from meddam_core.dam.llm import Llama
from meddam_core.dam.tokens import IMAGE_TOKEN_ID, Tokenizer
from meddam_core.dam.vision import ContextProvider, Projector, VisionTower


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionStages:
    """Every intermediate of the vision side; names and shapes as in the oracle's files. F of the M views are focal."""

    input8: Tensor
    """(M, 8, S, S) normalised pixels."""
    is_cimage: Tensor
    """(M,) bool: the views whose focal crop differs from the full image, which take the adapter route."""
    embed_global: Tensor
    """(M, N, C)"""
    embed_focal: Tensor
    """(F, N, C)"""
    vis_global: Tensor
    """(M, N, C)"""
    ctx_out: Tensor
    """(F, N, C)"""
    proj_in: Tensor
    """(M, N, C)"""
    proj_out: Tensor
    """(M, T, D)"""


def _normalised_values(view: ViewConfig) -> Tensor:
    """(8, 256) float32: what each uint8 value becomes in each channel.

    In the order of roundings of the reference's image processor: the product in float64, then float32 throughout.
    """
    scaled = (np.arange(256) * view.rescale_factor).astype(np.float32)
    channels = [
        (scaled - np.float32(mean)) / np.float32(std)
        for mean, std in zip((*view.mean, view.mean[0]), (*view.std, view.std[0]), strict=True)
    ]
    return torch.from_numpy(np.stack(channels * 2))


class Dam(nn.Module):
    """The four components under their folder names. `tokenizer` may be absent where only shapes are wanted."""

    def __init__(self, config: DamConfig, tokenizer: Tokenizer | None = None) -> None:
        super().__init__()
        self.config = config
        self._tokenizer = tokenizer
        vocab_size = config.llm.vocab_size if tokenizer is None else min(config.llm.vocab_size, len(tokenizer))
        self.llm = Llama(config.llm, vocab_size)
        self.vision_tower = VisionTower(config.vision, config.num_used_layers)
        self.mm_projector = Projector(config)
        self.context_provider = ContextProvider(config.context, config.vision.hidden_size)
        self._values_8x256 = _normalised_values(config.view)

    @property
    def tokenizer(self) -> Tokenizer:
        """Raises ValueError for a model that was built without one."""
        if self._tokenizer is None:
            raise ValueError("this DAM was built without a tokenizer; pass one to random_dam, or load a checkpoint")
        return self._tokenizer

    @property
    def device(self) -> torch.device:
        return self.llm.model.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.llm.model.embed_tokens.weight.dtype

    def normalise(self, views_M8SS: Tensor) -> Tensor:
        """uint8 views -> the network's input, (M, 8, S, S), on the model's device and in its dtype."""
        self._check_views(views_M8SS)
        if self._values_8x256.device != self.device:
            self._values_8x256 = self._values_8x256.to(self.device)
        values, index = self._values_8x256.to(self.dtype), views_M8SS.to(self.device).int()
        if bool((values == values[0]).all()):  # as in every published preprocessor: mean and std are the same for all
            return values[0].index_select(0, index.flatten()).view(index.shape)
        index += 256 * torch.arange(8, device=self.device, dtype=torch.int32)[:, None, None]
        return values.flatten().index_select(0, index.flatten()).view(index.shape)

    def _check_views(self, views: Tensor) -> None:
        size = self.config.view_size
        if views.dtype != torch.uint8 or views.ndim != 4 or views.shape[1:] != (8, size, size):
            raise ValueError(
                f"views are {views.dtype} {tuple(views.shape)}; this checkpoint takes uint8 (M, 8, {size}, {size}), "
                "as meddam_core.focal.focal_views makes them"
            )

    def encode(self, views_M8SS: Tensor) -> Tensor:
        """uint8 views -> projected visual tokens (M, T, D). Views may belong to any number of requests."""
        return self.vision_stages(views_M8SS).proj_out

    def vision_stages(self, views_M8SS: Tensor) -> VisionStages:
        """The vision side, with all its intermediates. Raises ValueError for views of another shape or dtype."""
        input8 = self.normalise(views_M8SS)
        context = self.config.context
        differs = (views_M8SS[:, :4] != views_M8SS[:, 4:]).flatten(1).any(dim=1).to(self.device)
        is_cimage = torch.ones_like(differs) if context.treat_image_as_cimage else differs
        pixels = torch.cat((input8[:, 4:], input8[:, :4]), dim=1) if context.context_image_as_queries else input8

        embed_global = self.vision_tower.embed(pixels[:, :4])
        vis_global = self.vision_tower.run(embed_global)
        all_focal = bool(is_cimage.all())
        focal = pixels if all_focal else pixels[is_cimage]
        embed_focal = self.vision_tower.embed(focal[:, 4:])
        if len(focal):
            adapters: Sequence[nn.Module] = list(self.context_provider.adapters)
            bias = self.context_provider.attention_bias(focal)
            context_BNC = vis_global if all_focal else vis_global[is_cimage]
            ctx_out = self.vision_tower.run(embed_focal, adapters, context_BNC, bias)
        else:
            ctx_out = embed_focal
        proj_in = ctx_out if all_focal else vis_global.masked_scatter(is_cimage[:, None, None], ctx_out)
        return VisionStages(
            input8=input8,
            is_cimage=is_cimage,
            embed_global=embed_global,
            embed_focal=embed_focal,
            vis_global=vis_global,
            ctx_out=ctx_out,
            proj_in=proj_in,
            proj_out=self.mm_projector(proj_in),
        )

    def merge(self, input_ids: Sequence[int], tokens_NTD: Tensor) -> Tensor:
        """Prompt ids with one IMAGE_TOKEN_ID a view, and the views' tokens -> embedding rows (L, D), in order.

        Raises ValueError if placeholders and views are not equally many.
        """
        ids = torch.tensor(input_ids, device=self.device)
        places = (ids == IMAGE_TOKEN_ID).nonzero().flatten().tolist()
        if len(places) != len(tokens_NTD):
            raise ValueError(f"the prompt has {len(places)} <image> places for {len(tokens_NTD)} views")
        text_rows = self.llm.embed(ids.clamp(min=0))
        pieces, start = [], 0
        for place, tokens_TD in zip(places, tokens_NTD, strict=True):
            pieces += [text_rows[start:place], tokens_TD.to(text_rows.dtype)]
            start = place + 1
        return torch.cat([*pieces, text_rows[start:]])

    def num_positions(self, input_ids: Sequence[int]) -> int:
        """L: the length of the merged prompt."""
        num_images = sum(i == IMAGE_TOKEN_ID for i in input_ids)
        return len(input_ids) + num_images * (self.config.num_image_tokens - 1)
