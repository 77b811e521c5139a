"""Noise and lines from which backgrounds and surfaces are made; vectorised, and quick at 1024 pixels."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

from meddam_core.datasets.phantoms.outline import Float, Rng


def noise(rng: Rng, side: int, grain_px: float) -> Float:
    """(side, side) float32, mean 0 and deviation about 1, of grains about `grain_px` wide."""
    if grain_px <= 1:
        return rng.standard_normal((side, side), dtype=np.float32)
    cells = max(int(side / grain_px), 2) + 2
    coarse = rng.standard_normal((cells, cells), dtype=np.float32)
    return enlarged(coarse, side) * np.float32(1.35)


def cloud(rng: Rng, side: int, coarsest_px: float, octaves: int) -> Float:
    """A sum of noises, each half as coarse and half as strong as the one before."""
    shrink = max(int(coarsest_px / 2 ** (octaves - 1) / 4), 1)  # painted no finer than its finest grain needs
    small = -(-side // shrink)
    total = np.zeros((small, small), np.float32)
    for octave in range(octaves):
        total += noise(rng, small, coarsest_px / shrink / 2**octave) * np.float32(0.5**octave)
    return enlarged(total, side) if shrink > 1 else total


def enlarged(image: Float, side: int) -> Float:
    """An image painted smaller than the canvas, brought to its size."""
    return cv2.resize(image, (side, side), interpolation=cv2.INTER_CUBIC).astype(np.float32, copy=False)


def blur(image: Float, sigma_px: float) -> Float:
    """Gaussian blur."""
    return cv2.GaussianBlur(image, (0, 0), sigma_px).astype(np.float32)


def coordinates(side: int) -> tuple[Float, Float]:
    """(x, y), each (side, side) float32, 0 to 1 over the canvas."""
    line = (np.arange(side, dtype=np.float32) + 0.5) / side
    return np.broadcast_to(line[None, :], (side, side)), np.broadcast_to(line[:, None], (side, side))


def step(distance: Float, softness: float) -> Float:
    """0 below and 1 above zero, with a smooth edge about `softness` wide."""
    ramp = np.clip(distance / np.float32(softness) + np.float32(0.5), 0, 1)
    return np.asarray(ramp * ramp * (3 - 2 * ramp))


def strokes(side: int, lines: Sequence[Float], widths: list[int], values: list[int]) -> Float:
    """Polylines (points in 0 to 1) as a float image, 0 to 1, the later over the earlier."""
    canvas = np.zeros((side, side), np.uint8)
    for points, width, value in zip(lines, widths, values, strict=True):
        fixed = np.round(np.asarray(points) * side * 16).astype(np.int32).reshape(-1, 1, 2)
        cv2.polylines(canvas, [fixed], False, value, max(width, 1), cv2.LINE_AA, shift=4)
    return canvas.astype(np.float32) / 255


def branches(
    rng: Rng, root: tuple[float, float], heading: float, spread: float, count: int, length: float, width: int
) -> tuple[list[Float], list[int], list[int]]:
    """Vessels that leave a root, wind a little, divide and thin out: lines, widths in pixels and brightnesses."""
    lines: list[Float] = []
    widths: list[int] = []
    values: list[int] = []
    waiting = [(root, heading + float(rng.uniform(-spread, spread)), length, float(width)) for _ in range(count)]
    while waiting:
        start, angle, reach, thick = waiting.pop()
        turns = np.cumsum(rng.normal(0, 0.16, 7)) + angle
        points = np.array(start) + np.cumsum(np.stack([np.cos(turns), np.sin(turns)], axis=1) * reach / 7, axis=0)
        lines.append(np.vstack([start, points]))
        widths.append(max(round(thick), 1))
        values.append(int(np.clip(70 + 45 * thick, 60, 235)))
        if thick > 1.2:
            for side in (-1, 1):
                turn = float(turns[-1]) + side * float(rng.uniform(0.25, 0.7))
                waiting.append(((float(points[-1][0]), float(points[-1][1])), turn, reach * 0.68, thick * 0.62))
    return lines, widths, values
