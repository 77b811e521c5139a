"""Small DAMs with random weights for tests: odd grid, grouped-query attention, the oracle's tokenizer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from meddam_core.dam.checkpoint import random_dam
from meddam_core.dam.config import ContextConfig, DamConfig, LlmConfig, ViewConfig, VisionConfig
from meddam_core.dam.model import Dam
from meddam_core.dam.tokens import Tokenizer, read_tokenizer

ORACLE = Path(__file__).parents[2] / "data" / "oracle" / "dam_tiny"
CHECKPOINT = ORACLE / "checkpoint"
QUERY = "<image>\nDescribe the masked region in detail."

CONFIG = DamConfig(
    llm=LlmConfig(
        vocab_size=1000, hidden_size=48, intermediate_size=80, num_layers=2, num_heads=6, num_kv_heads=2,
        rms_norm_eps=1e-5, rope_theta=5000.0, max_position_embeddings=512, tokenizer_model_max_length=400,
        eos_token_ids=(2,),
    ),
    vision=VisionConfig(
        hidden_size=32, intermediate_size=56, num_layers=3, num_heads=4, image_size=128, patch_size=14
    ),
    context=ContextConfig(num_layers=3, num_heads=2, intermediate_size=40, patch_size=14),
    view=ViewConfig(size=128),
)  # fmt: skip
"""9 x 9 patches (the last two pixels are dropped), so 25 tokens a view."""


def small_config(**changes: object) -> DamConfig:
    """CONFIG with fields replaced; a dotted name reaches into a part: `context.masked_cross_attn`."""
    config = CONFIG
    for name, value in changes.items():
        part, _, field = name.rpartition("__")
        config = replace(config, **{part: replace(getattr(config, part), **{field: value})}) if part else replace(
            config, **{name: value}
        )  # fmt: skip
    return config


def small_dam(config: DamConfig = CONFIG, seed: int = 0) -> Dam:
    return random_dam(config, seed, tokenizer())


def tokenizer() -> Tokenizer:
    return read_tokenizer(CHECKPOINT / "llm")


def random_views(num: int, size: int, seed: int = 0) -> NDArray[np.uint8]:
    """(num, 8, size, size): two different views each, with a square mask."""
    rng = np.random.default_rng(seed)
    views = rng.integers(0, 256, (num, 8, size, size), dtype=np.uint8)
    views[:, 3] = views[:, 7] = 0
    views[:, 3, size // 3 : size // 2, size // 4 : size // 2] = 255
    views[:, 7, size // 4 : -size // 4, size // 4 : -size // 4] = 255
    return views
