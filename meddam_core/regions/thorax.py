"""Where the thorax is, without weights: the frame that side and zone of a finding are told by.

    thorax = find_thorax(grey_HW)                      # a chest film, bone brighter than air; None where unsure
    zone = lung_zone(box, thorax)                      # upper, middle, lower or None
    midline = slice_midline(hounsfield_HW, "L\\P")     # an axial CT slice
    side = patient_side(box, midline, "L\\P")          # of the patient, or None

A film: lungs are the two large dark areas beside each other that do not reach the picture's edge. Of several
brightness thresholds the one counts whose two areas look most like lungs: alike in size and height, side by side, of
usual proportions. How much they do is the confidence; below MIN_CONFIDENCE there is no frame.

Invariants:
- sides are the patient's: on a film shown as usual the right is on the picture's left;
- where the orientation, the frame or the place is unsure, the answer is None: no label is better than a wrong one.

Arrays: H rows, W columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from meddam_core.records import Box

MIN_CONFIDENCE = 0.5
_SIDE_PX = 256
"""Films are looked at with their longer side of this many pixels."""
_LEVELS = np.linspace(0.08, 0.62, 19)
"""Shares of the film's brightness range that are tried as the upper limit of lung."""
_MIN_AREA, _MAX_AREA = 0.03, 0.35
"""Of one lung, as a share of the picture."""
_CENTRAL = 0.12
"""A box whose centre is nearer to the midline than this share of the thorax is on no side."""
_TALL = 0.55
"""A box of more than this share of the thorax's height is in no single zone."""
_BODY_HU = -300


@dataclass(frozen=True, slots=True, kw_only=True)
class Thorax:
    """The frame of both lungs on a film, in pixels of the film."""

    box: Box
    midline_x: float
    confidence: float
    """0 to 1: how much the two areas found look like lungs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Midline:
    """Where the patient's middle is, and how wide the body is about it, in pixels."""

    x: float
    width: float


def find_thorax(grey_HW: NDArray[Any]) -> Thorax | None:
    """The thorax on a frontal chest film, bone brighter than air; None where that is not sure enough."""
    scale = _SIDE_PX / max(grey_HW.shape)
    size = (max(round(grey_HW.shape[1] * scale), 1), max(round(grey_HW.shape[0] * scale), 1))
    small_HW = cv2.resize(np.asarray(grey_HW, np.float32), size, interpolation=cv2.INTER_AREA)
    small_HW = cv2.GaussianBlur(small_HW, (0, 0), 1.5)
    low, high = np.percentile(small_HW, (1, 99))
    if high <= low:
        return None
    shown_HW = (small_HW - low) / (high - low)
    found = [pair for level in _LEVELS for pair in _lung_pairs(shown_HW, float(level))]
    if not found:
        return None
    best = max(found, key=lambda pair: pair.confidence)
    if best.confidence < MIN_CONFIDENCE:
        return None
    x0, y0, x1, y1 = (round(v / scale) for v in best.box)
    box = (max(x0, 0), max(y0, 0), min(x1, grey_HW.shape[1]), min(y1, grey_HW.shape[0]))
    return Thorax(box=box, midline_x=best.midline_x / scale, confidence=round(best.confidence, 3))


def _lung_pairs(shown_HW: NDArray[np.float32], level: float) -> list[Thorax]:
    """Pairs of dark areas at one brightness level, as frames of the small picture."""
    below_HW = (shown_HW < level).astype(np.uint8)
    dark_HW = cv2.morphologyEx(below_HW, cv2.MORPH_OPEN, np.ones((3, 3), np.uint8))
    num, names_HW, stats, centres = cv2.connectedComponentsWithStats(dark_HW, connectivity=4)
    height, width = dark_HW.shape
    lungs = [
        i
        for i in range(1, num)
        if _MIN_AREA <= stats[i, cv2.CC_STAT_AREA] / (width * height) <= _MAX_AREA and _inside(stats[i], width, height)
    ]
    pairs = []
    for i in lungs:
        for j in lungs:
            if centres[i][0] < centres[j][0]:
                pairs.append(_pair(stats[i], stats[j], centres[i], centres[j], names_HW, (i, j)))
    return pairs


def _inside(stats: NDArray[np.int32], width: int, height: int) -> bool:
    """Whether an area keeps clear of the picture's edges: the air around the patient does not."""
    x, y, w, h = (int(v) for v in stats[:4])
    return x > 1 and y > 1 and x + w < width - 1 and y + h < height - 1


def _pair(
    a: NDArray[np.int32], b: NDArray[np.int32], centre_a: Any, centre_b: Any, names_HW: Any, names: tuple[int, int]
) -> Thorax:  # fmt: skip
    height, width = names_HW.shape
    x0, y0 = min(a[0], b[0]), min(a[1], b[1])
    x1, y1 = max(a[0] + a[2], b[0] + b[2]), max(a[1] + a[3], b[1] + b[3])
    columns_a, columns_b = (np.flatnonzero((names_HW == name).any(axis=0)) for name in names)
    midline = (centre_a[0] + centre_b[0]) / 2
    shared = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    agreement = [
        _plausible(min(a[4], b[4]) / max(a[4], b[4]), 0.3, 0.6),  # of about one size
        _plausible(shared / max(a[3], b[3]), 0.45, 0.75),  # at one height
        _plausible((columns_b[0] - columns_a[-1]) / (x1 - x0), -0.12, 0.0),  # beside each other
        _plausible((x1 - x0) / width, 0.4, 0.6),
        _plausible((y1 - y0) / height, 0.35, 0.5),
        _between((x1 - x0) / (y1 - y0), 0.7, 0.85, 1.45, 1.8),
        _plausible(1 - abs(midline / width - 0.5) * 2, 0.6, 0.85),
        _plausible(min(a[3] / a[2], b[3] / b[2]), 0.8, 1.2),  # lungs stand upright
        _plausible((a[4] + b[4]) / ((x1 - x0) * (y1 - y0)), 0.3, 0.5),
    ]
    # a geometric mean: what is impossible in one respect is no thorax
    confidence = float(np.prod(agreement) ** (1 / len(agreement))) if min(agreement) > 0 else 0.0
    return Thorax(box=(int(x0), int(y0), int(x1), int(y1)), midline_x=float(midline), confidence=confidence)


def _plausible(value: float, none: float, full: float) -> float:
    """0 up to `none`, 1 from `full` on."""
    return float(np.clip((value - none) / (full - none), 0, 1))


def _between(value: float, none: float, full: float, full_2: float, none_2: float) -> float:
    return min(_plausible(value, none, full), _plausible(-value, -none_2, -full_2))


def lung_zone(box: Sequence[float], thorax: Thorax) -> str | None:
    """upper, middle or lower: the third of the thorax that holds the box's centre; None for boxes over several."""
    top, bottom = thorax.box[1], thorax.box[3]
    share = ((box[1] + box[3]) / 2 - top) / (bottom - top)
    if (box[3] - box[1]) > _TALL * (bottom - top) or not -0.1 <= share <= 1.15:
        return None
    return ("upper", "middle", "lower")[min(max(int(share * 3), 0), 2)]


def slice_midline(hounsfield_HW: NDArray[Any], orientation: str | None) -> Midline | None:
    """The middle of the body on an axial slice that lies as usual (columns go left or right); None elsewhere."""
    if _columns_go(orientation) is None:
        return None
    body_HW = cv2.morphologyEx(
        (np.asarray(hounsfield_HW) > _BODY_HU).astype(np.uint8), cv2.MORPH_OPEN, np.ones((5, 5), np.uint8)
    )
    num, _, stats, _ = cv2.connectedComponentsWithStats(body_HW, connectivity=4)
    if num < 2:
        return None
    largest = stats[1 + int(stats[1:, cv2.CC_STAT_AREA].argmax())]
    width = float(largest[cv2.CC_STAT_WIDTH])
    if largest[cv2.CC_STAT_AREA] < 0.05 * body_HW.size:
        return None
    return Midline(x=float(largest[cv2.CC_STAT_LEFT]) + width / 2, width=width)


def film_midline(thorax: Thorax) -> Midline:
    """The midline of a film."""
    return Midline(x=thorax.midline_x, width=float(thorax.box[2] - thorax.box[0]))


def patient_side(box: Sequence[float], midline: Midline, orientation: str | None) -> str | None:
    """left or right of the patient; None near the midline, across it, or where the orientation does not say."""
    towards = _columns_go(orientation)
    offset = (box[0] + box[2]) / 2 - midline.x
    across = min(midline.x - box[0], box[2] - midline.x) > 0.25 * (box[2] - box[0])
    if towards is None or abs(offset) < _CENTRAL * midline.width / 2 or across:
        return None
    return ("left" if towards == "L" else "right") if offset > 0 else ("right" if towards == "L" else "left")


def _columns_go(orientation: str | None) -> str | None:
    """L or R: the patient's direction of increasing columns; None where unknown or neither."""
    first = (orientation or "").partition("\\")[0]
    return first[0] if first[:1] in ("L", "R") else None
