"""Training in plain PyTorch, in one process, that shares no code with the trainer: the yardstick of its losses.

Two micro-batches a step, warm-up of 4 steps, cosine to 2 % at step 20.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from meddam_core.dam.model import Dam
from meddam_core.dam.tokens import IMAGE_TOKEN_ID
from meddam_core.training.batch import IGNORED, Batch

RATE = 1e-4
"""Adam turns roundings of near-zero gradients into whole steps: at 5e-4 the two loops part after ten of them."""


def plain_losses(dam: Dam, given: Sequence[Batch], num_steps: int) -> list[float]:
    """Plain PyTorch that shares no code with the trainer: one mean over all tokens of a step, AdamW, cosine."""
    named = [(n, p) for n, p in dam.named_parameters() if p.requires_grad]

    def special(n: str, p: torch.nn.Parameter) -> bool:
        return p.ndim < 2 or "embed_tokens" in n or "position_embedding" in n

    gates = [p for n, p in named if n.endswith("_factor")]
    plain = [p for n, p in named if special(n, p) and not n.endswith("_factor")]
    decayed = [p for n, p in named if not special(n, p)]
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": plain, "weight_decay": 0.0},
              {"params": gates, "weight_decay": 0.0}]  # fmt: skip
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98))
    losses = []
    for step in range(num_steps):
        both = given[2 * step : 2 * step + 2]
        logits, targets = [], []
        for batch in both:
            tokens_BTD = dam.encode(batch.views_B8SS)
            for ids, goal, tokens in zip(batch.ids_BL, batch.targets_BL, tokens_BTD, strict=True):
                text = dam.llm.embed(ids.clamp(min=0))
                places = (ids == IMAGE_TOKEN_ID).nonzero().flatten()
                rows = torch.cat([text[: places[0]], tokens, text[places[-1] + 1 :]])
                hidden, _ = dam.llm(rows[None])
                logits.append(dam.llm.logits(hidden[0]))
                targets.append(goal)
        loss = F.cross_entropy(torch.cat(logits), torch.cat(targets), ignore_index=IGNORED)
        optimizer.zero_grad(set_to_none=False)  # what did not run in a step has a gradient of zero, not none
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for _, p in named], 1.0)
        cosine = 0.5 * (1 + math.cos(math.pi * (step - 4) / 16))
        rate = RATE * ((step + 1) / 4 if step < 4 else 0.02 + 0.98 * cosine)
        for group in optimizer.param_groups:
            group["lr"] = rate * (5 if group["params"] is gates or group is optimizer.param_groups[2] else 1)
        optimizer.step()
        losses.append(loss.item())
    return losses
