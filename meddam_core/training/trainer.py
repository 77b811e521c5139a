"""One optimizer step after another: the plain loop that one process runs by itself and Ray Train runs in each worker.

    trainer = Trainer(dam, settings)
    while trainer.step < settings.schedule.max_steps:
        loss = trainer.train_step(micro_batches)

Invariants:
- a step's gradient is that of the mean over all its targets, however they are divided over micro-batches and workers;
- the state is what `state()` returns and nothing else: a loop that is killed and loads it goes on as it would have.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from meddam_core.dam.model import Dam
from meddam_core.training.batch import Batch
from meddam_core.training.loss import CaptionLoss
from meddam_core.training.optim import Schedule, make_optimizer, set_learning_rate

STATE_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How steps are made."""

    schedule: Schedule
    max_grad_norm: float = 1.0
    checkpointing: bool = False
    """Compute layers again in the backward pass instead of keeping what is between them."""
    autocast: torch.dtype | None = None
    """Arithmetic in this type with float32 weights; None: all in float32."""


def identity(module: nn.Module) -> nn.Module:
    """The wrapper of a single process."""
    return module


def alone(values: Tensor) -> Tensor:
    """The sum over all workers, where there is one."""
    return values


class Trainer:
    """A model in training.

    Args:
        dam: already adapted (meddam_core.training.adapt), on its device.
        settings: how steps are made.
        wrap: makes the loss module data-parallel; gradients come out averaged over the workers.
        all_sum: sums a tensor over all workers, in place of the argument.
        num_workers: that average their gradients.
        sharded_optimizer: each worker keeps a share of the optimizer's state (ZeRO stage 1).
    """

    def __init__(
        self, dam: Dam, settings: Settings, *, wrap: Callable[[nn.Module], nn.Module] = identity,
        all_sum: Callable[[Tensor], Tensor] = alone, num_workers: int = 1, sharded_optimizer: bool = False,
    ) -> None:  # fmt: skip
        self.dam, self.settings, self.step, self.num_shown = dam, settings, 0, 0
        loss = CaptionLoss(dam, checkpointing=settings.checkpointing, autocast=settings.autocast)
        self._loss = wrap(loss.train())
        self._all_sum, self._num_workers = all_sum, num_workers
        self._sharded = sharded_optimizer
        self.optimizer = make_optimizer(self._loss, settings.schedule, sharded=sharded_optimizer)

    def train_step(self, batches: Sequence[Batch]) -> float:
        """One step over this worker's micro-batches. Returns the mean loss of a target, over all workers.

        Raises FloatingPointError where that is not finite; the weights then are those of the step before.
        """
        device = self.dam.device
        counted = torch.tensor([float(sum(b.num_targets for b in batches))], device=device)
        num_targets = float(self._all_sum(counted)[0])
        total = torch.zeros(1, device=device)
        self.optimizer.zero_grad(set_to_none=True)
        for number, batch in enumerate(batches):
            with self._syncing(number == len(batches) - 1):
                loss = self._loss(batch)
                (loss * (self._num_workers / num_targets)).backward()
            total += loss.detach()
        mean = float(self._all_sum(total)[0]) / num_targets
        norm = torch.nn.utils.clip_grad_norm_(self.trained_parameters(), self.settings.max_grad_norm)
        if not torch.isfinite(norm) or mean != mean:
            raise FloatingPointError(
                f"step {self.step}: the loss is {mean}, its gradient {float(norm)}; lower the learning rate"
            )
        set_learning_rate(self.optimizer, self.settings.schedule.at(self.step))
        self.optimizer.step()
        self.step += 1
        self.num_shown += sum(len(b.ids_BL) for b in batches)
        return mean

    def _syncing(self, last: bool) -> Any:
        """Gradients are exchanged once a step, with its last micro-batch."""
        no_sync = getattr(self._loss, "no_sync", None)
        return contextlib.nullcontext() if last or no_sync is None else no_sync()

    def trained_parameters(self) -> list[nn.Parameter]:
        """What the optimizer moves."""
        return [p for p in self._loss.parameters() if p.requires_grad]

    def state(self) -> bytes:
        """Step, trained weights and optimizer, as one document. With a sharded optimizer all workers must call it."""
        if self._sharded:
            self.optimizer.consolidate_state_dict(to=0)  # type: ignore[attr-defined]
            if torch.distributed.get_rank() != 0:
                return b""
        names = {id(p): n for n, p in self.dam.named_parameters()}
        weights = {names[id(p)]: p.detach().cpu() for p in self.trained_parameters() if id(p) in names}
        sink = io.BytesIO()
        torch.save(
            {"version": STATE_VERSION, "step": self.step, "num_shown": self.num_shown, "weights": weights,
             "optimizer": self.optimizer.state_dict()},
            sink,
        )  # fmt: skip
        return sink.getvalue()

    def load_state(self, document: bytes) -> None:
        """Goes on from a state. Raises ValueError for one of another model or version."""
        state: Mapping[str, Any] = torch.load(io.BytesIO(document), map_location="cpu", weights_only=True)
        trained = {n: p for n, p in self.dam.named_parameters() if p.requires_grad}
        differing = sorted(set(trained) ^ set(state["weights"]))
        if state.get("version") != STATE_VERSION or differing:
            raise ValueError(f"the saved state is of another model, or trains other weights: {differing[:5]}")
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(state["weights"][name])
        self.optimizer.load_state_dict(dict(state["optimizer"]))
        self.step, self.num_shown = int(state["step"]), int(state["num_shown"])
