"""Views -> visual tokens, where workers gather layers together as they are run.

    tokens_BTD = encoded(dam, batch.views_B8SS, in_step=True)

Axes: B examples, 8 channels, S pixels a side, T image tokens, D hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from meddam_core.dam.model import Dam


def encoded(dam: Dam, views_B8SS: Tensor, *, in_step: bool = False) -> Tensor:
    """(B, T, D). With `in_step` every layer runs, also for views that would need no adapter."""
    return dam.encode(_with_a_crop(views_B8SS) if in_step else views_B8SS)[: len(views_B8SS)]


def _with_a_crop(views_B8SS: Tensor) -> Tensor:
    """Where no crop differs from its full view no adapter would run: then with one row more, that nobody reads."""
    if bool((views_B8SS[:, :4] != views_B8SS[:, 4:]).any()):
        return views_B8SS
    row = views_B8SS[:1].clone()
    row[:, 4] = 255 - row[:, 4]
    return torch.cat([views_B8SS, row])
