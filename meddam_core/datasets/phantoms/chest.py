"""Synthetic chest films: a frontal view of a thorax with lungs, heart, ribs, clavicles, spine and vessels.

Brightness is 0 (air) to 1 (densest); the film stores it in 12 bits, one in four inverted (MONOCHROME1). The patient's
right is on the left of the picture.

Arrays: H rows and W columns, equal; coordinates x, y are 0 to 1 over the canvas.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from meddam_core.datasets.phantoms.outline import Float, Rng
from meddam_core.datasets.phantoms.scene import Field, Form, Look, clearly_in_a_third
from meddam_core.datasets.phantoms.texture import blur, branches, cloud, coordinates, enlarged, noise, step, strokes

DISTRACTOR = "electrode"
_HALF = 2
"""Anatomy is painted at half the canvas's resolution: nothing in it is finer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Thorax:
    """The proportions of one patient, as shares of the canvas."""

    size: int
    cx: float
    half: float
    """Half the width of the chest."""
    top: float
    bottom: float
    """Of the lungs: apex and costophrenic angle."""
    heart: float
    spacing_mm: float

    def lung(self, x: Float, y: Float, side: int) -> Float:
        """Signed closeness to a lung: above 0 inside. `side` is -1 for the picture's left."""
        middle, tall = (self.top + self.bottom) / 2, (self.bottom - self.top) / 2
        v = (y - middle) / tall
        widening = 0.86 + 0.14 * np.clip(v, -1, 1)
        u = (x - (self.cx + side * self.half * 0.51)) / (self.half * 0.44 * widening)
        dome = v - (0.80 - 0.16 * (1 - u * u) + (0.05 if side > 0 else 0.0))
        return np.asarray(np.minimum(1 - np.abs(u) ** 2.5 - np.abs(np.minimum(v, 0)) ** 2.6, -dome * 1.6))

    def field(self) -> Field:
        """Lesions lie in the lungs, most of them inside."""
        ring = np.linspace(0, 2 * np.pi, 12, endpoint=False)

        def inside(x: float, y: float, radius: float) -> bool:
            xs = ((x + 0.75 * radius * np.cos(ring)) / self.size).astype(np.float32)
            ys = ((y + 0.75 * radius * np.sin(ring)) / self.size).astype(np.float32)
            lies = any(bool((self.lung(xs, ys, side) > 0).mean() > 0.9) for side in (-1, 1))
            return lies and clearly_in_a_third(self.thirds(y))

        return Field(
            size=self.size, width_px=2 * self.half * self.size, inside=inside, spacing_mm=self.spacing_mm
        )  # fmt: skip

    def side(self, x: float) -> str:
        """The patient's side of a place: right on the left of the picture."""
        return "right" if x / self.size < self.cx else "left"

    def zone(self, y: float) -> str:
        """Upper, middle or lower third of the lungs."""
        return ("upper", "middle", "lower")[int(np.clip(self.thirds(y), 0, 2))]

    def thirds(self, y: float) -> float:
        """How far down the lungs, 0 to 3."""
        return 3 * (y / self.size - self.top) / (0.9 * (self.bottom - self.top))


def draw_thorax(rng: Rng, size: int) -> Thorax:
    """A patient."""
    half = float(rng.uniform(0.34, 0.41))
    width_mm = float(rng.uniform(246, 286))  # so that nodules end and masses begin between two classes of size
    top = float(rng.uniform(0.15, 0.18))
    return Thorax(
        size=size, cx=float(rng.uniform(0.48, 0.52)), half=half, top=top, bottom=top + float(rng.uniform(0.66, 0.70)),
        heart=float(rng.uniform(0.85, 1.12)), spacing_mm=width_mm / (2 * half * size),
    )  # fmt: skip


def draw_look(rng: Rng, size: str) -> Look:
    """The attributes of a lesion on a film."""
    form: Form = _form(rng)
    finding = str(rng.choice(("nodule", "nodule", "nodule", "consolidation", "hazy opacity", "reticular opacity")))
    if form != "whole" or size == "small":
        finding = "nodule"
    focal = finding == "nodule"
    margins = ("smooth", "lobulated", "spiculated", "ill-defined") if form == "whole" else ("smooth",)
    shapes = ("round", "oval", "irregular") if form == "whole" else ("round",)
    density = {"consolidation": "dense", "hazy opacity": "hazy", "reticular opacity": "hazy"}.get(finding)
    texture = {"reticular opacity": "reticular"}.get(finding, "homogeneous")
    return Look(
        finding=finding, form=form, size=size,
        shape=str(rng.choice(shapes)) if focal else "irregular",
        margin=str(rng.choice(margins)) if focal else "ill-defined",
        density=density or str(rng.choice(("dense", "calcified", "hazy"))),
        texture=texture if not focal or form != "whole" else str(rng.choice(("homogeneous", "granular"))),
    )  # fmt: skip


def _form(rng: Rng) -> Form:
    draw = rng.random()
    return "twins" if draw < 0.14 else "core-halo" if draw < 0.28 else "whole"


def background(rng: Rng, thorax: Thorax) -> Float:
    """The film without lesions and grain, (H, W)."""
    side = thorax.size // _HALF
    x, y = coordinates(side)
    film = _soft_tissue(rng, thorax, x, y)
    film = film + _bones(rng, thorax, side) * 0.14 + _vessels(rng, thorax, side, x, y) * 0.10 * (film < 0.45)
    film = blur(film.astype(np.float32), 0.9) + cloud(rng, side, side / 3, 4) * 0.012
    return enlarged(film, thorax.size)


def _soft_tissue(rng: Rng, t: Thorax, x: Float, y: Float) -> Float:
    u, v = (x - t.cx) / t.half, (y - t.top) / (t.bottom - t.top)
    shoulders = 1.12 + 0.40 * step(0.10 - v, 0.3) - 1.12 * step(-0.13 - v, 0.22)
    body = step(shoulders - np.abs(u), 0.05)
    film = 0.03 + body * (0.56 + 0.05 * np.clip(1 - np.abs(u), 0, 1))
    lungs = np.maximum(step(t.lung(x, y, -1), 0.16), step(t.lung(x, y, 1), 0.16))
    film = film - lungs * (0.34 - 0.05 * np.clip(v, 0, 1))
    middle = step(0.155 + 0.03 * v - np.abs(u), 0.07) * step(v + 0.25, 0.1)
    heart_u, heart_v = (u - 0.14 * t.heart) / (0.36 * t.heart), (v - 0.70) / 0.27
    heart = step(1 - np.hypot(heart_u + 0.25 * heart_v, heart_v), 0.16)
    right_heart = step(1 - np.hypot((u + 0.09) / 0.19, (v - 0.68) / 0.24), 0.2)
    knob = step(1 - np.hypot((u - 0.17) / 0.12, (v - 0.27) / 0.09), 0.3)
    dense = np.maximum.reduce([middle, heart * 0.92, right_heart * 0.85, knob * 0.85])
    film = film + lungs * dense * 0.27 + (1 - lungs) * step(v, 0.2) * dense * 0.10
    film = film + step(v - 0.86, 0.2) * body * (1 - lungs) * 0.10
    trachea = step(0.045 - np.abs(u + 0.01), 0.04) * step(0.30 - v, 0.1) * step(v + 0.22, 0.1)
    spine = step(0.075 - np.abs(u), 0.03) * (0.75 + 0.25 * np.sin(v * 66 + float(rng.uniform(0, 6))))
    return np.asarray(film - trachea * 0.10 + spine * body * 0.05, np.float32)


def _bones(rng: Rng, t: Thorax, side: int) -> Float:
    along = np.linspace(0.10, 0.98, 24)
    lines, widths, values = [], [], []
    tilt = float(rng.uniform(0.9, 1.15))
    for rib in range(9):
        start = t.top - 0.02 + rib * (t.bottom - t.top) * 0.098
        for sign in (-1, 1):
            reach = 0.62 + 0.36 * min(1.0, (rib + 1.2) / 4)
            drop = tilt * t.half * (0.30 * along**2.2 - 0.10 * np.sin(along * np.pi)) * (0.75 + 0.05 * rib)
            lines.append(np.stack([t.cx + sign * t.half * along * reach * 1.04, start + drop], axis=1))
            widths.append(round(side * 0.021))
            values.append(150)
    for rib in range(6):  # the front ends: wider, fainter, sloping the other way
        start = t.top + 0.16 + rib * (t.bottom - t.top) * 0.112
        for sign in (-1, 1):
            fall = t.half * (0.42 * (1 - along)) * tilt
            lines.append(np.stack([t.cx + sign * t.half * (0.28 + 0.66 * along), start + fall - 0.05], axis=1))
            widths.append(round(side * 0.019))
            values.append(75)
    ribs = _hollow(side, lines, widths, values)
    collar = np.linspace(0, 1, 16)
    clavicles = [
        np.stack(
            [t.cx + s * t.half * (0.10 + 0.95 * collar), t.top + 0.055 - 0.075 * collar + 0.02 * np.sin(collar * 6)],
            axis=1,
        )
        for s in (-1, 1)
    ]
    return ribs + _hollow(side, clavicles, [round(side * 0.026)] * 2, [255] * 2) * 1.1


def _hollow(side: int, lines: Sequence[Float], widths: list[int], values: list[int]) -> Float:
    """Bones with a denser rim, as they cast it."""
    solid = strokes(side, lines, widths, values)
    inner = strokes(side, lines, [max(w - 4, 1) for w in widths], [int(v * 0.45) for v in values])
    return blur(solid - 0.9 * inner * (inner < solid), 0.8)


def _vessels(rng: Rng, t: Thorax, side: int, x: Float, y: Float) -> Float:
    lines: list[Float] = []
    widths: list[int] = []
    values: list[int] = []
    for sign in (-1, 1):
        hilum = (t.cx + sign * t.half * 0.24, t.top + 0.44 * (t.bottom - t.top))
        heading = 0.0 if sign > 0 else np.pi
        found = branches(rng, hilum, heading, 1.3, 9, 0.145 * t.half / 0.37, 4)
        lines += found[0]
        widths += found[1]
        values += found[2]
    lungs = np.maximum(step(t.lung(x, y, -1), 0.2), step(t.lung(x, y, 1), 0.2))
    return blur(strokes(side, lines, widths, values), 1.1) * lungs


NEUTRAL = 0.33
"""Brightness of lung, where the surroundings of lesions are made alike everywhere."""


def grain(rng: Rng, film: Float) -> Float:
    """The film with its grain: finer and coarser, stronger where it is bright."""
    side = film.shape[0]
    strength = 0.006 + 0.012 * np.clip(film, 0, 1)
    return film + strength * (noise(rng, side, 1) * 0.7 + noise(rng, side, 2.2) * 0.6)


AMPLITUDE = {"dense": 0.25, "hazy": 0.13, "calcified": 0.44}


def lesion_layer(look: Look, density: str, alpha: Float, fine: Float, dx: Float, dy: Float) -> Float:
    """What a lesion adds to the brightness of its patch. `fine` is noise of two-pixel grain."""
    amount = AMPLITUDE[density]
    if look.texture == "granular":
        return alpha * amount * (1 + 0.42 * np.sign(fine) * (np.abs(fine) > 0.5))
    if look.texture == "reticular":
        net = np.maximum(np.abs(np.sin(dx * 0.42 + fine * 0.25)), np.abs(np.sin(dy * 0.42 + 0.3 * dx + fine * 0.25)))
        return np.asarray(alpha * (amount * 0.45 + 0.22 * np.clip((net - 0.9) * 10, 0, 1)))
    return alpha * amount


def stored(film: Float, inverted: bool) -> NDArray[np.uint16]:
    """12-bit stored values, (H, W) uint16."""
    value = np.clip(np.round(film * 3600 + 220), 0, 4095).astype(np.uint16)
    return 4095 - value if inverted else value
