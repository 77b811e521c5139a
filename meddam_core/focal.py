"""Image + region -> the 8-channel input of DAM: the full view and the focal crop, each RGB and mask.

Follows NVlabs/describe-anything (commit 153ad3d, `focal_crop`): the crop is three times the tight box, whose sides count
as at least 48 pixels; corners are truncated toward zero and clipped to the image without re-centring; image, mask and
their crops are each resized to S x S by PIL's bicubic filter on uint8, the mask as RGB 0/255.

Arrays: H, W rows and columns of the image; S the model's input side; C channels.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from meddam_core.records import Box

MIN_SIDE_PX = 48
EXPANSION = 3

Aspect = Literal["stretch", "pad"]


def focal_box(mask_HW: NDArray[np.uint8]) -> Box:
    """The focal crop (x0, y0, x1, y1), half-open, around the nonzero pixels. Raises RowError(mask_empty)."""
    raise NotImplementedError


def focal_views(
    image_HWC: NDArray[np.uint8], mask_HW: NDArray[np.uint8], size: int, aspect: Aspect = "stretch"
) -> NDArray[np.uint8]:
    """(8, S, S) uint8: full R, G, B, mask, then focal R, G, B, mask. Any nonzero mask pixel counts as inside."""
    raise NotImplementedError
