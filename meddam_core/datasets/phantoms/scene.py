"""What a phantom shows, before a pixel is painted: lesions with attributes and places, distractors, normal tissue.

    scene = draw_scene("ct", np.random.default_rng(7), Field(...))

Everything a caption may say is decided here: truth is known by construction. Facts are spread over what DAM sees:
- only the full view shows: side, zone, size (relative to the thorax), number of lesions, the neighbour's direction;
- only the focal crop shows: spicules two to three pixels wide, the grain of the texture, scales and crusts;
- only the mask shows: which of two interlocking twins is meant, core or halo; their boxes are equal.

Invariants: a lesion's outline is at least MIN_SIDE_PX on each side; three times its box lies inside the canvas, so that
no crop is clipped (a clipped crop would give the position away); lesions do not overlap. No truth is a matter of a
pixel: sizes leave gaps between their classes, places keep off the borders between their names, and limits in mm lie in
the gaps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from meddam_core.datasets.phantoms.outline import Outline, Rng, draw_outline

Kind = Literal["chest", "ct", "skin"]
KINDS: tuple[Kind, ...] = ("chest", "ct", "skin")

MIN_SIDE_PX = 48
MAX_LESIONS = 4
SIZES = ("small", "medium", "large")
SIZE_LIMITS = (0.115, 0.157)
"""Longest diameter over field width that separate small, medium and large."""
_SIZE_RANGES = {"small": (0.082, 0.102), "medium": (0.125, 0.145), "large": (0.168, 0.186)}

Form = Literal["whole", "twins", "core-halo"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """The attributes of a lesion that its pixels show. None where the kind of picture has no such attribute.

    `finding` is nodule for masses too, and lesion on skin: size in mm decides between names (see `truth.finding_of`).
    """

    finding: str
    shape: str
    margin: str
    size: str
    form: Form = "whole"
    density: str | None = None
    texture: str | None = None
    colour: str | None = None
    surface: str | None = None
    elevation: str | None = None

    def has(self, combination: str) -> bool:
        """Whether it is of a combination such as "margin=spiculated&density=solid"."""
        wanted = (part.split("=", 1) for part in combination.split("&"))
        return all(getattr(self, name) == value for name, value in wanted)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lesion:
    """A lesion at its place."""

    look: Look
    outline: Outline
    x: float
    y: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Thing:
    """Something else that is drawn or asked about: a distractor or a piece of normal tissue."""

    kind: Literal["distractor", "normal"]
    finding: str
    x: float
    y: float
    radius: float
    turn: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Field:
    """Where lesions may lie: the lungs, or the whole of a skin photograph."""

    size: int
    """Side of the square canvas, pixels."""
    width_px: float
    """What sizes are relative to: the width of the thorax, or of the usual field of view."""
    inside: Callable[[float, float, float], bool]
    """(x, y, radius) -> whether a lesion of that radius may lie there."""
    spacing_mm: float


def clearly_in_a_third(thirds: float) -> bool:
    """Whether a place, counted in thirds (0 to 3), is no nearer than a tenth of a third to where its name changes."""
    return min(abs(thirds - 1), abs(thirds - 2)) >= 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """All there is in a phantom."""

    kind: Kind
    field: Field
    lesions: tuple[Lesion, ...]
    things: tuple[Thing, ...]


LookDrawer = Callable[[Rng, str], Look]


def draw_scene(kind: Kind, rng: Rng, field: Field, draw_look: LookDrawer, distractor: str, max_lesions: int) -> Scene:
    """One to `max_lesions` lesions, up to two distractors and one patch of normal tissue, none touching another."""
    lesions: list[Lesion] = []
    wanted = int(rng.integers(1, max_lesions + 1))
    taken: list[tuple[float, float, float]] = []
    for _ in range(40):
        if len(lesions) == wanted:
            break
        look = draw_look(rng, str(rng.choice(SIZES)))
        outline = _sized_outline(rng, look, field)
        place = _free_place(rng, field, outline.radius, taken)
        if place is not None:
            place = place if look.form == "whole" else (round(place[0]), round(place[1]))
            lesions.append(Lesion(look=look, outline=outline, x=place[0], y=place[1]))
            taken.append((*place, outline.reach))
    things: list[Thing] = []
    for kind_of_thing, finding in [("distractor", distractor)] * int(rng.integers(0, 3)) + [
        ("normal", "normal tissue")
    ]:
        radius = float(rng.uniform(26, 44))
        place = _free_place(rng, field, radius, taken)
        if place is not None:
            turn = float(rng.uniform(0, 2 * np.pi))
            things.append(
                Thing(kind=kind_of_thing, finding=finding, x=place[0], y=place[1], radius=radius, turn=turn)  # type: ignore[arg-type]
            )
            taken.append((*place, radius * 1.3))
    return Scene(kind=kind, field=field, lesions=tuple(lesions), things=tuple(things))


def size_class(diameter_px: float, field: Field) -> str:
    """small, medium or large, by the longest diameter relative to the field's width."""
    share = diameter_px / field.width_px
    return SIZES[int(np.searchsorted(SIZE_LIMITS, share))]


def _sized_outline(rng: Rng, look: Look, field: Field) -> Outline:
    low, high = _SIZE_RANGES[look.size]
    outline = draw_outline(
        rng, look.shape, look.margin, look.form, radius=0.5 * field.width_px * rng.uniform(low, high)
    )
    narrow = outline.narrowest_px()
    if narrow < MIN_SIDE_PX + 2:
        outline = outline.scaled((MIN_SIDE_PX + 2) / narrow)
    if look.form != "whole":
        # on a whole pixel and with this radius the outermost rows hold enough pixels for both parts to reach them
        outline = replace(outline, radius=math.floor(outline.radius) + 0.45)
    return outline


def _free_place(
    rng: Rng, field: Field, radius: float, taken: list[tuple[float, float, float]]
) -> tuple[float, float] | None:
    """A centre whose triple box is inside the canvas and which is clear of what is taken; None if none was found."""
    low, high = 3 * radius + 2, field.size - 3 * radius - 2
    candidates: NDArray[np.float64] = rng.uniform(low, high, (200, 2))
    for x, y in candidates:
        clear = all(np.hypot(x - tx, y - ty) > radius * 1.15 + reach + 8 for tx, ty, reach in taken)
        if clear and field.inside(float(x), float(y), radius):
            return float(x), float(y)
    return None
