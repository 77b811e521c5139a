"""Masks: COCO run lengths, polygons and PNG files <-> (H, W) arrays, and the mask that DAM is prompted with.

    mask_HW = mask_of_segmentation({"size": [480, 640], "counts": "..."}, size=(640, 480))
    prompt_HW = region_prompt_mask(region, size=(640, 480), margin=0.10, prompt="box")

Invariants:
- arrays are (H, W) uint8, 0 outside and 1 inside; `size` is (width, height), a COCO `size` is [height, width];
- nothing is allocated before a run length's own size was compared with the image's, and no count is trusted: broken run
  lengths and wild polygons raise RowError(bad_annotation) here, where pycocotools would read past its memory.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PilImage
from pycocotools import mask as coco_mask

from meddam_core.records import Box, Reason, Region, Rle, RowError
from meddam_core.regions.geometry import box_mask, tight_box, with_margin

Prompt = Literal["box", "mask"]
"""What a region is shown to the model as: its box with the recipe's margin, or its own mask where it has one."""


def rle_of(mask_HW: NDArray[np.uint8]) -> Rle:
    """A mask as compressed COCO run lengths; any nonzero pixel counts as inside."""
    encoded = coco_mask.encode(np.asfortranarray(mask_HW != 0).astype(np.uint8, order="F"))
    return Rle(size=(mask_HW.shape[0], mask_HW.shape[1]), counts=encoded["counts"].decode("ascii"))


def mask_of(rle: Rle) -> NDArray[np.uint8]:
    """(H, W) uint8, 1 inside. Raises RowError(bad_annotation) for broken run lengths."""
    return _filled(counts_of(rle.counts), rle.size[0], rle.size[1])


def counts_of(compressed: str) -> NDArray[np.int64]:
    """The run lengths in a COCO string: 5 bits a character, from the third on as differences to the last but one.

    Raises RowError(bad_annotation).
    """
    counts: list[int] = []
    value = shift = 0
    for character in compressed:
        code = ord(character) - 48
        if not 0 <= code < 64 or shift > 60:
            raise RowError(Reason.BAD_ANNOTATION, "the mask's run lengths hold a character that cannot be there")
        value |= (code & 0x1F) << shift
        shift += 5
        if code & 0x20:
            continue
        if code & 0x10:
            value -= 1 << shift
        counts.append(value + (counts[-2] if len(counts) > 2 else 0))
        value = shift = 0
    if shift:
        raise RowError(Reason.BAD_ANNOTATION, "the mask's run lengths end in the middle of a number")
    return np.asarray(counts, np.int64)


def _filled(counts: NDArray[np.int64], height: int, width: int) -> NDArray[np.uint8]:
    if (counts < 0).any() or int(counts.sum()) != height * width:
        raise RowError(Reason.BAD_ANNOTATION, "the mask's run lengths do not add up to its size")
    values = np.arange(len(counts), dtype=np.uint8) & 1
    return np.ascontiguousarray(np.repeat(values, counts).reshape(width, height).T)


def mask_of_segmentation(segmentation: Any, size: tuple[int, int]) -> NDArray[np.uint8]:
    """The mask of a COCO `segmentation`: run lengths (string or list), one polygon, or a list of polygons.

    A polygon is a flat list x0, y0, x1, y1, ... in pixels. Raises RowError: mask_size, mask_empty, bad_annotation.
    """
    if isinstance(segmentation, Mapping):
        mask_HW = _mask_of_run_lengths(segmentation, size)
    elif isinstance(segmentation, Sequence) and not isinstance(segmentation, str) and len(segmentation):
        first = segmentation[0]
        flat = isinstance(first, int | float)
        mask_HW = mask_of_polygons([segmentation] if flat else segmentation, size)
    else:
        raise RowError(Reason.BAD_ANNOTATION, "a mask is run lengths {size, counts} or a list of polygons")
    return checked_mask(mask_HW, size)


def _mask_of_run_lengths(segmentation: Mapping[str, Any], size: tuple[int, int]) -> NDArray[np.uint8]:
    rle_size, counts = segmentation.get("size"), segmentation.get("counts")
    if not isinstance(rle_size, Sequence) or len(rle_size) != 2 or not all(isinstance(v, int) for v in rle_size):
        raise RowError(Reason.BAD_ANNOTATION, "run lengths need a size of two whole numbers: [height, width]")
    _check_size(rle_size[1], rle_size[0], size)
    if isinstance(counts, bytes):
        counts = counts.decode("ascii", errors="replace")
    if isinstance(counts, str):
        return _filled(counts_of(counts), rle_size[0], rle_size[1])
    if isinstance(counts, Sequence) and all(type(v) is int and abs(v) < 1 << 40 for v in counts):
        return _filled(np.asarray(counts, np.int64), rle_size[0], rle_size[1])
    raise RowError(Reason.BAD_ANNOTATION, "run lengths need counts: a string or a list of whole numbers")


def mask_of_polygons(polygons: Sequence[Sequence[float]], size: tuple[int, int]) -> NDArray[np.uint8]:
    """The union of polygons as pycocotools fills them. Raises RowError(bad_annotation)."""
    width, height = size
    for polygon in polygons:
        numbers = isinstance(polygon, Sequence) and all(
            isinstance(v, int | float) and math.isfinite(v) for v in polygon
        )
        if not numbers or len(polygon) < 6 or len(polygon) % 2:
            raise RowError(Reason.BAD_ANNOTATION, "a polygon is at least three points: x0, y0, x1, y1, x2, y2, ...")
        # pycocotools allocates in proportion to a polygon's length, so a wild coordinate would exhaust memory
        if not (-width <= min(polygon[::2]) and max(polygon[::2]) <= 2 * width):
            raise RowError(Reason.BOX_OUTSIDE, "a polygon reaches far outside the image")
        if not (-height <= min(polygon[1::2]) and max(polygon[1::2]) <= 2 * height):
            raise RowError(Reason.BOX_OUTSIDE, "a polygon reaches far outside the image")
    runs = coco_mask.merge(coco_mask.frPyObjects([[float(v) for v in p] for p in polygons], height, width))
    return _filled(counts_of(runs["counts"].decode("ascii")), height, width)


def mask_of_png(data: bytes, size: tuple[int, int]) -> NDArray[np.uint8]:
    """The mask in a picture file: every pixel that is not black (index 0 of a palette) and not transparent.

    Raises RowError: mask_size, mask_empty, or bad_annotation where the file cannot be read.
    """
    try:
        picture = PilImage.open(io.BytesIO(data))
        _check_size(picture.width, picture.height, size)  # before the pixels are decoded
        pixels = np.asarray(picture)
    except RowError:
        raise
    except (OSError, ValueError, SyntaxError, EOFError, PilImage.DecompressionBombError) as error:
        raise RowError(
            Reason.BAD_ANNOTATION, f"the mask file cannot be read as a picture ({type(error).__name__})"
        ) from error
    if pixels.ndim == 3 and picture.mode in ("LA", "RGBA", "PA"):
        pixels = np.where(pixels[..., -1:] > 0, pixels[..., :-1], 0)
    inside_HW = np.asarray(pixels.any(axis=-1) if pixels.ndim == 3 else pixels, dtype=bool)
    return checked_mask(inside_HW.astype(np.uint8), size)


def checked_mask(mask_HW: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """`mask_HW` itself, if it is of an image's `size` (width, height) and not empty.

    Raises RowError: mask_size, mask_empty.
    """
    _check_size(mask_HW.shape[1], mask_HW.shape[0], size)
    if not mask_HW.any():
        raise RowError(Reason.MASK_EMPTY, "the region's mask has no pixel")
    return mask_HW


def _check_size(width: int, height: int, size: tuple[int, int]) -> None:
    if (width, height) != tuple(size):
        raise RowError(Reason.MASK_SIZE, f"the mask is {width} x {height}, the image {size[0]} x {size[1]}")


def region_prompt_mask(
    region: Region, size: tuple[int, int], margin: float, prompt: Prompt = "box"
) -> NDArray[np.uint8]:
    """(H, W) uint8, 1 inside: the region as DAM is shown it.

    `prompt="box"`: the region's box with `margin` added; `prompt="mask"`: the region's own mask, where the margin is
    not used, or the box where it has no mask. `size` is (width, height). Raises RowError: mask_size, mask_empty,
    box_outside.
    """
    if prompt == "mask" and region.mask is not None:
        _check_size(region.mask.size[1], region.mask.size[0], size)
        return checked_mask(mask_of(region.mask), size)
    return box_mask(with_margin(region.box, margin, size), size)


def prompt_box(region: Region, size: tuple[int, int], margin: float, prompt: Prompt = "box") -> Box:
    """The box whose pixels other VLMs are given: with the margin, or tight around the mask for a mask prompt.

    Equals `tight_box(region_prompt_mask(...))`. Raises RowError as that does.
    """
    if prompt == "mask" and region.mask is not None:
        return tight_box(region_prompt_mask(region, size, margin, prompt))
    return with_margin(region.box, margin, size)
