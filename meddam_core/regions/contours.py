"""Closed contours in pixel coordinates -> a mask, by the even-odd rule.

    mask_HW = mask_of_contours([outer_N2, hole_M2], size=(512, 512))

A pixel is inside where its centre is: pixel centres are whole numbers, as in DICOM. Contours of one structure on one
slice are combined by exclusive or, so that a hole is a contour within a contour, whichever way round it is drawn, and
a keyhole (outer and inner contour joined by a channel of no width) gives the same (DICOM PS3.3 C.8.8.6.3).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def mask_of_contours(contours: Sequence[NDArray[np.float64]], size: tuple[int, int]) -> NDArray[np.uint8]:
    """(H, W) uint8, 1 inside, of contours (N, 2) of column and row; `size` is (width, height)."""
    width, height = size
    toggles = np.zeros((height, width + 1), np.int64)
    for contour in contours:
        start, end = contour, np.roll(contour, -1, axis=0)
        low, high = np.minimum(start[:, 1], end[:, 1]), np.maximum(start[:, 1], end[:, 1])
        # an edge crosses the rows from its lower end, included, to its upper end, excluded: corners count once
        first = np.clip(np.ceil(low), 0, height).astype(np.int64)
        last = np.clip(np.ceil(high), 0, height).astype(np.int64)
        counts = np.maximum(last - first, 0)
        edge = np.repeat(np.arange(len(contour)), counts)
        row = np.arange(len(edge)) - np.repeat(np.cumsum(counts) - counts, counts) + first[edge]
        share = (row - start[edge, 1]) / (end[edge, 1] - start[edge, 1])
        column = start[edge, 0] + share * (end[edge, 0] - start[edge, 0])
        np.add.at(toggles, (row, np.clip(np.ceil(column), 0, width).astype(np.int64)), 1)
    return (np.cumsum(toggles, axis=1)[:, :width] & 1).astype(np.uint8)


def area_of_contours(contours: Sequence[NDArray[np.float64]]) -> float:
    """Area in pixels, holes taken off where they are drawn the other way round; a rank, not a measurement."""
    total = 0.0
    for contour in contours:
        x, y = contour[:, 0], contour[:, 1]
        total += 0.5 * float(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1)))
    return abs(total)
