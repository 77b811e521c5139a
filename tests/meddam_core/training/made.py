"""A small DAM and examples of coloured squares for training tests: quick, and something can be learnt from them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from meddam_core.dam.checkpoint import load_dam
from meddam_core.dam.model import Dam
from meddam_core.prompts import load_prompt
from meddam_core.training.augment import Augmentation
from meddam_core.training.batch import Collator
from meddam_core.training.examples import Example
from meddam_core.training.texts import Texts

CHECKPOINT = Path(__file__).parents[2] / "data" / "oracle" / "dam_tiny" / "checkpoint"


def small_dam() -> Dam:
    """The oracle's checkpoint, in training mode."""
    return load_dam(CHECKPOINT).train()


def examples(count: int, size: int) -> list[Example]:
    """Dark or light squares, with captions that say which."""
    rng, made = np.random.default_rng(0), []
    for i in range(count):
        views_8SS = rng.integers(0, 60, (8, size, size)).astype(np.uint8)
        views_8SS[[3, 7]] = 0
        views_8SS[[3, 7], size // 4 : size // 2, size // 4 : size // 2] = 255
        light = i % 2
        views_8SS[:3] += 120 * light
        text = ("A light square." if light else "A dark one, on the other hand.",)
        made.append(
            Example(region_id=i, image_id=i, split="train", modality="XC", labels={}, views_8SS=views_8SS,
                    captions=[("dam-default", text[0])])
        )  # fmt: skip
    return made


def collator(dam: Dam, strength: float = 0.0) -> Collator:
    """Of captions from a table."""
    texts = Texts((load_prompt("dam-default"),), "table")
    return Collator(dam.tokenizer, dam.config.num_image_tokens, texts, Augmentation(strength), seed=5)
