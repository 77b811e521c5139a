"""The dimensions and the tokenizer of a small DAM that is trained from scratch: `meddam finetune --model tiny`.

Everything DAM has is there in small: two views, one tower, gated adapters whose gates start at zero, projector,
language model. Its features are those after the last layer, so that no layer is dead.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from meddam_core.dam.architecture import ContextConfig, DamConfig, LlmConfig, ViewConfig, VisionConfig
from meddam_core.dam.checkpoint import random_dam
from meddam_core.dam.model import Dam
from meddam_core.dam.tokens import Tokenizer
from meddam_core.prompts import LENGTHS, load_prompt
from meddam_core.training.vocabulary import prompt_lines, train_tokenizer

VIEW_SIZE = 128
VOCABULARY = 640
MASK_STRENGTH = 3.0
"""Of a wholly marked patch, beside positions of about 1 and pixels of about a quarter."""
_EXPERTS = ("", "-chest-film", "-lung-ct", "-dermatology")

PROMPTS = ("dam-default", *(f"meddam-v1{expert}+{length}" for expert in _EXPERTS for length in LENGTHS))
"""Whose lines the tokenizer keeps whole."""


def tiny_config(vocab_size: int) -> DamConfig:
    """About three and a half million parameters."""
    return DamConfig(
        llm=LlmConfig(
            vocab_size=vocab_size, hidden_size=192, intermediate_size=512, num_layers=3, num_heads=6, num_kv_heads=6,
            eos_token_ids=(2,), max_position_embeddings=512, tokenizer_model_max_length=512,
        ),
        vision=VisionConfig(
            hidden_size=128, intermediate_size=512, num_layers=4, num_heads=4, image_size=VIEW_SIZE, patch_size=16
        ),
        context=ContextConfig(num_layers=4, num_heads=4, intermediate_size=256, patch_size=16),
        view=ViewConfig(size=VIEW_SIZE),
        select_layer=-1,
    )  # fmt: skip


def new_dam(captions: Sequence[str], seed: int, *, open_gates: float = 0.0) -> Dam:
    """A DAM with a tokenizer made from captions and weights drawn with the seed.

    `open_gates` is what the gates of the cross-attention start at. DAM's start at zero, beside a tower that can see
    already; where all is learnt at once, gates near zero drift to and fro and let nothing through.
    """
    files = train_tokenizer(captions, prompt_lines(load_prompt(p).text for p in PROMPTS), VOCABULARY)
    tokenizer = Tokenizer(files)
    dam = random_dam(tiny_config(len(tokenizer)), seed, tokenizer, zero_gates=True)
    with torch.no_grad():
        for name, parameter in dam.named_parameters():
            start_small(name, parameter, seed)
            if name.endswith("attn_factor"):
                parameter.fill_(open_gates)
    return dam.train()


def start_small(name: str, parameter: torch.Tensor, seed: int = 0) -> None:
    """First weights to learn from: random_dam's are for showing every part of a network at work.

    Positions start as waves over the grid and well above the pixels; a marked patch starts above both, so that
    attention finds it and reads its place. With positions as weak as pixels, sides took four times the steps.
    Patches start as a transform that evens out fine and coarse: of random weights each sees little but a patch's mean.
    """
    if name.endswith("position_embedding.weight"):
        parameter.copy_(grid_waves(int(parameter.shape[0] ** 0.5), parameter.shape[1]))
    elif name.endswith(".patch_embedding.weight"):
        parameter.copy_(even_patches(parameter.shape[0], parameter.shape[-1], seed))
    elif name.endswith("mask_patch_embedding.weight"):
        parameter.copy_(MASK_STRENGTH * marked(parameter))
    elif name.endswith("embed_tokens.weight"):
        parameter.mul_(0.02)
    elif name.endswith("lm_head.weight"):
        parameter.mul_(0.1)
    elif parameter.ndim == 1 and name.endswith("bias"):
        parameter.zero_()
    elif parameter.ndim == 1 and name.endswith("weight"):
        parameter.fill_(1.0)
    elif name.endswith(("o_proj.weight", "out_proj.weight", "down_proj.weight", "fc2.weight")):
        parameter.mul_(0.3)  # what is added to the residual stream starts small


def even_patches(num_channels: int, side: int, seed: int) -> torch.Tensor:
    """(C, 3, P, P): cosine transforms of luminance and two colour differences, finer ones stronger, turned at random.

    Pictures hold most of their energy in their coarsest waves; with these gains (chosen on phantoms) all reach the
    network with about the same. Four channels in five see luminance.
    """
    steps = torch.arange(side).float()
    waves_PP = torch.cos(torch.pi * (steps[None] + 0.5) * steps[:, None] / side) * (2 / side) ** 0.5
    waves_PP[0] /= 2**0.5
    coarse_first = sorted(((u, v) for u in range(side) for v in range(side)), key=lambda at: (sum(at), at))
    grey, red_green, blue_yellow = (
        torch.nn.functional.normalize(torch.tensor(c), dim=0) for c in ((1.0, 1, 1), (1.0, -1, 0), (1.0, 1, -2))
    )
    num_grey = num_channels * 4 // 5
    chosen = [(grey, at, 0.1 if at == (0, 0) else 0.125 * (1 + sum(at))) for at in coarse_first[:num_grey]]
    chosen += [
        ((red_green, blue_yellow)[i % 2], at, 0.4 if at == (0, 0) else 0.25 * (1 + sum(at)))
        for i, at in enumerate(a for a in coarse_first for _ in range(2))
    ][: num_channels - num_grey]
    rows = [gain * colour[:, None, None] * torch.outer(waves_PP[u], waves_PP[v]) for colour, (u, v), gain in chosen]
    generator = torch.Generator().manual_seed(seed)
    turn_CC, _ = torch.linalg.qr(torch.randn(num_channels, num_channels, generator=generator))
    filters: torch.Tensor = (turn_CC @ torch.stack(rows).flatten(1)).view(num_channels, 3, side, side)
    return filters


def marked(parameter: torch.Tensor) -> torch.Tensor:
    """(C, 1, P, P): one direction of the embedding, the same for every pixel: how much of a patch the mask covers."""
    direction = parameter.mean(dim=(1, 2, 3), keepdim=True)  # of random weights: random, too
    return (direction / direction.std() / parameter[0].numel()).expand_as(parameter)


def grid_waves(grid: int, size: int) -> torch.Tensor:
    """(grid * grid, size): sines and cosines of row and column at several frequencies, row-major."""
    line = (torch.arange(grid) + 0.5) / grid
    frequencies = torch.pi * 2.0 ** (torch.arange(size // 4) * (4.0 / (size // 4)) - 1)
    angles = line[:, None] * frequencies
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)
    waves = torch.nn.functional.pad(waves, (0, size // 2 - waves.shape[1]))
    rows = waves[:, None].expand(grid, grid, -1)
    columns = waves[None].expand(grid, grid, -1)
    return torch.nn.functional.pad(torch.cat([rows, columns], -1), (0, size % 2)).reshape(grid * grid, size)
