"""ZeRO stages 2 and 3 by DeepSpeed: gradients and optimizer in shares, in stage 3 the weights too.

    trainer = Trainer(dam, settings, DeepSpeed(num_workers=8, stage=3, num_micro_batches=4))

DeepSpeed's engine takes the loss module and a torch optimizer over. It is made with the first step or the first state,
whichever comes first, because a state is loaded into a model that is still whole; Adam's moments are then put into the
engine's flat shares. That uses internals of DeepSpeed, so other versions are refused.

On a CPU, DeepSpeed exchanges through gloo, for tests: slow, but the same steps.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from meddam_core.training.batch import Batch
from meddam_core.training.loss import CaptionLoss
from meddam_core.training.optim import Schedule, make_optimizer, set_learning_rate
from meddam_core.training.strategies import Moments, Together

VERSION = "0.19.8"
MOMENTS = ("exp_avg", "exp_avg_sq")


class DeepSpeed(Together):
    """A worker of ZeRO.

    Args:
        num_workers: in torch's default process group.
        stage: 2 keeps the weights whole in each worker, 3 deals them out.
        num_micro_batches: of a step.
    """

    in_step = True

    def __init__(self, num_workers: int, *, stage: Literal[2, 3], num_micro_batches: int) -> None:
        super().__init__(num_workers)
        import_deepspeed()
        self._stage, self._num_micro_batches = stage, num_micro_batches
        self.whole = stage == 2
        self._engine: Any = None

    def begin(self, loss: CaptionLoss, schedule: Schedule, max_grad_norm: float) -> None:
        self.module, self._schedule, self._max_grad_norm = loss, schedule, max_grad_norm

    def accumulate(self, batch: Batch, scale: float, *, last: bool) -> Tensor:
        engine = self._started()
        engine.set_gradient_accumulation_boundary(is_boundary=last)
        loss: Tensor = engine(batch)
        kept = loss.detach().clone()
        engine.backward(loss * scale, scale_wrt_gas=False)
        if not last:
            engine.step()  # counts the micro-batch, moves nothing
        return kept

    def finish(self, rate: float) -> float:
        """The engine cuts and steps in one; a gradient that is not finite moves nothing."""
        engine = self._started()
        set_learning_rate(engine.optimizer.optimizer, rate)
        engine.step()
        norm = engine.get_global_grad_norm()
        return float("nan") if norm is None else float(norm)

    def weight(self, parameter: nn.Parameter) -> Tensor:
        if self._stage == 2:
            return parameter.detach().cpu()
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([parameter]):
            return parameter.detach().cpu().clone()

    def moments(self, names: Mapping[int, str]) -> Moments:
        from deepspeed.utils import safe_get_full_optimizer_state

        found: Moments = {}
        if not any(self._inner.state.get(flat) for flat in self._flats()):
            return found
        self._link()
        for parameter in self._started().module.parameters():
            if id(parameter) not in names:
                continue
            kept = {key: safe_get_full_optimizer_state(parameter, key).cpu().clone() for key in MOMENTS}
            if self.rank == 0:
                found[names[id(parameter)]] = {"step": self._num_steps(), **kept}
        return found

    def load(self, parameters: Mapping[str, nn.Parameter], weights: Mapping[str, Tensor], moments: Moments) -> None:
        """Raises RuntimeError after the first step: the weights are no longer whole then."""
        if self._engine is not None:
            raise RuntimeError("a state is loaded before the first step")
        with torch.no_grad():
            for name, value in weights.items():
                parameters[name].copy_(value)
        self._started()
        steps = [kept["step"] for kept in moments.values()]
        if not steps:
            return
        self._remember(max(float(s) for s in steps))
        for name, kept in moments.items():
            for key in MOMENTS:
                self._set_moment(parameters[name], kept[key].to(self._device), key)

    def _set_moment(self, parameter: nn.Parameter, value: Tensor, key: str) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        if self._stage == 2:
            safe_set_full_optimizer_state(parameter, value, key)
            return
        num_here = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
        flat = value.new_zeros(num_here * self.num_workers)  # a share that the parameter does not fill is padded
        flat[: value.numel()] = value.flatten()
        safe_set_local_optimizer_state(parameter, flat[self.rank * num_here : (self.rank + 1) * num_here], key)

    # -- inside the engine --------------------------------------------------------------------------------------------

    def _started(self) -> Any:
        if self._engine is None:
            deepspeed = import_deepspeed()
            self._device = next(self.module.parameters()).device
            optimizer = make_optimizer(self.module, self._schedule)
            self._engine, *_ = deepspeed.initialize(
                model=self.module, optimizer=optimizer, dist_init_required=False,
                config=engine_config(self._stage, self.num_workers, self._num_micro_batches, self._max_grad_norm),
            )  # fmt: skip
        return self._engine

    @property
    def _inner(self) -> torch.optim.Optimizer:
        """Torch's optimizer, over the engine's flat shares."""
        inner: torch.optim.Optimizer = self._started().optimizer.optimizer
        return inner

    def _flats(self) -> list[Tensor]:
        zero = self._started().optimizer
        found: list[Tensor] = (
            zero.single_partition_of_fp32_groups if self._stage == 2 else zero.fp32_partitioned_groups_flat
        )
        return found

    def _num_steps(self) -> Tensor:
        steps = [float(s["step"]) for flat in self._flats() if (s := self._inner.state.get(flat))]
        return torch.tensor(max(steps))

    def _remember(self, num_steps: float) -> None:
        """Makes room for Adam's moments, which torch would make with the first step."""
        for flat in self._flats():
            self._inner.state[flat] = {
                "step": torch.tensor(num_steps, device=flat.device), **{k: torch.zeros_like(flat) for k in MOMENTS}
            }  # fmt: skip
        self._link()

    def _link(self) -> None:
        """Stage 2 finds moments by parameter once they are linked; by itself it links before all groups have them."""
        if self._stage == 2:
            zero = self._started().optimizer
            zero._hp_optimizer_states_linked = False
            zero._lazy_init_hp_params_optimizer_state()


def engine_config(stage: int, num_workers: int, num_micro_batches: int, max_grad_norm: float) -> dict[str, Any]:
    """DeepSpeed's configuration: float32 weights and exchange, as everywhere here; autocast is the loss module's."""
    return {
        "train_micro_batch_size_per_gpu": 1,  # the engine only counts them
        "gradient_accumulation_steps": num_micro_batches,
        "train_batch_size": num_workers * num_micro_batches,
        "gradient_clipping": max_grad_norm,
        "zero_optimization": {
            "stage": stage, "overlap_comm": torch.cuda.is_available(), "contiguous_gradients": True,
            "stage3_gather_16bit_weights_on_model_save": False,
        },
        "steps_per_print": 10**9,
    }  # fmt: skip


def import_deepspeed() -> Any:
    """The library. Raises ValueError where it is missing or another version."""
    try:
        import deepspeed
    except ImportError as error:
        raise ValueError(
            f"--strategy deepspeed needs DeepSpeed: pip install deepspeed=={VERSION}, or use --strategy fsdp"
        ) from error
    if deepspeed.__version__.split("+")[0] != VERSION:
        raise ValueError(
            f"--strategy deepspeed was written for DeepSpeed {VERSION}, and {deepspeed.__version__} is installed"
        )
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if not torch.cuda.is_available():
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else compiled by each worker; gloo does
    return deepspeed
