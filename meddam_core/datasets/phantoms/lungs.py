"""Where the lungs are on a real CT slice: a plain finder, good enough to put lesions inside them.

    lungs = find_lungs(hu_HW, (0.7, 0.7), "L\\\\P")
    lungs.mask_HW, lungs.box, lungs.side(x), lungs.zone(y)

1. Tissue is what is denser than -400 HU, opened by 2 mm, so that the table and its cover come off; the largest piece,
   its holes filled, is the body.
2. Air of the body in pieces of at least 10 cm2 whose median is between -970 and -500 HU is lung: windpipe and stomach
   are smaller, or emptier.
3. Closed by 6 mm, so that vessels in the lung count as lung.

It finds no lung where disease has filled one, and takes a large emphysema for air: slices where it finds less than two
lungs are refused. Sides and thirds follow from the lungs' common box and the header's orientation.

Arrays: H rows, W columns, HU.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

AIR_HU = -400.0
LUNG_HU = (-970.0, -500.0)
MIN_LUNG_MM2 = 1000.0
_OPEN_MM, _CLOSE_MM = 2.0, 6.0
THORAX_OVER_LUNGS = 1.2
"""Width of the chest over that of the lungs' box."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Lungs:
    """The lungs of a slice."""

    mask_HW: NDArray[np.bool_]
    box: tuple[int, int, int, int]
    """x0, y0, x1, y1 around both."""
    midline_x: float
    """Between them."""
    orientation: str

    @property
    def width_px(self) -> float:
        """Of the chest, about."""
        return THORAX_OVER_LUNGS * (self.box[2] - self.box[0])

    def side(self, x: float) -> str:
        """The patient's side of a column."""
        return "left" if (x > self.midline_x) == self.orientation.startswith("L") else "right"

    def zone(self, y: float) -> str:
        """The third of the lungs' box that a row lies in: anterior, middle or posterior."""
        share = (y - self.box[1]) / (self.box[3] - self.box[1])
        down = share if self.orientation.endswith("P") else 1 - share
        return ("anterior", "middle", "posterior")[int(np.clip(3 * down, 0, 2))]


def find_lungs(hu_HW: NDArray[np.floating], spacing_mm: tuple[float, float], orientation: str | None) -> Lungs:
    """The lungs of an axial slice. Raises ValueError where it is none, or shows fewer than two lungs."""
    if orientation not in ("L\\P", "R\\P", "L\\A", "R\\A"):
        raise ValueError("the slice is not axial, or its header does not say how it lies")
    pixel_mm2 = spacing_mm[0] * spacing_mm[1]
    body_HW = _body(hu_HW > AIR_HU, spacing_mm)
    parts_HW, num = ndimage.label(body_HW & (hu_HW <= AIR_HU))
    numbers = np.arange(1, num + 1)
    areas = np.bincount(parts_HW.ravel(), minlength=num + 1)[1:] * pixel_mm2
    large = [
        int(n) for n, area in zip(numbers, areas, strict=True)
        if area >= MIN_LUNG_MM2 and LUNG_HU[0] < float(np.median(hu_HW[parts_HW == n])) < LUNG_HU[1]
    ]  # fmt: skip
    air_HW = np.isin(parts_HW, large)
    if not large:
        raise ValueError("no lungs were found on the slice")
    rows, columns = np.nonzero(air_HW)
    box = (int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1)
    in_body = np.nonzero(body_HW.any(axis=0))[0]
    on_the_left = float(np.mean(columns < (in_body[0] + in_body[-1]) / 2))
    if not 0.2 < on_the_left < 0.8:
        raise ValueError("one lung only was found on the slice")
    closed_HW = ndimage.binary_closing(air_HW, _disc(_CLOSE_MM, spacing_mm)) & body_HW
    return Lungs(mask_HW=closed_HW, box=box, midline_x=(box[0] + box[2]) / 2, orientation=orientation)


def _body(tissue_HW: NDArray[np.bool_], spacing_mm: tuple[float, float]) -> NDArray[np.bool_]:
    opened_HW = ndimage.binary_opening(tissue_HW, _disc(_OPEN_MM, spacing_mm))
    parts_HW, num = ndimage.label(opened_HW)
    if num == 0:
        return np.zeros_like(tissue_HW)
    largest = 1 + int(np.bincount(parts_HW.ravel())[1:].argmax())
    filled: NDArray[np.bool_] = ndimage.binary_fill_holes(parts_HW == largest)
    return filled


def _disc(radius_mm: float, spacing_mm: tuple[float, float]) -> NDArray[np.bool_]:
    rows, columns = (max(round(radius_mm / s), 1) for s in spacing_mm)
    y, x = np.mgrid[-rows : rows + 1, -columns : columns + 1]
    return np.asarray((y / rows) ** 2 + (x / columns) ** 2 <= 1)
