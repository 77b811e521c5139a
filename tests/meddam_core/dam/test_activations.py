"""Activations equal torch's, and do not depend on where an element lies."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from meddam_core.dam.activations import gated_silu, gelu_tanh


def test_values_are_torchs() -> None:
    x = torch.cat((torch.linspace(-40, 40, 4001), torch.tensor([-1e30, -0.0, 0.0, 1e30])))
    up = torch.linspace(3, -2, len(x))
    with torch.inference_mode():
        assert torch.allclose(gelu_tanh(x), F.gelu(x, approximate="tanh"), rtol=1e-6, atol=1e-6)
        assert torch.allclose(gated_silu(x, up), F.silu(x) * up, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("width", [56, 81, 176])
def test_a_row_is_the_same_in_any_batch(width: int) -> None:
    x = torch.randn(61, 2 * width, generator=torch.Generator().manual_seed(0)) * 3
    gate, up = x.chunk(2, dim=-1)
    with torch.inference_mode():
        smooth, gated = gelu_tanh(gate.contiguous()), gated_silu(gate, up)
        for start, stop in ((0, 1), (3, 4), (0, 7), (20, 61)):
            assert torch.equal(gelu_tanh(gate[start:stop].contiguous()), smooth[start:stop])
            assert torch.equal(gated_silu(gate[start:stop], up[start:stop]), gated[start:stop])


def test_inputs_are_not_changed_and_gradients_flow() -> None:
    x = torch.randn(10)
    before = x.clone()
    with torch.inference_mode():
        gelu_tanh(x)
        gated_silu(x, x)
    assert torch.equal(x, before)
    y = x.requires_grad_()
    (gelu_tanh(y) + gated_silu(y, y)).sum().backward()
    assert y.grad is not None
