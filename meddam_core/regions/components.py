"""Masks and label images -> their connected parts, each a region of its own.

    for part in components(mask_HW, min_area_px=20, join_px=8): ...       # lesions of a segmentation
    for value, mask_HW in by_value(labels_HW): ...                        # structures of a label image

Arrays: H rows, W columns; a part's mask is of its own box only.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image as PilImage

from meddam_core.records import Box, Reason, RowError


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Component:
    """A connected part of a mask."""

    box: Box
    """Tight around its pixels."""
    area_px: int
    mask_HW: NDArray[np.uint8]
    """(box height, box width), 1 inside."""

    def full(self, size: tuple[int, int]) -> NDArray[np.uint8]:
        """(H, W) uint8 of an image of `size` (width, height)."""
        whole_HW = np.zeros((size[1], size[0]), np.uint8)
        x0, y0, x1, y1 = self.box
        whole_HW[y0:y1, x0:x1] = self.mask_HW
        return whole_HW


def components(mask_HW: NDArray[Any], min_area_px: int = 1, join_px: int = 0) -> list[Component]:
    """The parts of a mask that are connected (corners count), from the top left, those below `min_area_px` left out.

    join_px: parts nearer than this are one: what a reader would call one lesion is often drawn in pieces.
    """
    inside = (mask_HW != 0).astype(np.uint8)
    joined = inside
    if join_px > 0:
        side = join_px + 1 - join_px % 2  # each part grows by half of the gap
        joined = np.asarray(cv2.dilate(inside, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side, side))), np.uint8)
    count, labels, stats, _ = cv2.connectedComponentsWithStats(joined, connectivity=8)
    found = []
    for i in range(1, count):
        x, y, w, h = (int(v) for v in stats[i, :4])
        part = (np.asarray(labels[y : y + h, x : x + w]) == i) & (inside[y : y + h, x : x + w] != 0)
        area = int(part.sum())
        if area < max(min_area_px, 1):
            continue
        rows, columns = np.flatnonzero(part.any(axis=1)), np.flatnonzero(part.any(axis=0))
        top, bottom, left, right = int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1
        tight = np.ascontiguousarray(part[top:bottom, left:right].astype(np.uint8))
        box = x + left, y + top, x + right, y + bottom
        found.append(Component(box=box, area_px=area, mask_HW=tight))
    return sorted(found, key=lambda c: (c.box[1], c.box[0], c.box))


def by_value(labels_HW: NDArray[Any]) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """(value, mask) for each value but 0 of a label image, ascending."""
    for value in np.unique(labels_HW):
        if value != 0:
            yield int(value), (labels_HW == value).astype(np.uint8)


def label_image(data: bytes, size: tuple[int, int]) -> NDArray[np.int64]:
    """(H, W): the values of a picture file that labels pixels (grey or palette index), of `size` (width, height).

    Of a colour picture each colour is a value: R << 16 | G << 8 | B. Raises RowError: mask_size, bad_annotation.
    """
    try:
        picture = PilImage.open(io.BytesIO(data))
        if picture.size != tuple(size):
            detail = f"the mask is {picture.width} x {picture.height}, the image {size[0]} x {size[1]}"
            raise RowError(Reason.MASK_SIZE, detail)  # before the pixels are decoded
        values = np.asarray(picture)
    except RowError:
        raise
    except (OSError, ValueError, SyntaxError, EOFError, PilImage.DecompressionBombError) as error:
        detail = f"the mask file cannot be read as a picture ({type(error).__name__})"
        raise RowError(Reason.BAD_ANNOTATION, detail) from None
    if values.ndim == 3:
        alpha = picture.mode in ("LA", "RGBA", "PA")
        opaque = values[..., -1] > 0 if alpha else np.ones(values.shape[:2], np.bool_)
        colours = values[..., : values.shape[2] - alpha].astype(np.int64)
        values = sum(colours[..., i] << (8 * (colours.shape[2] - 1 - i)) for i in range(colours.shape[2])) * opaque
    if values.dtype.kind not in "uib" or values.ndim != 2:
        raise RowError(Reason.BAD_ANNOTATION, "a label image holds whole numbers")
    return np.asarray(values, np.int64)
