"""Pictures inside a report: thumbnails as data URIs and region outlines as SVG paths, nothing loaded from elsewhere.

The outline is drawn over the picture by the browser, so that it stays sharp and can be switched off to see the pixels.
Arrays: H, W rows and columns; C = 3, RGB.
"""

from __future__ import annotations

import base64
import io

import contourpy
import numpy as np
from numpy.typing import NDArray
from PIL import Image as PILImage

from meddam_core.records import Box


def data_uri(image_HWC: NDArray[np.uint8], max_side_px: int, quality: int = 86) -> str:
    """The picture as a JPEG data URI, its longer side at most `max_side_px`. Never enlarged.

    Raises ValueError for an array that is not (H, W, 3) uint8.
    """
    if image_HWC.dtype != np.uint8 or image_HWC.ndim != 3 or image_HWC.shape[2] != 3:
        raise ValueError(f"a picture must be (H, W, 3) uint8, got {image_HWC.shape} {image_HWC.dtype}")
    picture = PILImage.fromarray(image_HWC)
    picture.thumbnail((max_side_px, max_side_px), PILImage.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=quality, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def box_path(box: Box) -> str:
    """SVG path of a half-open box, in image pixels."""
    x0, y0, x1, y1 = box
    return f"M{x0} {y0}H{x1}V{y1}H{x0}Z"


def mask_path(mask_HW: NDArray[np.uint8]) -> str:
    """SVG path around the nonzero pixels of a mask, in image pixels; "" for an empty mask.

    Vertices closer than 1/400 of the mask's longer side are left out: a report holds many of these.
    """
    inside = np.pad((mask_HW > 0).astype(np.float32), 1)
    lines = contourpy.contour_generator(z=inside).lines(0.5)
    return "".join(_polygon(np.asarray(line) - 0.5, max(mask_HW.shape) / 400) for line in lines)


def _polygon(points_N2: NDArray[np.float64], step_px: float) -> str:
    kept = [points_N2[0]]
    for point in points_N2[1:-1]:
        if np.abs(point - kept[-1]).max() >= step_px:
            kept.append(point)
    if len(kept) < 3:
        kept = list(points_N2[:-1])
    return "M" + "L".join(f"{x:.4g} {y:.4g}" for x, y in kept) + "Z"
