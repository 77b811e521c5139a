"""How several workers share a training step: what each keeps whole, what is dealt out, and what is exchanged.

| strategy     | weights    | gradients  | optimizer  |
|--------------|------------|------------|------------|
| Strategy     | here       | here       | here       |
| DataParallel | a copy     | a copy     | a copy, or a share (ZeRO stage 1) |
| FullyShard   | a share    | a share    | a share    |
| DeepSpeed    | a copy, or a share (stage 3) | a share | a share |

    trainer = Trainer(dam, settings, DataParallel(num_workers=4))

DeepSpeed is in meddam_core.training.deepspeed_zero. All but the first use torch's default process group.

Invariants:
- all make the same steps: the gradient is the mean over a step's targets, cut by its norm over all shares;
- what is saved is the same for all, by name and whole, so that a run goes on under another strategy or with other
  workers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from meddam_core.training.batch import Batch
from meddam_core.training.loss import CaptionLoss
from meddam_core.training.optim import Schedule, make_optimizer, set_learning_rate

Moments = dict[str, dict[str, Tensor]]
"""By parameter: Adam's `exp_avg`, `exp_avg_sq` and `step`, whole, on the CPU."""


class Strategy:
    """One process by itself: the plain loop."""

    num_workers = 1
    rank = 0
    whole = True
    """The model can be run outside a step, because each worker has all its weights."""
    in_step = False
    """Every worker must run every layer equally often, because layers are gathered as they are run."""

    optimizer: torch.optim.Optimizer

    def begin(self, loss: CaptionLoss, schedule: Schedule, max_grad_norm: float) -> None:
        """Takes a model over; the optimizer is made here, because some strategies replace the parameters."""
        self._max_grad_norm = max_grad_norm
        self.module = self._wrapped(loss)
        self.optimizer = self._optimizer(schedule)

    def _wrapped(self, loss: CaptionLoss) -> nn.Module:
        return loss

    def _optimizer(self, schedule: Schedule) -> torch.optim.Optimizer:
        return make_optimizer(self.module, schedule)

    def all_sum(self, values: Tensor) -> Tensor:
        """The sum of a tensor over all workers, in its place."""
        return values

    def accumulate(self, batch: Batch, scale: float, *, last: bool) -> Tensor:
        """Forward and backward of one micro-batch, its loss times `scale`. Returns the loss. Collective if `last`."""
        loss: Tensor = self.module(batch)
        (loss * scale).backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def finish(self, rate: float) -> float:
        """Cuts the gradient and moves the weights, unless it is not finite. Returns its norm before. Collective."""
        trained = [p for p in self.module.parameters() if p.requires_grad]
        for parameter in trained:  # no adapter ran, as no crop differed: zero, as where the model lies in shares
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        norm = float(_all_of(torch.nn.utils.clip_grad_norm_(trained, self._max_grad_norm)))
        if norm == norm and norm != float("inf"):
            set_learning_rate(self.optimizer, rate)
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def weight(self, parameter: nn.Parameter) -> Tensor:
        """A parameter, whole, on the CPU. Collective."""
        return _all_of(parameter.detach()).cpu()

    def moments(self, names: Mapping[int, str]) -> Moments:
        """What the optimizer remembers; `names` by id of the parameter. Collective; empty except on worker 0."""
        saved = self._saved_optimizer()
        order = [names[id(p)] for group in self.optimizer.param_groups for p in group["params"]]
        found = {order[i]: {k: _all_of(v).cpu() for k, v in state.items()} for i, state in saved.items()}
        return found if self.rank == 0 else {}

    def _saved_optimizer(self) -> dict[int, dict[str, Tensor]]:
        states: dict[int, dict[str, Tensor]] = self.optimizer.state_dict()["state"]
        return states

    def load(self, parameters: Mapping[str, nn.Parameter], weights: Mapping[str, Tensor], moments: Moments) -> None:
        """Sets what `weight` and `moments` gave, whichever strategy they came from."""
        with torch.no_grad():
            for name, value in weights.items():
                parameters[name].copy_(_share_like(value, parameters[name]))
        names = {id(p): n for n, p in parameters.items()}
        order = [p for group in self.optimizer.param_groups for p in group["params"]]
        states = {
            i: {k: _share_like(v, p) if v.ndim else v for k, v in moments[names[id(p)]].items()}
            for i, p in enumerate(order) if names[id(p)] in moments
        }  # fmt: skip
        groups, start = [], 0
        for group in self.optimizer.param_groups:
            indices = list(range(start, start + len(group["params"])))
            groups.append({**{k: v for k, v in group.items() if k != "params"}, "params": indices})
            start += len(indices)
        self.optimizer.load_state_dict({"state": states, "param_groups": groups})


class Together(Strategy):
    """Several workers in torch's default process group."""

    def __init__(self, num_workers: int) -> None:
        self.num_workers = num_workers
        self.rank = torch.distributed.get_rank()

    def all_sum(self, values: Tensor) -> Tensor:
        torch.distributed.all_reduce(values)
        return values


class DataParallel(Together):
    """A copy of the model in each worker; `sharded` deals the optimizer's state out (ZeRO stage 1)."""

    def __init__(self, num_workers: int, *, sharded: bool = False) -> None:
        super().__init__(num_workers)
        self._sharded = sharded

    def _wrapped(self, loss: CaptionLoss) -> nn.Module:
        from torch.nn.parallel import DistributedDataParallel

        # where no focal crop differs from its full view no adapter runs, and its gradient never comes
        return DistributedDataParallel(loss, find_unused_parameters=True)

    def _optimizer(self, schedule: Schedule) -> torch.optim.Optimizer:
        return make_optimizer(self.module, schedule, sharded=self._sharded)

    def accumulate(self, batch: Batch, scale: float, *, last: bool) -> Tensor:
        """Gradients are exchanged once a step, with its last micro-batch."""
        with contextlib.nullcontext() if last else self.module.no_sync():  # type: ignore[operator]
            return super().accumulate(batch, scale, last=last)

    def _saved_optimizer(self) -> dict[int, dict[str, Tensor]]:
        if self._sharded:
            self.optimizer.consolidate_state_dict(to=0)  # type: ignore[attr-defined]
            if self.rank != 0:
                return {}
        return super()._saved_optimizer()


class FullyShard(Together):
    """Weights, gradients and optimizer in shares (torch's FSDP): a layer is gathered when it runs, and let go after.

    Gradients are dealt out after each micro-batch, so that none is ever kept whole.
    """

    whole = False
    in_step = True

    def _wrapped(self, loss: CaptionLoss) -> nn.Module:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import FSDPModule, fully_shard

        device = loss.dam.device.type
        mesh = init_device_mesh(device, (self.num_workers,))
        for module in [*_layers(loss), loss]:
            fully_shard(module, mesh=mesh)
        for module in loss.modules():
            if isinstance(module, FSDPModule) and device == "cpu":
                module.set_force_sum_reduction_for_comms(True)  # gloo has no mean
        return loss


def _layers(loss: CaptionLoss) -> Iterable[nn.Module]:
    """What is gathered at once, the parts that never run too; all else belongs to the whole."""
    from meddam_core.training.adapt import dead_modules

    dam, used = loss.dam, loss.dam.config.num_used_layers
    yield from dam.llm.layers()
    yield from list(dam.vision_tower.vision_model.encoder.layers)[:used]
    yield from list(dam.context_provider.adapters)[:used]
    yield from dead_modules(dam)


def _all_of(tensor: Tensor) -> Tensor:
    """The whole of a tensor of which each worker has a share. Collective."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _share_like(value: Tensor, like: Tensor) -> Tensor:
    """This worker's share of a whole tensor, dealt out as another one is."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(like, DTensor):
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
