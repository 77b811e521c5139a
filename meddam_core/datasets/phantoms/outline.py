"""The outlines of lesions: round, oval or irregular; smooth, lobulated, spiculated or ill-defined; whole, twins, core.

An outline is a radius by angle. Fields over a patch of pixels follow from it: `fraction` (0 at the centre, 1 on the
outline), the masks of its parts, and the spicules.

Arrays: P a square patch of pixels around the lesion's centre.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import cv2
import numpy as np
from numpy.typing import NDArray

Rng: TypeAlias = np.random.Generator
Float: TypeAlias = NDArray[np.floating[Any]]
"""float32 where it covers pixels."""
Bool = NDArray[np.bool_]

_ANGLES = np.linspace(0, 2 * np.pi, 720, endpoint=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Spicule:
    """A thin ray that leaves the outline."""

    angle: float
    length: float
    """Share of the radius."""
    width_px: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Outline:
    """Radius by angle, in units of `radius`; never above 1."""

    radius: float
    """Pixels from the centre to the farthest point of the body."""
    aspect: float
    turn: float
    waves: tuple[tuple[int, float, float], ...]
    """(periods, amplitude, phase) of the irregularity."""
    lobes: int
    lobe_phase: float
    spicules: tuple[Spicule, ...]
    soft: bool
    """Whether the edge fades out."""
    peak: float = 1.0
    """What the raw radius is divided by so that its largest value is 1."""

    @property
    def reach(self) -> float:
        """Pixels from the centre to the farthest point, spicules and fading included."""
        return self.radius * (1 + max((s.length for s in self.spicules), default=0.15 if self.soft else 0.0))

    def scaled(self, factor: float) -> Outline:
        """The same outline, larger or smaller."""
        return replace(self, radius=self.radius * factor)

    def radius_at(self, angle: Float) -> Float:
        """Radius in pixels at each angle."""
        return self._raw(angle) * (self.radius / self.peak)

    def _raw(self, angle: Float) -> Float:
        along, across = np.cos(angle - self.turn), np.sin(angle - self.turn)
        raw = 1 / np.sqrt(along**2 + (across * self.aspect) ** 2)
        for periods, amplitude, phase in self.waves:
            raw = raw * (1 + amplitude * np.cos(periods * angle + phase))
        if self.lobes:
            raw = raw * (0.82 + 0.18 * np.abs(np.cos(self.lobes * angle / 2 + self.lobe_phase)))
        return np.asarray(raw)

    def points(self) -> NDArray[np.float64]:
        """(720, 2): x and y of the outline around its centre, pixels."""
        radius = self.radius_at(_ANGLES)
        return np.stack([radius * np.cos(_ANGLES), radius * np.sin(_ANGLES)], axis=1)

    def narrowest_px(self) -> float:
        """The shorter side of the outline's box."""
        return float(np.ptp(self.points(), axis=0).min())

    def longest_px(self) -> float:
        """The longest diameter of the body, any direction."""
        turns = np.linspace(0, np.pi, 60, endpoint=False)
        return float(np.ptp(self.points() @ np.stack([np.cos(turns), np.sin(turns)]), axis=0).max())

    def fraction(self, dx: Float, dy: Float) -> Float:
        """Distance from the centre over the outline's radius in that direction; below 1 inside the body."""
        table = self.radius_at(_ANGLES).astype(np.float32)
        at = np.round(np.arctan2(dy, dx) * (len(table) / (2 * np.pi))).astype(np.int32) % len(table)
        return np.hypot(dx, dy) / table[at]

    def alpha(self, fraction: Float) -> Float:
        """How much of the lesion a pixel holds, 0 to 1: antialiased where sharp, fading where ill-defined."""
        if self.soft:
            ramp = np.clip((1.18 - fraction) / 0.7, 0, 1)
            return np.asarray(ramp * ramp * (3 - 2 * ramp))
        return np.asarray(np.clip((1 - fraction) * (self.radius / 1.6) + 0.5, 0, 1))

    def rays(self, shape: tuple[int, int], centre: tuple[float, float]) -> Float:
        """The spicules' alpha over a patch, fading towards their tips."""
        canvas = np.zeros(shape, np.uint8)
        for spicule in self.spicules:
            direction = np.array([np.cos(spicule.angle), np.sin(spicule.angle)])
            foot = float(self.radius_at(np.array([spicule.angle]))[0]) - 2
            for start, end, value in ((0.0, 0.6, 235), (0.6, 1.0, 150)):
                ends = [np.array(centre) + direction * (foot + self.radius * spicule.length * s) for s in (start, end)]
                points = [tuple(int(v * 16) for v in p) for p in ends]
                cv2.line(canvas, points[0], points[1], value, spicule.width_px, cv2.LINE_AA, shift=4)
        return canvas.astype(np.float32) / 255


def draw_outline(rng: Rng, shape: str, margin: str, form: str, radius: float) -> Outline:
    """An outline of that shape and margin. Twins and core with halo are near round: their boxes must be equal."""
    aspect = float(rng.uniform(1.3, 1.42)) if shape == "oval" else float(rng.uniform(1.0, 1.05))
    waves: tuple[tuple[int, float, float], ...] = ()
    if shape == "irregular":
        waves = tuple((k, float(rng.uniform(0.04, 0.085)), float(rng.uniform(0, 6.28))) for k in (2, 3, 5))
    if margin == "irregular":  # notches, so that it differs from an irregular shape
        waves += tuple((k, float(rng.uniform(0.035, 0.055)), float(rng.uniform(0, 6.28))) for k in (11, 13, 17))
    if form != "whole":
        aspect, waves = 1.0, ()
    lobes = int(rng.integers(5, 8)) if margin == "lobulated" and form == "whole" else 0
    spicules: tuple[Spicule, ...] = ()
    if margin == "spiculated":
        count = int(rng.integers(16, 25))
        spicules = tuple(
            Spicule(
                angle=float((i + rng.uniform(-0.35, 0.35)) * 2 * np.pi / count),
                length=float(rng.uniform(0.28, 0.6)),
                width_px=int(rng.integers(2, 4)),
            )
            for i in range(count)
        )
    outline = Outline(
        radius=radius, aspect=aspect, turn=float(rng.uniform(0, np.pi)), waves=waves, lobes=lobes,
        lobe_phase=float(rng.uniform(0, 6.28)), spicules=spicules, soft=margin == "ill-defined",
    )  # fmt: skip
    return replace(outline, peak=float(outline._raw(_ANGLES).max()))


def core_mask(fraction: Float, angle: Float, radius: float) -> Bool:
    """A core with four legs that reach the outline at its extremes, so that core and halo have equal boxes."""
    bent = angle + 0.5 * np.sin(np.pi * fraction)  # the legs wind, but end where the outline is farthest out
    leg = np.abs((bent + np.pi / 4) % (np.pi / 2) - np.pi / 4) * fraction * radius < 2.5 + radius * 0.12 * (
        1 - fraction
    )
    return np.asarray((fraction < 0.45) | (leg & (fraction < 1)))


def twin_mask(fraction: Float, angle: Float) -> Bool:
    """The first of two interlocking propellers that share the disc and touch all four sides of its box."""
    return np.sin(2 * angle + 2.6 * (1 - fraction)) > 0
