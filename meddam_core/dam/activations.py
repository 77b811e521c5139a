"""Activations whose value does not depend on where in a tensor an element lies.

torch's fused kernels compute the last elements of a tensor (and of each thread's share) by another routine than the
rest, which rounds differently: the same row would give other bits in another batch. On a CPU at inference these are
therefore composed of steps that are exact or position-independent (exp and tanh go through a vector library); composed
they are also faster for tensors that fit the cache. Elsewhere the fused kernels are used.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

_SQRT_2_OVER_PI = math.sqrt(2 / math.pi)


def gelu_tanh(x: Tensor) -> Tensor:
    """The tanh approximation of GELU, as SigLIP uses it."""
    if x.device.type != "cpu" or torch.is_grad_enabled():
        return F.gelu(x, approximate="tanh")
    inner = (x * x).mul_(0.044715 * _SQRT_2_OVER_PI).add_(_SQRT_2_OVER_PI).mul_(x)
    return inner.tanh_().add_(1).mul_(x).mul_(0.5)


def gated_silu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, as in Llama's MLP."""
    if gate.device.type != "cpu" or torch.is_grad_enabled():
        return F.silu(gate) * up
    return (gate * up).div_(gate.neg().exp_().add_(1))
