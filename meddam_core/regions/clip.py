"""One region in a volume or clip -> the eight frames that the joint image/video model is shown.

    masks = clip_masks(region, num_frames)                  # the region on every frame of the row
    chosen = clip_frames([mask.any() for mask in masks])    # which eight

Follows NVlabs/describe-anything (`examples/dam_video_*.py`, `demo_video.py`): frames at equal steps from the first to
the last that shows the region, rounded down. A region on fewer than eight frames has some of them twice, so that the
prompt always holds as many views as its text says.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from meddam_core.records import Reason, Region, RowError
from meddam_core.regions.geometry import box_mask
from meddam_core.regions.masks import mask_of

CLIP_FRAMES = 8


def clip_frames(shows: Sequence[bool], num_frames: int = CLIP_FRAMES) -> list[int]:
    """Ordinals of `num_frames` frames among those that show the region, ascending. Raises RowError(mask_empty)."""
    there = np.flatnonzero(shows)
    if not len(there):
        raise RowError(Reason.MASK_EMPTY, "no frame shows the region")
    return [int(i) for i in there[np.linspace(0, len(there) - 1, num_frames).astype(int)]]


def clip_masks(region: Region, size: tuple[int, int], num_frames: int) -> list[NDArray[np.uint8]]:
    """(H, W) uint8 of the region on each of the row's frames: its own there, else the same on all of them.

    `size` is (width, height). Raises RowError(mask_size) where the row has another number of frames.
    """
    if region.frame_masks is None:
        mask_HW = box_mask(region.box, size) if region.mask is None else mask_of(region.mask)
        return [mask_HW] * num_frames
    if len(region.frame_masks) != num_frames:
        raise RowError(Reason.MASK_SIZE, f"{len(region.frame_masks)} masks for {num_frames} frames")
    masks = [mask_of(rle) for rle in region.frame_masks]
    if any(mask_HW.shape != (size[1], size[0]) for mask_HW in masks):
        raise RowError(Reason.MASK_SIZE, "a frame's mask is not of the frame's size")
    return masks
