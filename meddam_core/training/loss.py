"""The loss: minus the log-probability of the caption's tokens, given the prompt and the views.

    total = CaptionLoss(dam)(batch)            # summed over tokens
    (total / num_targets_of_all_workers).backward()

Sums, not means, leave a batch's loss independent of how it is divided over micro-batches and workers.

Axes: B examples, L positions, T image tokens a view, D hidden size, V vocabulary.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from meddam_core.dam.model import Dam
from meddam_core.dam.tokens import IMAGE_TOKEN_ID
from meddam_core.training.batch import IGNORED, Batch
from meddam_core.training.encode import encoded
from meddam_core.training.labels import labels_loss


class CaptionLoss(nn.Module):
    """A DAM with its loss, as one module, so that data-parallel wrappers can hold it.

    `in_step` runs every layer for every batch, for workers that gather layers together as they are run.
    """

    def __init__(
        self, dam: Dam, *, checkpointing: bool = False, autocast: torch.dtype | None = None, in_step: bool = False
    ) -> None:
        super().__init__()
        self.dam = dam
        self._autocast, self._in_step = autocast, in_step
        if checkpointing:
            for layer in [*dam.llm.layers(), *dam.vision_tower.vision_model.encoder.layers]:
                _recompute(layer, autocast)

    def forward(self, batch: Batch) -> Tensor:
        """The summed loss of a batch, of captions or of labels, float32 scalar."""
        device = self.dam.device
        with (
            torch.autocast(device.type, dtype=self._autocast, enabled=self._autocast is not None),
            _attention(device, self._autocast),
        ):
            loss = caption_loss if batch.codes_BK is None else labels_loss
            return loss(self.dam, batch.to(device), in_step=self._in_step)


def caption_loss(dam: Dam, batch: Batch, *, in_step: bool = False) -> Tensor:
    """Summed cross-entropy of the targets. Each row of `batch` holds one view."""
    tokens_BTD = encoded(dam, batch.views_B8SS, in_step=in_step)
    is_image_BL = batch.ids_BL == IMAGE_TOKEN_ID
    rows_BLD = dam.llm.embed(batch.ids_BL.clamp(min=0)).to(tokens_BTD.dtype)
    rows_BLD = rows_BLD.masked_scatter(is_image_BL[..., None], tokens_BTD)
    hidden_BLD, _ = dam.llm(rows_BLD)
    learnt_BL = batch.targets_BL != IGNORED
    logits_NV = dam.llm.logits(hidden_BLD[learnt_BL])  # only where something is learnt: a third of the positions
    return F.cross_entropy(logits_NV.float(), batch.targets_BL[learnt_BL], reduction="sum")


def _attention(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[None]:
    """In bfloat16 on a CPU the composed kernel: the fused one's backward pass takes three times as long there."""
    if device.type == "cpu" and dtype is torch.bfloat16:
        return sdpa_kernel(SDPBackend.MATH)
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


def _recompute(layer: nn.Module, dtype: torch.dtype | None) -> None:
    """Makes a layer keep only its inputs for the backward pass, and compute the rest again."""
    forward = layer.forward

    def same_kernels(*args: object) -> object:
        with _attention(next(layer.parameters()).device, dtype):  # the backward pass is outside the module's own choice
            return forward(*args)

    def recomputed(*args: object) -> object:
        if not torch.is_grad_enabled():
            return forward(*args)
        return checkpoint(same_kernels, *args, use_reentrant=False)

    layer.forward = recomputed
