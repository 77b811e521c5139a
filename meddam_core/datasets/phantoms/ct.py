"""Synthetic CT slices: an axial chest with lungs, vessels, mediastinum, spine and ribs, in Hounsfield units.

Stored as scanners do, 12 bits with a rescale intercept of -1024. The patient's right is on the left of the picture,
front is up.

Arrays: H rows and W columns, equal; coordinates x, y are 0 to 1 over the canvas; values are HU.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from meddam_core.datasets.phantoms.outline import Bool, Float, Rng
from meddam_core.datasets.phantoms.scene import Field, Form, Look, clearly_in_a_third
from meddam_core.datasets.phantoms.texture import blur, branches, cloud, coordinates, enlarged, noise, step, strokes

DISTRACTOR = "vessel"
LUNG_HU, SOFT_HU, GLASS_HU = -860.0, 35.0, -560.0
NEUTRAL = LUNG_HU
_HALF = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """The proportions of one patient's slice, as shares of the canvas."""

    size: int
    cx: float
    cy: float
    half: float
    """Half the width of the chest."""
    flat: float
    """Height over width."""
    heart: float
    spacing_mm: float

    def body(self, x: Float, y: Float) -> Float:
        """Above 0 inside the skin, 1 at the centre."""
        u, v = (x - self.cx) / self.half, (y - self.cy) / (self.half * self.flat)
        return np.asarray(1 - (np.abs(u) ** 2.4 + np.abs(v) ** 2.4) ** (1 / 2.4))

    def lung(self, x: Float, y: Float, side: int) -> Float:
        """Signed closeness to a lung: above 0 inside. `side` is -1 for the picture's left."""
        u = (x - (self.cx + side * self.half * 0.455)) / (self.half * 0.375)
        v = (y - self.cy + 0.01) / (self.half * self.flat * 0.80)
        notch = 0.46 * np.exp(-(((u * side + 1.15) / 0.55) ** 2) - ((v - (0.05 if side > 0 else 0.1)) / 0.45) ** 2)
        if side > 0:
            notch = notch + 0.85 * self.heart * np.exp(-(((u + 1.0) / 0.62) ** 2) - ((v + 0.33) / 0.36) ** 2)
        return np.asarray(1 - (np.abs(u) ** 2.5 + np.abs(v) ** 2.5) ** (1 / 2.5) - notch)

    def field(self) -> Field:
        """Lesions lie in the lungs, most of them inside."""
        ring = np.linspace(0, 2 * np.pi, 12, endpoint=False)

        def inside(x: float, y: float, radius: float) -> bool:
            xs = ((x + 0.85 * radius * np.cos(ring)) / self.size).astype(np.float32)
            ys = ((y + 0.85 * radius * np.sin(ring)) / self.size).astype(np.float32)
            lies = any(bool((self.lung(xs, ys, side) > 0).mean() > 0.9) for side in (-1, 1))
            return lies and clearly_in_a_third(self.thirds(y))

        return Field(
            size=self.size, width_px=2 * self.half * self.size, inside=inside, spacing_mm=self.spacing_mm
        )  # fmt: skip

    def side(self, x: float) -> str:
        """The patient's side of a place: right on the left of the picture."""
        return "right" if x / self.size < self.cx else "left"

    def zone(self, y: float) -> str:
        """Anterior, middle or posterior third of the lungs."""
        return ("anterior", "middle", "posterior")[int(np.clip(self.thirds(y), 0, 2))]

    def thirds(self, y: float) -> float:
        """How far back in the lungs, 0 to 3."""
        return 1.5 * ((y / self.size - self.cy) / (self.half * self.flat * 0.80) + 1)


def draw_slice(rng: Rng, size: int) -> Slice:
    """A patient."""
    half = float(rng.uniform(0.41, 0.455))
    width_mm = float(rng.uniform(246, 286))  # so that nodules end and masses begin between two classes of size
    return Slice(
        size=size, cx=float(rng.uniform(0.49, 0.51)), cy=float(rng.uniform(0.49, 0.51)),
        half=half, flat=float(rng.uniform(0.74, 0.82)), heart=float(rng.uniform(0.8, 1.1)),
        spacing_mm=width_mm / (2 * half * size),
    )  # fmt: skip


def draw_look(rng: Rng, size: str) -> Look:
    """The attributes of a nodule or mass."""
    draw = rng.random()
    form: Form = "twins" if draw < 0.14 else "core-halo" if draw < 0.28 else "whole"
    whole = form == "whole"
    return Look(
        finding="nodule", form=form, size=size,
        shape=str(rng.choice(("round", "oval", "irregular"))) if whole else "round",
        margin=str(rng.choice(("smooth", "lobulated", "spiculated", "ill-defined"))) if whole else "smooth",
        density=str(rng.choice(("solid", "part-solid", "ground-glass", "cavitary"))) if whole else "solid",
        texture=str(rng.choice(("homogeneous", "granular"))) if whole else "homogeneous",
    )  # fmt: skip


def background(rng: Rng, s: Slice) -> Float:
    """The slice without lesions and noise, (H, W), HU."""
    side = s.size // _HALF
    x, y = coordinates(side)
    body = s.body(x, y)
    lungs = np.maximum(step(s.lung(x, y, -1), 0.025), step(s.lung(x, y, 1), 0.025))
    hu: Float = np.full((side, side), -1000, np.float32)
    hu = hu + step(body, 0.012) * (900 + step(body - 0.045, 0.015) * 145)  # skin and fat, then muscle
    hu = np.where(np.abs(body - 0.08) < 0.016, hu - 90, hu)
    hu = hu + (_mediastinum(s, x, y) + cloud(rng, side, 24, 2) * 8) * step(body - 0.1, 0.02)
    hu = hu + _skeleton(rng, s, side, x, y)
    air = LUNG_HU + 45 * ((y - s.cy) / (s.half * s.flat)) + cloud(rng, side, 60, 3) * 14
    vessels = _vessels(rng, s, side)
    hu = hu * (1 - lungs) + lungs * (air + vessels * (SOFT_HU - LUNG_HU - 20))
    hu = np.where(_table(s, x, y), np.float32(-420), hu)
    hu = blur(hu.astype(np.float32), 0.7)
    return enlarged(hu, s.size)


def _mediastinum(s: Slice, x: Float, y: Float) -> Float:
    u, v = (x - s.cx) / s.half, (y - s.cy) / (s.half * s.flat)
    heart = step(1 - np.hypot((u - 0.10) / (0.34 * s.heart), (v + 0.20) / 0.40), 0.12) * 22
    aorta = step(1 - np.hypot((u - 0.115) / 0.085, (v - 0.36) / 0.11), 0.15) * 75
    gullet = step(1 - np.hypot((u - 0.0) / 0.03, (v - 0.30) / 0.05), 0.3) * -120
    airways = sum(step(1 - np.hypot((u - a) / 0.042, (v - 0.02) / 0.06), 0.15) * -950 for a in (-0.12, 0.13))
    fat = step(1 - np.hypot(u / 0.20, (v + 0.58) / 0.14), 0.5) * -110
    return np.asarray(heart + aorta + gullet + airways + fat, np.float32)


def _skeleton(rng: Rng, s: Slice, side: int, x: Float, y: Float) -> Float:
    u, v = (x - s.cx) / s.half, (y - s.cy) / (s.half * s.flat)
    centre = np.hypot(u / 0.155, (v - 0.585) / 0.165)
    vertebra = step(1 - centre, 0.08) * 170 + step(0.10 - np.abs(centre - 0.93), 0.06) * 330
    canal = step(1 - np.hypot(u / 0.075, (v - 0.80) / 0.075), 0.1)
    arch = step(1 - np.hypot(u / 0.125, (v - 0.81) / 0.125), 0.12) * 420 * (1 - canal)
    spike = step(0.028 - np.abs(u), 0.02) * step(v - 0.90, 0.02) * step(1.0 - v, 0.02) * 380
    lines, widths, values = [], [], []
    offset = float(rng.uniform(-0.05, 0.05))
    for sign in (-1, 1):
        for centre_angle in (-1.12, -0.62, -0.12, 0.38, 0.86):
            angle = np.linspace(centre_angle - 0.16, centre_angle + 0.16, 9) + offset
            rim = 0.905
            bend = np.abs(np.cos(angle)) ** 2.4 + np.abs(np.sin(angle)) ** 2.4
            reach = rim / bend ** (1 / 2.4)
            lines.append(np.stack([s.cx + sign * s.half * reach * np.cos(angle),
                                   s.cy + s.half * s.flat * reach * np.sin(angle)], axis=1))  # fmt: skip
            widths.append(round(side * 0.017))
            values.append(255)
    lines.append(
        np.array([[s.cx - 0.035, s.cy - s.half * s.flat * 0.84], [s.cx + 0.035, s.cy - s.half * s.flat * 0.84]])
    )
    widths.append(round(side * 0.022))
    values.append(200)
    ribs = strokes(side, lines, widths, values)
    marrow = strokes(side, lines, [max(w - 5, 1) for w in widths], [150] * len(lines))
    return np.asarray(vertebra + arch + spike - canal * 40 + 560 * ribs - 300 * marrow, np.float32)


def _vessels(rng: Rng, s: Slice, side: int) -> Float:
    lines: list[Float] = []
    widths: list[int] = []
    values: list[int] = []
    for sign in (-1, 1):
        hilum = (s.cx + sign * s.half * 0.17, s.cy + 0.01)
        found = branches(rng, hilum, 0.0 if sign > 0 else np.pi, 1.5, 8, 0.105, 4)
        lines += found[0]
        widths += found[1]
        values += found[2]
        for _ in range(70):  # vessels that cross the slice
            point = np.array([s.cx + sign * s.half * rng.uniform(0.12, 0.8), s.cy + s.half * rng.uniform(-0.6, 0.6)])
            lines.append(np.stack([point, point + rng.normal(0, 0.003, 2)]))
            widths.append(int(rng.integers(1, 4)))
            values.append(int(rng.integers(110, 220)))
    return strokes(side, lines, widths, values)


def _table(s: Slice, x: Float, y: Float) -> Bool:
    arc = y - (s.cy + s.half * s.flat * 1.07 + 0.22 * (np.abs(x - s.cx) ** 2) * -1)
    return np.asarray((np.abs(arc) < 0.004) & (np.abs(x - s.cx) < 0.42))


def grain(rng: Rng, hu: Float) -> Float:
    """The slice with a scanner's noise."""
    side = hu.shape[0]
    return hu + 14 * noise(rng, side, 1) + 16 * noise(rng, side, 2.5)


def lesion_layer(look: Look, density: str, alpha: Float, fraction: Float, fine: Float, below: Float) -> Float:
    """The patch with the lesion in it, HU. `fine` is noise of two-pixel grain."""
    target = np.full_like(alpha, GLASS_HU if density in ("ground-glass", "part-solid") else SOFT_HU)
    if density == "part-solid":
        target = target + (SOFT_HU - GLASS_HU) * step(0.52 - fraction, 0.14)
    if density == "cavitary":
        target = target + (-900 - SOFT_HU) * step(0.58 - fraction, 0.12)
    if look.texture == "granular":
        target = target + 240 * np.sign(fine) * (np.abs(fine) > 0.5) * (target > -800)
    return np.asarray(below * (1 - alpha) + np.maximum(target, below - 200) * alpha, np.float32)


def stored(hu: Float) -> NDArray[np.uint16]:
    """12-bit stored values, (H, W) uint16; HU = stored - 1024."""
    return np.clip(np.round(hu + 1024), 0, 4095).astype(np.uint16)
