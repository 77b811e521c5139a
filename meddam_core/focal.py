"""Image + region -> the 8-channel input of DAM: the full view and the focal crop, each RGB and mask.

Follows NVlabs/describe-anything (commit 153ad3d, `focal_crop`): the crop is three times the tight box, whose sides
count as at least 48 pixels; corners are truncated toward zero and clipped to the image without re-centring; image,
mask and their crops are each resized to S x S by PIL's bicubic filter on uint8, the mask as 0/255.

`aspect="pad"` is the paper's other rule: the longest side becomes S and the rest is padded with black, image and mask
together (albumentations LongestMaxSize and PadIfNeeded). DAM's weights were trained with "stretch".

Invariants:
- the views are uint8; the network's value is (x / 255 - 0.5) / 0.5, for masks too;
- any nonzero mask pixel counts as inside;
- the same image, mask and size give the same bytes, whatever else is in the batch.

Arrays: H, W rows and columns of the image; S the model's input side; C channels (R, G, B).
"""

from __future__ import annotations

import os
from functools import cache, cached_property, lru_cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PilImage

from meddam_core.records import Box, Reason, RowError
from meddam_core.regions.geometry import box_mask, clipped, tight_box

MIN_SIDE_PX = 48
EXPANSION = 3

Aspect = Literal["stretch", "pad"]


def focal_box(mask_HW: NDArray[np.uint8]) -> Box:
    """The focal crop (x0, y0, x1, y1), half-open, around the nonzero pixels. Raises RowError(mask_empty)."""
    height, width = mask_HW.shape
    return expanded_box(tight_box(mask_HW), (width, height))


def expanded_box(box: Box, size: tuple[int, int], min_side_px: int = MIN_SIDE_PX) -> Box:
    """Three times `box` around its centre, clipped to an image of `size` (width, height), as the reference counts.

    `min_side_px=48` is the reference's "focal_crop", 0 its "context_crop".
    """
    x0, y0, x1, y1 = box
    side_x, side_y = max(x1 - x0, min_side_px), max(y1 - y0, min_side_px)
    # int(), not floor: the reference truncates toward zero, so a corner left of the image moves right by up to a pixel.
    left = int(x0 + (x1 - x0) / 2 - side_x / 2)
    top = int(y0 + (y1 - y0) / 2 - side_y / 2)
    before, after = (EXPANSION - 1) // 2, (EXPANSION + 1) // 2
    return (
        max(left - before * side_x, 0),
        max(top - before * side_y, 0),
        min(left + after * side_x, size[0]),
        min(top + after * side_y, size[1]),
    )


def focal_views(
    image_HWC: NDArray[np.uint8], mask_HW: NDArray[np.uint8], size: int, aspect: Aspect = "stretch"
) -> NDArray[np.uint8]:
    """(8, S, S) uint8: full R, G, B, mask, then focal R, G, B, mask. Any nonzero mask pixel counts as inside.

    For several regions of one image use FocalImage, which does the image's share once.
    Raises RowError(mask_empty), or RowError(mask_size) where the mask is not of the image's size.
    """
    return FocalImage(image_HWC, size, aspect).views(mask_HW)


class FocalImage:
    """An image whose regions are to be seen: what they share is done once.

    Args:
        image_HWC: (H, W, 3) uint8.
        size: S, the side of the views.
        aspect: how views become square.
    """

    def __init__(self, image_HWC: NDArray[np.uint8], size: int, aspect: Aspect = "stretch") -> None:
        _check_image(image_HWC)
        self._image_HWC = image_HWC
        self._size = size
        self._aspect = aspect
        # a crop of a grey picture is grey: one channel is cut out and resized
        self._pixels = np.ascontiguousarray(image_HWC[:, :, 0]) if _is_grey(image_HWC) else image_HWC
        self.full_SSC = full_view(image_HWC, size, aspect) if aspect == "pad" else _stretched(self._pixels, size)

    def views(self, mask_HW: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """(8, S, S) uint8 of one region, as `focal_views` gives them, with its errors."""
        height, width = self._image_HWC.shape[:2]
        self._check_size(mask_HW.shape)
        inner = tight_box(mask_HW)
        x0, y0, x1, y1 = crop = expanded_box(inner, (width, height))
        if self._aspect == "pad":
            views = self._views()
            views[3] = _padded(_binary(mask_HW), self._size)
            crop_HWC, crop_mask_HW = self._image_HWC[y0:y1, x0:x1], _binary(mask_HW[y0:y1, x0:x1])
            both = _letterbox(self._size)(image=np.ascontiguousarray(crop_HWC), mask=crop_mask_HW)
            views[4:7], views[7] = both["image"].transpose(2, 0, 1), both["mask"]
            return views
        views = self._stretched_views(crop)
        views[3] = _stretched_mask(mask_HW, inner, self._size)
        views[7] = _stretched_mask(mask_HW[y0:y1, x0:x1], _within(inner, crop), self._size)
        return views

    def box_views(self, box: Box, size: tuple[int, int]) -> NDArray[np.uint8]:
        """(8, S, S) uint8 of a box in an image of `size` (width, height): as `views` of its mask, in half the time.

        Raises RowError(box_outside), or RowError(mask_size) where the image is of another size.
        """
        width, height = size
        if self._aspect == "pad":
            return self.views(box_mask(box, size))
        self._check_size((height, width))
        box = clipped(box, size)
        x0, y0, x1, y1 = crop = expanded_box(box, (width, height))
        views = self._stretched_views(crop)
        views[3] = _stretched_box(width, height, box, self._size)
        views[7] = _stretched_box(x1 - x0, y1 - y0, _within(box, crop), self._size)
        return views

    def _check_size(self, shape: tuple[int, ...]) -> None:
        if shape != self._image_HWC.shape[:2]:
            found = self._image_HWC.shape[:2]
            raise RowError(Reason.MASK_SIZE, f"the mask is {shape}, the image {found} (rows, columns)")

    def _stretched_views(self, crop: Box) -> NDArray[np.uint8]:
        """The views but for their masks."""
        views, (x0, y0, x1, y1) = self._views(), crop
        pixels = _bicubic(self._pixels[y0:y1, x0:x1], self._size, self._size)
        views[4:7] = pixels if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
        return views

    def _views(self) -> NDArray[np.uint8]:
        """Views of which only the whole image is there yet."""
        views = np.empty((8, self._size, self._size), np.uint8)
        views[0:3] = self.full_SSC.transpose(2, 0, 1)
        return views


def full_view(image_HWC: NDArray[np.uint8], size: int, aspect: Aspect = "stretch") -> NDArray[np.uint8]:
    """(S, S, 3) uint8: the whole image as DAM sees it."""
    _check_image(image_HWC)
    return _resized_plane(image_HWC, size, aspect)


def region_crop(
    image_HWC: NDArray[np.uint8], box: Box, size: int | None = None, aspect: Aspect = "pad"
) -> NDArray[np.uint8]:
    """The pixels inside `box`: the crop that other VLMs are given (Section 2.2 of the paper).

    `box` is the region's box with its margin already added (meddam_core.regions.masks.prompt_box). With `size` the crop
    is resized to (S, S, 3), by default keeping its aspect ratio. Raises RowError(box_empty) where nothing lies inside.
    """
    _check_image(image_HWC)
    x0, y0, x1, y1 = box
    crop_HWC = image_HWC[max(y0, 0) : max(y1, 0), max(x0, 0) : max(x1, 0)]
    if not crop_HWC.size:
        raise RowError(Reason.BOX_EMPTY, f"the box {box} holds no pixel of the image")
    return crop_HWC.copy() if size is None else _resized_plane(crop_HWC, size, aspect)


def _check_image(image_HWC: NDArray[np.uint8]) -> None:
    # RGBA, palette and 16-bit images resize to something else in PIL; render them to RGB first.
    if image_HWC.dtype != np.uint8 or image_HWC.ndim != 3 or image_HWC.shape[2] != 3:
        raise ValueError(
            f"an image is (H, W, 3) uint8, this one is {image_HWC.shape} {image_HWC.dtype}; render it first"
        )


def _resized_plane(image_HWC: NDArray[np.uint8], size: int, aspect: Aspect) -> NDArray[np.uint8]:
    if aspect == "pad":
        padded: NDArray[np.uint8] = _letterbox(size)(image=np.ascontiguousarray(image_HWC))["image"]
        return padded
    if aspect != "stretch":
        raise ValueError(f"aspect is {aspect!r}; use 'stretch' or 'pad'")
    return _stretched(image_HWC, size)


def _padded(mask_HW: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    blank_HWC = np.zeros((*mask_HW.shape, 3), np.uint8)
    padded: NDArray[np.uint8] = _letterbox(size)(image=blank_HWC, mask=np.ascontiguousarray(mask_HW))["mask"]
    return padded


def _stretched(pixels: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """(S, S, 3) of a picture, or of one channel (H, W) of a grey one: PIL resizes channels one by one."""
    resized = _bicubic(pixels, size, size)
    return resized if resized.ndim == 3 else np.repeat(resized[:, :, None], 3, axis=2)


def _binary(mask_HW: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.where(mask_HW != 0, np.uint8(255), np.uint8(0))


def _stretched_mask(mask_HW: NDArray[np.uint8], inner: Box, size: int) -> NDArray[np.uint8]:
    """(S, S): as PIL resizes the whole mask, doing only the part around `inner`, its tight box.

    PIL's filter is separable, with 8 bits in between, so it matters which axis it takes first; zeros stay zeros.
    To ask PIL that costs more than a mask: a size that comes for the first time is resized whole.
    """
    height, width = mask_HW.shape
    order = _order(width, height, size)
    order.uses += 1
    if order.uses == 1:
        return _bicubic(_binary(mask_HW), size, size)
    if not order.rows_first:
        turned = (inner[1], inner[0], inner[3], inner[2])
        return _stretched_rows_first(mask_HW.T, turned, size).T
    return _stretched_rows_first(mask_HW, inner, size)


def _stretched_rows_first(mask_HW: NDArray[np.uint8], inner: Box, size: int) -> NDArray[np.uint8]:
    rows_hS = _bicubic(_binary(mask_HW[inner[1] : inner[3]]), size, inner[3] - inner[1])
    columns = np.flatnonzero(rows_hS.any(axis=0))
    out_SS = np.zeros((size, size), np.uint8)
    if len(columns):
        first, last = columns[0], columns[-1] + 1
        strip_Hk = np.zeros((len(mask_HW), last - first), np.uint8)
        strip_Hk[inner[1] : inner[3]] = rows_hS[:, first:last]
        out_SS[:, first:last] = _bicubic(strip_Hk, last - first, size)
    return out_SS


def _stretched_box(width: int, height: int, box: Box, size: int) -> NDArray[np.uint8]:
    """(S, S): as PIL resizes the mask of a box. All its rows are alike, and most of its columns."""
    order = _order(width, height, size)
    order.uses += 1
    if order.uses == 1:
        return _bicubic(_binary(box_mask(box, (width, height))), size, size)
    if not order.rows_first:
        return _stretched_box_rows_first(height, width, (box[1], box[0], box[3], box[2]), size).T
    return _stretched_box_rows_first(width, height, box, size)


def _stretched_box_rows_first(width: int, height: int, box: Box, size: int) -> NDArray[np.uint8]:
    row_1W = np.zeros((1, width), np.uint8)
    row_1W[0, box[0] : box[2]] = 255
    values_U, which_S = np.unique(_bicubic(row_1W, size, 1)[0], return_inverse=True)
    columns_HU = np.zeros((height, len(values_U)), np.uint8)
    columns_HU[box[1] : box[3]] = values_U
    stretched_SS: NDArray[np.uint8] = np.take(_bicubic(columns_HU, len(values_U), size), which_S, axis=1)
    return stretched_SS


def _within(inner: Box, outer: Box) -> Box:
    """`inner` in coordinates that begin at the corner of `outer`."""
    return (inner[0] - outer[0], inner[1] - outer[1], inner[2] - outer[0], inner[3] - outer[1])


class _Order:
    """What is known of how PIL resizes pictures of one size."""

    def __init__(self, width: int, height: int, size: int) -> None:
        self._sizes = (width, height, size)
        self.uses = 0

    @cached_property
    def rows_first(self) -> bool:
        """Whether PIL resizes along the rows before it does along the columns. Asked of PIL itself: newer versions
        choose by cost, older ones always take the rows."""
        width, height, size = self._sizes
        noise_HW = np.random.default_rng(0).integers(0, 2, (height, width), np.uint8) * np.uint8(255)
        return np.array_equal(_bicubic(noise_HW, size, size), _bicubic(_bicubic(noise_HW, size, height), size, size))


@lru_cache(maxsize=4096)
def _order(width: int, height: int, size: int) -> _Order:
    return _Order(width, height, size)


def _bicubic(plane: NDArray[np.uint8], width: int, height: int) -> NDArray[np.uint8]:
    return np.asarray(
        PilImage.fromarray(np.ascontiguousarray(plane)).resize((width, height), PilImage.Resampling.BICUBIC)
    )


def _is_grey(image_HWC: NDArray[np.uint8]) -> bool:
    if not image_HWC.strides[2]:  # one channel, seen three times
        return True

    def equal(part: NDArray[np.uint8]) -> bool:
        return np.array_equal(part[..., 0], part[..., 1]) and np.array_equal(part[..., 0], part[..., 2])

    return equal(image_HWC[::16, ::16]) and equal(image_HWC)  # a few pixels tell a colour picture


@cache
def _letterbox(size: int) -> Any:
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # its import would ask the package index for a newer version
    import albumentations as A
    import cv2

    cv2.setNumThreads(0)  # one process a core already; OpenCV's own threads would fight them
    return A.Compose(
        [
            A.LongestMaxSize(
                max_size=size,
                interpolation=cv2.INTER_CUBIC,
                mask_interpolation=cv2.INTER_LINEAR,
                area_for_downscale="image_mask",
            ),
            A.PadIfNeeded(min_height=size, min_width=size, border_mode=cv2.BORDER_CONSTANT, fill=0, fill_mask=0),
        ]
    )
