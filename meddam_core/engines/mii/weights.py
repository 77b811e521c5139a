"""The language model's weights, handed from DAM to FastGen without a second full copy.

FastGen stores a layer's q, k and v as one matrix and its gate and up rows in turns, so its weights are copies. Handing
over goes one parameter at a time and empties DAM's own as it goes: the peak is the weights and one layer.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from deepspeed.inference.v2.checkpoint.base_engine import CheckpointEngineBase
from torch import Tensor, nn


class Handover(CheckpointEngineBase):  # type: ignore[misc]
    """A FastGen "checkpoint" that takes the parameters out of a live module. The module is empty afterwards.

    Args:
        llm: parameters named as in Hugging Face's LlamaForCausalLM.
        keep: leave the module's own parameters in place, where a second copy is wanted.
    """

    def __init__(self, llm: nn.Module, *, device: torch.device, dtype: torch.dtype, keep: bool = False) -> None:
        self._llm = llm
        self._device = device
        self._dtype = dtype
        self._keep = keep

    @torch.no_grad()
    def parameters(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) on the engine's device, in its dtype; a tied output layer is yielded as well."""
        named = dict(self._llm.named_parameters(remove_duplicate=False))
        for name in list(named):
            parameter = named.pop(name)
            yield name, parameter.detach().to(self._device, self._dtype)
            shared = any(other is parameter for other in named.values())
            if not (self._keep or shared):
                parameter.data = torch.empty(0, dtype=parameter.dtype, device=parameter.device)
