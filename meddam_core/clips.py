"""A region of a row with frames -> the model's input for a video prompt: eight frames, a full view and a crop of each.

    views_N8SS = clip_views(image, region, recipe, size=384)        # for prompts with eight <image>, such as dam-video

As in the reference: every frame has its own mask and its own focal crop, and nothing is shared between frames.

Arrays: N = 8 frames, 8 channels, S the model's input side; H rows, W columns.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from meddam_core.datasets.recipes import Recipe
from meddam_core.focal import FocalImage
from meddam_core.imaging.png import decode_png
from meddam_core.imaging.render import render_stored
from meddam_core.records import Image, Reason, Region, RowError
from meddam_core.regions.clip import clip_frames, clip_masks
from meddam_core.regions.geometry import box_mask, tight_box, with_margin


def clip_views(image: Image, region: Region, recipe: Recipe, size: int) -> NDArray[np.uint8]:
    """(8, 8, S, S) uint8: a region on the frames of its row that show it.

    Raises RowError: no_pixels where the row has no frames, mask_empty where none of them shows the region, and whatever
    is wrong with a frame's picture.
    """
    if not image.frames:
        raise RowError(Reason.NO_PIXELS, "the recipe shows eight frames, but the row has none: ingest it with context")
    picture_size = (image.width, image.height)
    masks = clip_masks(region, picture_size, len(image.frames))
    views: dict[int, NDArray[np.uint8]] = {}
    chosen = clip_frames([bool(mask_HW.any()) for mask_HW in masks])
    for i in sorted(set(chosen)):
        data = image.frames[i].bytes
        if data is None:
            raise RowError(Reason.NO_PIXELS, "a frame of the row holds no pixels")
        frame_HWC = render_stored(decode_png(data), image, recipe.window)
        mask_HW = masks[i]
        if recipe.prompt == "box":
            mask_HW = box_mask(with_margin(tight_box(mask_HW), recipe.margin, picture_size), picture_size)
        views[i] = FocalImage(frame_HWC, size, recipe.aspect).views(mask_HW)
    return np.stack([views[i] for i in chosen])
