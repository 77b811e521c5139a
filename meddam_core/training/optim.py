"""The optimizer and its learning rate: AdamW, warm-up, then half a cosine.

Norms, biases, embeddings and gates are not decayed; the gates learn faster, because they start at zero and nothing of
the full view gets through until they have moved.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

BETAS = (0.9, 0.98)
GATES = ("attn_factor", "mlp_factor")


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """How fast to learn, by step."""

    learning_rate: float
    warmup_steps: int
    max_steps: int
    final_share: float = 0.02
    """Of the learning rate, at the last step."""
    gate_scale: float = 5.0
    """The gates' learning rate over that of the rest."""
    weight_decay: float = 0.01

    def at(self, step: int) -> float:
        """The learning rate of step number `step`, counted from 0."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        share = min((step - self.warmup_steps) / max(self.max_steps - self.warmup_steps, 1), 1.0)
        cosine = 0.5 * (1 + math.cos(math.pi * share))
        return self.learning_rate * (self.final_share + (1 - self.final_share) * cosine)


def make_optimizer(module: nn.Module, schedule: Schedule, *, sharded: bool = False) -> torch.optim.Optimizer:
    """AdamW over what is trained, in three groups: decayed, not decayed, gates. Raises ValueError if nothing is.

    `sharded` spreads its state over the workers of the default process group.
    """
    groups = {group: [p for _, p in found] for group, found in _grouped(module).items()}
    if not any(groups.values()):
        raise ValueError("no parameter is to be trained")
    settings: Mapping[str, Mapping[str, Any]] = {
        "decayed": {"weight_decay": schedule.weight_decay, "scale": 1.0},
        "plain": {"weight_decay": 0.0, "scale": 1.0},
        "gates": {"weight_decay": 0.0, "scale": schedule.gate_scale},
    }
    chosen = [{"params": found, **settings[name]} for name, found in groups.items() if found]
    if sharded:
        from torch.distributed.optim import ZeroRedundancyOptimizer

        return ZeroRedundancyOptimizer(
            chosen, torch.optim.AdamW, lr=schedule.learning_rate, betas=BETAS, fused=True
        )  # fmt: skip
    return torch.optim.AdamW(chosen, lr=schedule.learning_rate, betas=BETAS, fused=True)


def parameter_order(module: nn.Module) -> list[str]:
    """The names of what is trained, as `make_optimizer` counts them."""
    return [name for found in _grouped(module).values() for name, _ in found]


def _grouped(module: nn.Module) -> dict[str, list[tuple[str, nn.Parameter]]]:
    groups: dict[str, list[tuple[str, nn.Parameter]]] = {"decayed": [], "plain": [], "gates": []}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            groups[_group(name, parameter)].append((name, parameter))
    return groups


def _group(name: str, parameter: nn.Parameter) -> str:
    if name.endswith(GATES):
        return "gates"
    embeds = "embed_tokens" in name or "position_embedding" in name
    return "plain" if parameter.ndim < 2 or embeds else "decayed"


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Sets every group's rate, each by its scale."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["scale"]
