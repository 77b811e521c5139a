"""Synthetic skin photographs: a patch of skin of any tone with lesions on it, in colour.

A photograph has no patient side: places are named as in the picture.

Arrays: H rows, W columns, C colours; values 0 to 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from meddam_core.datasets.phantoms.outline import Float, Outline, Rng
from meddam_core.datasets.phantoms.scene import Field, Form, Look, clearly_in_a_third
from meddam_core.datasets.phantoms.texture import blur, cloud, enlarged, noise, step, strokes

DISTRACTOR = "ink mark"
COLOURS = {
    "red": (0.74, 0.17, 0.16),
    "brown": (0.37, 0.21, 0.11),
    "purple": (0.42, 0.20, 0.47),
    "pink": (0.95, 0.52, 0.60),
    "black": (0.10, 0.08, 0.09),
    "yellow": (0.90, 0.76, 0.32),
}
_TONES = ((0.95, 0.80, 0.70), (0.90, 0.72, 0.59), (0.80, 0.60, 0.45), (0.66, 0.46, 0.33), (0.50, 0.33, 0.23),
          (0.37, 0.24, 0.17))  # fmt: skip
PAPULE_MM = 10.0
"""Raised lesions below are papules, flat ones macules."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Patch:
    """A piece of skin and its light."""

    size: int
    tone: tuple[float, float, float]
    light: tuple[float, float]
    hairs: int
    spacing_mm: float

    def field(self) -> Field:
        """Lesions lie anywhere. Sizes are relative to 72 % of the picture's width, as those of a thorax in its film."""

        def inside(x: float, y: float, radius: float) -> bool:
            return clearly_in_a_third(3 * x / self.size) and clearly_in_a_third(3 * y / self.size)

        return Field(size=self.size, width_px=0.72 * self.size, inside=inside, spacing_mm=self.spacing_mm)

    def horizontal(self, x: float) -> str:
        """Third of the picture."""
        return ("left", "centre", "right")[int(np.clip(3 * x / self.size, 0, 2))]

    def vertical(self, y: float) -> str:
        """Third of the picture."""
        return ("upper", "middle", "lower")[int(np.clip(3 * y / self.size, 0, 2))]


def draw_patch(rng: Rng, size: int) -> Patch:
    """A piece of skin."""
    tone = np.clip(np.array(_TONES[int(rng.integers(len(_TONES)))]) * rng.uniform(0.93, 1.05), 0, 1)
    angle = float(rng.uniform(0, 2 * np.pi))
    return Patch(
        size=size, tone=(float(tone[0]), float(tone[1]), float(tone[2])), light=(np.cos(angle), np.sin(angle)),
        hairs=int(rng.choice((0, 0, 12, 30))), spacing_mm=float(rng.uniform(0.111, 0.130) * 1024 / size),
    )  # fmt: skip


def draw_look(rng: Rng, size: str) -> Look:
    """The attributes of a skin lesion; `finding` is settled by its size in mm (see `named`)."""
    draw = rng.random()
    form: Form = "twins" if draw < 0.14 else "core-halo" if draw < 0.28 else "whole"
    whole = form == "whole"
    return Look(
        finding="lesion", form=form, size=size, colour=str(rng.choice(tuple(COLOURS))),
        shape=str(rng.choice(("round", "oval", "irregular"))) if whole else "round",
        margin=str(rng.choice(("regular", "irregular"))) if whole else "regular",
        surface=str(rng.choice(("smooth", "scaly", "ulcerated", "crusted"))) if whole else "smooth",
        elevation=str(rng.choice(("flat", "raised"))) if whole else "flat",
    )  # fmt: skip


def named(look: Look, diameter_mm: float) -> str:
    """Macule or patch where flat, papule or plaque where raised, by the usual limit of 1 cm."""
    if look.surface == "ulcerated":
        return "ulcer"
    small = diameter_mm < PAPULE_MM
    return ("macule" if small else "patch") if look.elevation == "flat" else ("papule" if small else "plaque")


def background(rng: Rng, patch: Patch) -> Float:
    """The skin without lesions, (H, W, 3)."""
    side = patch.size
    grid = np.linspace(-0.5, 0.5, side, dtype=np.float32)
    light = 1 + 0.16 * (grid[None, :] * patch.light[0] + grid[:, None] * patch.light[1])
    relief = noise(rng, side, 2.0) * 0.6 + enlarged(_furrows(rng, side // 2), side) * 1.6
    shade = light * (1 + np.float32(0.018) * relief + np.float32(0.022) * cloud(rng, side, side / 4, 4))
    blush = cloud(rng, side, side / 5, 3) * np.float32(0.016)
    planes = [tone * shade * (1 + share * blush) for tone, share in zip(patch.tone, (0.5, -0.8, -0.6), strict=True)]
    return np.asarray(cv2.merge(planes), np.float32)


def _furrows(rng: Rng, side: int) -> Float:
    """The fine net of lines on skin: two families of wavy stripes."""
    warp = cloud(rng, side, 24, 2)
    line = np.arange(side, dtype=np.float32)
    turn = float(rng.uniform(0, np.pi))
    net = np.zeros((side, side), np.float32)
    for angle in (turn, turn + 1.15):
        phase = (np.cos(angle) * line[None, :] + np.sin(angle) * line[:, None]) / 4.5 * np.float32(
            np.pi
        ) + warp * np.float32(0.8)
        wave = np.sin(phase)
        net -= np.maximum(1 - wave * wave * 6, 0)
    return net


def lesion_colour(look: Look, colour: str, skin: tuple[float, float, float]) -> Float:
    """The lesion's colour on this skin: pigment covers, redness and pallor blend."""
    cover = {"red": 0.80, "pink": 0.72, "purple": 0.82, "yellow": 0.78}.get(colour, 0.92)
    return np.array(COLOURS[colour], np.float32) * cover + np.array(skin, np.float32) * (1 - cover)


def paint_surface(
    rng: Rng, look: Look, outline: Outline, patch_HWC: Float, alpha: Float, fraction: Float, light: tuple[float, float]
) -> Float:
    """Relief and surface of a lesion whose colour is already there, (P, P, 3)."""
    side = alpha.shape[0]
    fine = noise(rng, side, 2.4)
    if look.elevation == "raised":
        dome = np.sqrt(np.clip(1 - fraction * fraction, 0, 1)) * outline.radius * 0.55
        slope_y, slope_x = np.gradient(blur(dome.astype(np.float32), 1.5))
        shading = np.clip(1 + 0.55 * (slope_x * light[0] + slope_y * light[1]), 0.55, 1.35)
        patch_HWC = patch_HWC * (1 + (shading - 1) * step(1.12 - fraction, 0.1))[..., None]
    grain = noise(rng, side, 6) * 0.6 + noise(rng, side, 3) * 0.4
    if look.surface == "scaly":
        flakes = (step(fine * 0.7 + grain * 0.5 - 0.55, 0.25) * alpha * 0.72)[..., None]
        patch_HWC = patch_HWC * (1 - flakes) + np.array((0.93, 0.91, 0.88), np.float32) * flakes
    elif look.surface == "crusted":
        crust = (step(grain - 0.1, 0.3) * alpha * 0.85)[..., None]
        amber = np.array((0.66, 0.47, 0.17), np.float32) * (0.85 + 0.22 * fine[..., None])
        patch_HWC = patch_HWC * (1 - crust) + amber * crust
    elif look.surface == "ulcerated":
        depth = 0.60 + 0.07 * grain
        pit, rim = step(depth - fraction, 0.07)[..., None], step(0.10 - np.abs(fraction - depth - 0.05), 0.1)[..., None]
        flesh = np.array((0.52, 0.06, 0.08), np.float32) * (1 + 0.20 * fine[..., None])
        patch_HWC = patch_HWC * (1 - 0.45 * rim) + np.array((0.93, 0.80, 0.55), np.float32) * 0.45 * rim
        patch_HWC = patch_HWC * (1 - pit) + flesh * pit
    return np.asarray(patch_HWC, np.float32)


def hair(rng: Rng, patch: Patch, image_HWC: Float) -> Float:
    """The photograph with the patch's hairs over everything."""
    if not patch.hairs:
        return image_HWC
    lines, heading = [], float(rng.uniform(0, np.pi))
    for _ in range(patch.hairs):
        turns = heading + rng.normal(0, 0.25) + np.cumsum(rng.normal(0, 0.06, 12))
        steps = np.stack([np.cos(turns), np.sin(turns)], axis=1) * rng.uniform(0.008, 0.02)
        lines.append(rng.uniform(0, 1, 2) + np.cumsum(steps, axis=0))
    cover = blur(strokes(patch.size, lines, [2] * len(lines), [200] * len(lines)), 0.6)[..., None] * 0.8
    return np.asarray(image_HWC * (1 - cover) + np.array((0.13, 0.09, 0.07), np.float32) * cover, np.float32)


def stored(rng: Rng, image_HWC: Float) -> NDArray[np.uint8]:
    """8-bit RGB with a camera's noise, (H, W, 3) uint8."""
    side = image_HWC.shape[0]
    grain = noise(rng, side, 1) * np.float32(0.008)
    colour = cv2.resize(rng.standard_normal((side // 2, side // 2, 3), dtype=np.float32), (side, side))
    photograph = image_HWC + grain[..., None] + colour * np.float32(0.006)
    return np.asarray(np.clip(np.round(photograph * np.float32(255)), 0, 255), np.uint8)
