"""Changes to a picture that leave its caption true: light, noise, a slight turn and shift. Never a flip.

    views_8SS = Augmentation(strength=1.0)(views_8SS, rng)

Image and mask of a view change together (albumentations). A flip would exchange the patient's sides, so there is none;
turns and shifts stay small, so that zones keep their names.

`swapped` makes a new example of two: the full view of one with the focal crop of the other. What only the full view can
show is then true of the first, all else of the second, and no habit of lesions and places can stand in for looking.
"""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meddam_core.datasets.phantoms.captions import GLOBAL_FACTS
from meddam_core.datasets.phantoms.skin import PAPULE_MM
from meddam_core.datasets.phantoms.truth import MASS_MM
from meddam_core.training.examples import Example

_AROUND = ("size_mm", "number", "neighbour", "neighbour_direction")
"""Further facts that belong to the full view."""


@cache
def _pipeline(strength: float) -> Any:
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # its import would ask the package index for a newer version
    import albumentations as A
    import cv2

    cv2.setNumThreads(0)
    return A.Compose(
        [
            A.Affine(
                scale=(1 - 0.05 * strength, 1 + 0.05 * strength), rotate=(-6 * strength, 6 * strength),
                translate_percent=(-0.02 * strength, 0.02 * strength), border_mode=cv2.BORDER_REFLECT_101, p=0.6,
            ),
            A.RandomBrightnessContrast(0.12 * strength, 0.12 * strength, p=0.7),
            A.GaussNoise(std_range=(0.0, 0.02 * strength), p=0.3),
        ]
    )  # fmt: skip


class Augmentation:
    """Draws changes of the given strength (0: none, 1: as in training) from the caller's random stream."""

    def __init__(self, strength: float) -> None:
        if not 0 <= strength <= 2:
            raise ValueError(f"an augmentation strength of {strength} would leave captions untrue; use 0 to 2")
        self.strength = strength

    def __call__(self, views_8SS: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
        """(8, S, S) uint8 -> the same, changed. Full view and crop change independently, each with its own mask."""
        if self.strength == 0:
            return views_8SS
        changed = np.empty_like(views_8SS)
        pipeline = _pipeline(self.strength)
        for first in (0, 4):
            pipeline.set_random_seed(int(rng.integers(1 << 31)))
            image_SSC = np.ascontiguousarray(views_8SS[first : first + 3].transpose(1, 2, 0))
            both = pipeline(image=image_SSC, mask=np.ascontiguousarray(views_8SS[first + 3]))
            changed[first : first + 3] = both["image"].transpose(2, 0, 1)
            changed[first + 3] = both["mask"]
        return changed


def may_swap(example: Example) -> bool:
    """Whether an example can lend its full view or its crop: lesions of phantoms, whose every fact is known."""
    return example.labels.get("kind") == "lesion" and "size_mm" in example.labels


def swapped(full: Example, focal: Example) -> Example:
    """The full view of one lesion with the focal crop of another of the same modality, with the labels of both.

    Raises ValueError where `may_swap` says no or the modalities differ.
    """
    if full.modality != focal.modality or not (may_swap(full) and may_swap(focal)):
        raise ValueError("only lesions of phantoms of one modality can exchange their views")
    shown = {k: full.labels[k] for k in (*GLOBAL_FACTS, *_AROUND) if k in full.labels}
    labels = {k: v for k, v in focal.labels.items() if k not in _AROUND} | shown
    labels["finding"] = _finding(labels)
    views_8SS = np.concatenate([full.views_8SS[:4], focal.views_8SS[4:]])
    return Example(
        region_id=focal.region_id, image_id=focal.image_id, split=focal.split, modality=focal.modality, labels=labels,
        views_8SS=views_8SS,
    )  # fmt: skip


def _finding(labels: dict[str, str]) -> str:
    """The finding's name, where that depends on its size in mm."""
    finding, size_mm = labels["finding"], float(labels["size_mm"])
    for small, large, limit in (
        ("nodule", "mass", MASS_MM + 0.5), ("macule", "patch", PAPULE_MM), ("papule", "plaque", PAPULE_MM)
    ):  # fmt: skip
        if finding in (small, large):
            return small if size_mm < limit else large
    return finding
