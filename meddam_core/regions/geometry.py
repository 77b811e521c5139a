"""Boxes: validation, clipping, margins, and the tight box of a mask.

    box = checked_box((10.2, 5, 40, 30.7), size=(512, 512))      # (10, 5, 40, 31)
    box = with_margin(box, 0.10, size=(512, 512))                # (7, 2, 43, 34)

Invariants:
- a box is (x0, y0, x1, y1) in pixels, half-open, x to the right and y down; `size` is (width, height);
- every box that leaves this file lies inside the image and holds at least one pixel;
- a margin is a share of the box's own width and height, added on each side (the paper's Section 2.2 says "10 %" and
  leaves open of what and where).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

from meddam_core.records import Box, Reason, RowError

MIN_INSIDE = 0.5
"""A box of which less than this share lies inside the image is rejected: it was drawn on another image or scale."""


def checked_box(box: Sequence[float], size: tuple[int, int]) -> Box:
    """The smallest whole-pixel box that holds `box`, clipped to an image of `size` (width, height).

    Raises RowError: bad_annotation (not four finite numbers), box_empty (no width or height), or box_outside (less than
    half of it lies inside the image).
    """
    if len(box) != 4 or not all(isinstance(v, int | float | np.number) and math.isfinite(v) for v in box):
        raise RowError(Reason.BAD_ANNOTATION, "a box is four finite numbers: x0, y0, x1, y1")
    x0, y0, x1, y1 = (float(v) for v in box)
    if x1 <= x0 or y1 <= y0:
        raise RowError(Reason.BOX_EMPTY, f"the box is {x1 - x0:g} wide and {y1 - y0:g} high")
    width, height = size
    inside = max(0.0, min(x1, width) - max(x0, 0.0)) * max(0.0, min(y1, height) - max(y0, 0.0))
    if inside < MIN_INSIDE * (x1 - x0) * (y1 - y0):
        share = inside / ((x1 - x0) * (y1 - y0))
        raise RowError(Reason.BOX_OUTSIDE, f"{share:.0%} of the box lies inside the image of {width} x {height}")
    return clipped((math.floor(x0), math.floor(y0), math.ceil(x1), math.ceil(y1)), size)


def clipped(box: Box, size: tuple[int, int]) -> Box:
    """The part of `box` inside an image of `size` (width, height). Raises RowError(box_outside) where there is none."""
    x0, y0 = max(box[0], 0), max(box[1], 0)
    x1, y1 = min(box[2], size[0]), min(box[3], size[1])
    if x1 <= x0 or y1 <= y0:
        raise RowError(Reason.BOX_OUTSIDE, f"the box lies outside the image of {size[0]} x {size[1]}")
    return x0, y0, x1, y1


def with_margin(box: Box, margin: float, size: tuple[int, int]) -> Box:
    """`box` grown by `margin` times its width on the left and right and its height above and below, clipped.

    The growth is rounded to whole pixels, halves up. margin 0.1 makes a box 1.2 times as wide. Raises ValueError for a
    negative margin.
    """
    if not 0 <= margin < math.inf:
        raise ValueError(f"margin is {margin}; it is a share of the box's width and height, 0 or more")
    grow_x = math.floor(margin * (box[2] - box[0]) + 0.5)
    grow_y = math.floor(margin * (box[3] - box[1]) + 0.5)
    return clipped((box[0] - grow_x, box[1] - grow_y, box[2] + grow_x, box[3] + grow_y), size)


def tight_box(mask_HW: NDArray[np.uint8]) -> Box:
    """The smallest box that holds every nonzero pixel of a mask. Raises RowError(mask_empty)."""
    if mask_HW.ndim != 2:
        raise ValueError(f"a mask has two axes, this one has the shape {mask_HW.shape}")
    inside_HW = mask_HW if mask_HW.dtype == np.uint8 else mask_HW != 0
    x, y, width, height = cv2.boundingRect(np.ascontiguousarray(inside_HW).view(np.uint8))
    if not width:
        raise RowError(Reason.MASK_EMPTY, "the region's mask has no pixel")
    return x, y, x + width, y + height


def box_mask(box: Box, size: tuple[int, int]) -> NDArray[np.uint8]:
    """(H, W) uint8, 1 inside `box`. `size` is (width, height)."""
    x0, y0, x1, y1 = clipped(box, size)
    mask_HW = np.zeros((size[1], size[0]), np.uint8)
    mask_HW[y0:y1, x0:x1] = 1
    return mask_HW


def intersection_over_union(a: Box, b: Box) -> float:
    """Shared area over joint area of two boxes, 0 to 1."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0) * max(height, 0)
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)
