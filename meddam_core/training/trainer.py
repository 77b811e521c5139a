"""One optimizer step after another: the plain loop that one process runs by itself and Ray Train runs in each worker.

    trainer = Trainer(dam, settings)
    while trainer.step < settings.schedule.max_steps:
        loss = trainer.train_step(micro_batches)

Invariants:
- a step's gradient is that of the mean over all its targets, however they are divided over micro-batches and workers;
- the state is what `state()` returns and nothing else: a loop that is killed and loads it goes on as it would have.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from meddam_core.dam.model import Dam
from meddam_core.training.batch import Batch
from meddam_core.training.loss import CaptionLoss
from meddam_core.training.optim import Schedule, parameter_order
from meddam_core.training.strategies import Moments, Strategy

STATE_VERSION = 2
"""1 kept the optimizer's state by number, as torch does; it is still read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How steps are made."""

    schedule: Schedule
    max_grad_norm: float = 1.0
    checkpointing: bool = False
    """Compute layers again in the backward pass instead of keeping what is between them."""
    autocast: torch.dtype | None = None
    """Arithmetic in this type with float32 weights; None: all in float32."""


class Trainer:
    """A model in training.

    Args:
        dam: already adapted (meddam_core.training.adapt), on its device.
        settings: how steps are made.
        strategy: how several workers share a step; by default there is one.
    """

    def __init__(self, dam: Dam, settings: Settings, strategy: Strategy | None = None) -> None:
        self.dam, self.settings, self.step, self.num_shown = dam, settings, 0, 0
        self.strategy = strategy if strategy is not None else Strategy()
        loss = CaptionLoss(
            dam, checkpointing=settings.checkpointing, autocast=settings.autocast, in_step=self.strategy.in_step
        )
        self._order = parameter_order(dam)
        self.strategy.begin(loss.train(), settings.schedule, settings.max_grad_norm)

    def train_step(self, batches: Sequence[Batch]) -> float:
        """One step over this worker's micro-batches. Returns the mean loss of a target, over all workers.

        Raises FloatingPointError where that is not finite; the weights then are those of the step before.
        """
        device, strategy = self.dam.device, self.strategy
        counted = torch.tensor([float(sum(b.num_targets for b in batches))], device=device)
        num_targets = float(strategy.all_sum(counted)[0])
        total = torch.zeros(1, device=device)
        scale = strategy.num_workers / num_targets  # gradients come out averaged over the workers
        for number, batch in enumerate(batches):
            total += strategy.accumulate(batch, scale, last=number == len(batches) - 1)
        mean = float(strategy.all_sum(total)[0]) / num_targets
        norm = strategy.finish(self.settings.schedule.at(self.step))
        if norm != norm or norm == float("inf") or mean != mean:
            raise FloatingPointError(
                f"step {self.step}: the loss is {mean}, its gradient {norm}; lower the learning rate"
            )
        self.step += 1
        self.num_shown += sum(len(b.ids_BL) for b in batches)
        return mean

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """What the optimizer moves, by name."""
        return {n: p for n, p in self.dam.named_parameters() if p.requires_grad}

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """(name, whole tensor on the CPU) of every parameter, trained or not. All workers must go through it."""
        for name, parameter in self.dam.named_parameters():
            yield name, self.strategy.weight(parameter)

    def state(self) -> bytes:
        """Step, trained weights and optimizer, as one document; empty except on worker 0. All workers must call it."""
        trained = self.trained_parameters()
        weights: dict[str, Tensor] = {}
        for name, parameter in trained.items():
            whole = self.strategy.weight(parameter)
            if self.strategy.rank == 0:
                weights[name] = whole
        moments = self.strategy.moments({id(p): n for n, p in trained.items()})
        if self.strategy.rank != 0:
            return b""
        sink = io.BytesIO()
        torch.save(
            {"version": STATE_VERSION, "step": self.step, "num_shown": self.num_shown, "weights": weights,
             "moments": moments},
            sink,
        )  # fmt: skip
        return sink.getvalue()

    def load_state(self, document: bytes) -> None:
        """Goes on from a state, whichever strategy wrote it. Raises ValueError for one of another model or version."""
        state: Mapping[str, Any] = torch.load(io.BytesIO(document), map_location="cpu", weights_only=True)
        trained = self.trained_parameters()
        differing = sorted(set(trained) ^ set(state["weights"]))
        if state.get("version") not in (1, STATE_VERSION) or differing:
            raise ValueError(f"the saved state is of another model, or trains other weights: {differing[:5]}")
        moments: Moments = state["moments"] if state["version"] == STATE_VERSION else {
            self._order[i]: kept for i, kept in state["optimizer"]["state"].items()
        }  # fmt: skip
        self.strategy.load(trained, state["weights"], moments)
        self.step, self.num_shown = int(state["step"]), int(state["num_shown"])
