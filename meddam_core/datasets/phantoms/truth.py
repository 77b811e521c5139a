"""What is true of each region of a phantom, as labels with trust 1: true by construction.

| label               | values                                                                      | shown by         |
|---------------------|-----------------------------------------------------------------------------|------------------|
| kind                | lesion, distractor, normal                                                  | crop             |
| finding             | nodule, mass, consolidation ... macule, plaque, ulcer ... normal tissue     | crop, size       |
| part                | whole, twin, core, halo                                                     | mask             |
| density (film, CT)  | dense, hazy, calcified; solid, part-solid, ground-glass, cavitary           | crop; twins mask |
| colour (skin)       | red, brown, purple, pink, black, yellow                                     | crop; twins mask |
| shape               | round, oval, irregular                                                      | mask, crop       |
| margin              | smooth, lobulated, spiculated, ill-defined; skin: regular, irregular        | crop             |
| texture, surface    | homogeneous, granular, reticular; smooth, scaly, ulcerated, crusted         | crop             |
| elevation (skin)    | flat, raised                                                                | crop             |
| side (film, CT)     | left, right of the patient                                                  | full view        |
| zone                | upper, middle, lower; CT: anterior, middle, posterior; skin: of the picture | full view        |
| column (skin)       | left, centre, right of the picture                                          | full view        |
| size                | small, medium, large: longest diameter to width of the thorax               | full view        |
| size_mm             | longest diameter                                                            | spacing          |
| number              | lesions in the picture                                                      | full view        |
| neighbour           | the nearest other lesion's finding, or none                                 | full view        |
| neighbour_direction | where it is: above, below, left, right of the picture                       | full view        |
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from meddam_core.datasets.phantoms import skin
from meddam_core.datasets.phantoms.scene import Lesion, Scene, Thing, size_class
from meddam_core.records import Label

Mask = NDArray[np.uint8]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PhantomRegion:
    """A region of a phantom: its mask and what is true of it."""

    mask_HW: Mask
    """(H, W) uint8, 1 inside."""
    truth: dict[str, str]

    def labels(self) -> list[Label]:
        """The truth as labels."""
        return [Label(name=name, value=value, trust=1.0) for name, value in self.truth.items()]


class Places(Protocol):
    """Names the places of a picture."""

    def __call__(self, x: float, y: float) -> dict[str, str]:
        """Labels of the place of a pixel."""
        ...


MASS_MM = 30.0
"""A nodule is at most this long, a mass longer (Fleischner Society glossary)."""


def finding_of(scene: Scene, lesion: Lesion) -> str:
    """The lesion's name; nodules and masses, macules and patches, papules and plaques differ by their size in mm."""
    diameter_mm = lesion.outline.longest_px() * scene.field.spacing_mm
    if scene.kind == "skin":
        return skin.named(lesion.look, diameter_mm)
    return "mass" if lesion.look.finding == "nodule" and diameter_mm > MASS_MM else lesion.look.finding


def lesion_truth(scene: Scene, index: int, places: Places) -> dict[str, str]:
    """What is true of a lesion as a whole."""
    lesion = scene.lesions[index]
    look, longest = lesion.look, lesion.outline.longest_px()
    seen = {
        "kind": "lesion", "finding": finding_of(scene, lesion), "part": "whole", "density": look.density,
        "colour": look.colour, "shape": look.shape, "margin": look.margin, "texture": look.texture,
        "surface": look.surface, "elevation": look.elevation,
    }  # fmt: skip
    return {
        **{name: value for name, value in seen.items() if value is not None},
        **places(lesion.x, lesion.y),
        "size": size_class(longest, scene.field),
        "size_mm": f"{longest * scene.field.spacing_mm:.0f}",
        "number": str(len(scene.lesions)),
        **_neighbour(scene, index),
    }


def thing_truth(scene: Scene, thing: Thing, places: Places) -> dict[str, str]:
    """What is true of a distractor or a piece of normal tissue."""
    return {
        "kind": thing.kind, "finding": thing.finding, **places(thing.x, thing.y), "number": str(len(scene.lesions))
    }  # fmt: skip


def _neighbour(scene: Scene, index: int) -> dict[str, str]:
    here = scene.lesions[index]
    others = [lesion for i, lesion in enumerate(scene.lesions) if i != index]
    if not others:
        return {"neighbour": "none"}
    nearest = min(others, key=lambda o: np.hypot(o.x - here.x, o.y - here.y))
    dx, dy = nearest.x - here.x, nearest.y - here.y
    across = abs(dx) > abs(dy)
    direction = ("right" if dx > 0 else "left") if across else ("below" if dy > 0 else "above")
    return {"neighbour": finding_of(scene, nearest), "neighbour_direction": direction}
