"""The vision side, against a second, plain formulation of each part."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from meddam_core.dam.model import Dam
from meddam_core.dam.tokens import IMAGE_TOKEN_ID
from tests.meddam_core.dam.small import CONFIG, random_views, small_config, small_dam


def _views(num: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(random_views(num, CONFIG.view_size, seed))


@pytest.mark.parametrize("grid", [1, 2, 5, 8, 9])
def test_projector_token_order_against_loops(grid: int) -> None:
    """Token t = j * G + i holds the 2 x 2 group at row i, column j; an odd grid is padded with zeros."""
    dam = small_dam()
    layers = dam.mm_projector.layers
    rng = torch.Generator().manual_seed(0)
    x_BNC = torch.randn(2, grid * grid, CONFIG.vision.hidden_size, generator=rng)
    half = (grid + 1) // 2
    groups = torch.zeros(2, half * half, 4 * CONFIG.vision.hidden_size)
    zero = torch.zeros(CONFIG.vision.hidden_size)
    for b in range(2):
        for i in range(half):
            for j in range(half):
                places = [(2 * i, 2 * j), (2 * i, 2 * j + 1), (2 * i + 1, 2 * j), (2 * i + 1, 2 * j + 1)]
                parts = [x_BNC[b, r * grid + c] if max(r, c) < grid else zero for r, c in places]
                groups[b, j * half + i] = torch.cat(parts)
    with torch.inference_mode():
        expected = layers[4](
            F.gelu(layers[2](F.layer_norm(groups, groups.shape[-1:], layers[1].weight, layers[1].bias)))
        )
        assert torch.allclose(dam.mm_projector(x_BNC), expected, atol=1e-6)


def _plain_features(dam: Dam, input8: torch.Tensor, masked: bool = False) -> torch.Tensor:
    """Focal features of one view, written out: no batching, no fused kernels, no skipped routes."""

    def linear(x: torch.Tensor, part: torch.nn.Module) -> torch.Tensor:
        return x @ part.weight.T + part.bias

    def attention(q_in: torch.Tensor, kv_in: torch.Tensor, part: torch.nn.Module, keep: torch.Tensor) -> torch.Tensor:
        q, k, v = linear(q_in, part.q_proj), linear(kv_in, part.k_proj), linear(kv_in, part.v_proj)
        size, out = q.shape[1] // part.heads, []
        for h in range(part.heads):
            cut = slice(h * size, (h + 1) * size)
            scores = (q[:, cut] @ k[:, cut].T / size**0.5).masked_fill(~keep, float("-inf"))
            out.append(scores.softmax(-1) @ v[:, cut])
        return linear(torch.cat(out, -1), part.out_proj)

    def mlp(x: torch.Tensor, part: torch.nn.Module) -> torch.Tensor:
        h = linear(x, part.fc1)
        return linear(0.5 * h * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (h + 0.044715 * h**3))), part.fc2)

    tower, vision = dam.vision_tower.vision_model, CONFIG.vision
    every = torch.ones(vision.grid**2, dtype=torch.bool)

    def embed(pixels: torch.Tensor) -> torch.Tensor:
        rows, e, p = [], tower.embeddings, vision.patch_size
        for i in range(vision.grid):
            for j in range(vision.grid):
                patch = pixels[:, i * p : (i + 1) * p, j * p : (j + 1) * p]
                rows.append(
                    (e.patch_embedding.weight * patch[:3]).sum((1, 2, 3)) + e.patch_embedding.bias
                    + (e.mask_patch_embedding.weight * patch[3:]).sum((1, 2, 3)) + e.mask_patch_embedding.bias
                )  # fmt: skip
        return torch.stack(rows) + e.position_embedding.weight

    def run(x: torch.Tensor, context: torch.Tensor | None, keep: torch.Tensor) -> torch.Tensor:
        for i in range(vision.num_layers - 1):
            layer = tower.encoder.layers[i]
            h = layer.layer_norm1(x)
            x = x + attention(h, h, layer.self_attn, every)
            x = x + mlp(layer.layer_norm2(x), layer.mlp)
            if context is not None:
                adapter = dam.context_provider.adapters[i]
                x = x + adapter.attn_factor * attention(adapter.layer_norm1(x), context, adapter.cross_attn, keep)
                x = x + adapter.mlp_factor * mlp(adapter.layer_norm2(x), adapter.mlp)
        return x

    keep = every
    if masked:
        keep = F.max_pool2d(input8[None, 3:4], vision.patch_size).flatten() > -1
    return run(embed(input8[4:]), run(embed(input8[:4]), None, every), keep)


@pytest.mark.parametrize("masked", [False, True])
def test_features_against_a_plain_formulation(masked: bool) -> None:
    dam = small_dam(small_config(context__masked_cross_attn=masked))
    with torch.inference_mode():
        stages = dam.vision_stages(_views(2))
        for i in range(2):
            assert (stages.proj_in[i] - _plain_features(dam, stages.input8[i], masked)).abs().max() < 1e-4
    if masked:  # and the mask matters
        plain = small_dam().vision_stages(_views(2)).proj_in
        assert (plain - stages.proj_in).abs().max() > 1e-2


def test_views_are_routed_one_by_one() -> None:
    """Equal views skip the adapters, whatever they are batched with; treat_image_as_cimage sends all through them."""
    views = _views(4)
    views[1, 4:] = views[1, :4]
    views[3, 4:] = views[3, :4]
    dam = small_dam()
    with torch.inference_mode():
        stages = dam.vision_stages(views)
        assert stages.is_cimage.tolist() == [True, False, True, False] and len(stages.ctx_out) == 2
        assert torch.equal(stages.proj_in[1], stages.vis_global[1])
        for i in range(4):
            assert torch.allclose(dam.encode(views[i : i + 1])[0], stages.proj_out[i], atol=1e-5)
        always = small_dam(small_config(context__treat_image_as_cimage=True)).vision_stages(views)
    assert always.is_cimage.all() and len(always.ctx_out) == 4
    assert torch.equal(always.vis_global, stages.vis_global)
    assert (always.proj_in[1] - stages.proj_in[1]).abs().max() > 1e-2


def test_context_image_as_queries_swaps_the_views() -> None:
    views = _views(2)
    swapped = torch.cat((views[:, 4:], views[:, :4]), dim=1)
    dam, other = small_dam(), small_dam(small_config(context__context_image_as_queries=True))
    with torch.inference_mode():
        assert torch.equal(dam.encode(swapped), other.encode(views))


def test_unused_layers_are_never_run() -> None:
    """The last layer, the last adapter, the last norm and the pooling head may hold anything."""
    dam, views = small_dam(), _views(2)
    with torch.inference_mode():
        before = dam.encode(views)
        tower = dam.vision_tower.vision_model
        for part in (tower.encoder.layers[-1], tower.post_layernorm, tower.head, dam.context_provider.adapters[-1]):
            for parameter in part.parameters():
                parameter.fill_(float("nan"))
        assert torch.equal(dam.encode(views), before)


def test_normalised_values_follow_the_image_processor() -> None:
    """The order of roundings of transformers' processor, with different numbers for each channel."""
    config = small_config(view__mean=(0.48, 0.46, 0.41), view__std=(0.27, 0.26, 0.28))
    dam, views = small_dam(config), _views(2)
    scaled = (views.numpy().astype(np.float64) * config.view.rescale_factor).astype(np.float32)
    mean, std = (np.array([*v, v[0]] * 2, np.float32)[:, None, None] for v in (config.view.mean, config.view.std))
    assert np.array_equal(dam.normalise(views).numpy(), (scaled - mean) / std)


def test_wrong_views_are_refused() -> None:
    for wrong in (_views(1)[:, :7], _views(1)[:, :, :100], _views(1).float(), _views(1)[0]):
        with pytest.raises(ValueError, match=r"this checkpoint takes uint8 \(M, 8, 128, 128\)"):
            small_dam().encode(wrong)


def test_merge_puts_views_at_their_places() -> None:
    dam = small_dam()
    tokens_NTD = torch.randn(2, 25, 48)
    ids = [1, 5, IMAGE_TOKEN_ID, IMAGE_TOKEN_ID, 7]
    with torch.inference_mode():
        rows = dam.merge(ids, tokens_NTD)
        text = dam.llm.embed(torch.tensor([1, 5, 7]))
    assert torch.equal(rows, torch.cat((text[:2], tokens_NTD[0], tokens_NTD[1], text[2:])))
    assert len(rows) == dam.num_positions(ids) == 53
    with pytest.raises(ValueError, match="1 <image> places for 2 views"):
        dam.merge([1, IMAGE_TOKEN_ID], tokens_NTD)


def test_gates_that_start_at_zero_receive_gradients() -> None:
    from meddam_core.dam.checkpoint import random_dam

    dam = random_dam(CONFIG, 0, zero_gates=True)
    dam.encode(_views(1)).square().sum().backward()
    gates = [adapter.attn_factor.grad for adapter in list(dam.context_provider.adapters)[:-1]]
    assert all(gate is not None and gate.abs() > 0 for gate in gates)
