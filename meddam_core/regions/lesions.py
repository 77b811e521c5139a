"""Where a skin photograph shows its lesion, found without any trained weights, and how far that can be believed.

    found = detect_lesions(image_HWC, max_regions=5)
    found[0].box, found[0].confidence, found[0].kind       # (212, 160, 340, 301), 0.81, "lesion"

The chain (facts of each step: black-hat hair removal after DullRazor, Lee 1997; a skin model of the picture's own
instead of a fixed colour range, because fixed ranges miss dark skin; Otsu 1979 on the distance from it):

1. the long side to WORK_PX; hairs painted over;
2. skin: a smooth surface of light and colour (Lab) fitted to the pixels that agree with it, most trusted at the border;
   what a body part stands before (drapes, walls) is told from skin by its hue and left out;
3. each pixel's distance from that surface, in the skin's own spread; Otsu splits it;
4. components, filled and closed, ranked by area x centrality x contrast; sanity checks.

Invariants:
- there is always at least one box; where no lesion stands out it is the central box or the whole picture, with a `kind`
  that says so and a confidence of at most FALLBACK_CONFIDENCE;
- an eruption over much of the picture, or of many lesions, is one box: the whole picture;
- the same pixels give the same boxes, and nothing but the pixels counts.

Arrays: H rows, W columns, C colours R, G, B; h, w the same at working size; L lightness, a and b the Lab colour axes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from meddam_core.records import Box

Float = NDArray[np.float32]
Bool = NDArray[np.bool_]
Kind = Literal["lesion", "central", "whole"]

WORK_PX = 384
"""Long side of the picture that is worked on."""
FALLBACK_CONFIDENCE = 0.2
CENTRAL_SHARE = 0.7
"""Sides of the central box, as a share of the picture's."""
MIN_AREA, MAX_AREA = 0.002, 0.6
"""Share of the picture that a lesion covers; more is an eruption, less a speck."""
MAX_LESIONS = 6
"""More lesions than this are an eruption."""
MIN_CONTRAST = 2.6
"""Distance from skin, in the skin's own spread, below which nothing stands out."""
MIN_THICKNESS = 0.5
"""Half the width of the widest stroke, relative to an equal circle's radius: less is a thin ring, or a pen's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Detection:
    """A box for a photograph without regions."""

    box: Box
    """Tight around the lesion, in pixels of the picture; no margin."""
    confidence: float
    """0 to 1: how clearly it stands out from the skin around it. Not a probability of disease."""
    kind: Kind
    """lesion: found; central: nothing stood out; whole: an extensive eruption, or a lesion that fills the picture."""


def detect_lesions(image_HWC: NDArray[np.uint8], max_regions: int | None = None) -> list[Detection]:
    """The lesions of a photograph, the likeliest first; at most `max_regions`.

    `image_HWC`: (H, W, 3) uint8 RGB. Raises ValueError for another shape or type.
    """
    if image_HWC.ndim != 3 or image_HWC.shape[2] != 3 or image_HWC.dtype != np.uint8:
        raise ValueError(f"lesions are looked for in (H, W, 3) uint8 RGB, not {image_HWC.shape} {image_HWC.dtype}")
    size = image_HWC.shape[1], image_HWC.shape[0]
    scale = min(1.0, WORK_PX / max(size))
    work = (max(1, round(size[0] * scale)), max(1, round(size[1] * scale)))
    if min(work) < 24:
        return [_fallback("whole", size)]
    small_hwC = cv2.resize(image_HWC, work, interpolation=cv2.INTER_AREA) if scale < 1 else image_HWC
    lab_hwC = _lab(without_hairs(np.ascontiguousarray(small_hwC)))
    skin_hw = _plausible_skin(lab_hwC)
    distance_hw = _distance(lab_hwC, skin_hw)
    found, extensive = _lesions(distance_hw, skin_hw)
    if extensive:
        return [_fallback("whole", size)]
    if not found:
        return [_fallback("central", size)]
    return [
        Detection(box=_scaled(box, work, size), confidence=round(confidence, 3), kind="lesion")
        for box, confidence in found[: max_regions or MAX_LESIONS]
    ]


def without_hairs(image_hwC: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The picture with thin dark lines painted over from their surroundings."""
    grey = cv2.cvtColor(image_hwC, cv2.COLOR_RGB2GRAY)
    side = max(7, round(max(grey.shape) / 40) | 1)
    valleys = np.zeros_like(grey)
    for kernel in _lines(side):
        # a hair vanishes under a closing across it and stays under one along it: what both remove is no line
        valleys = np.maximum(valleys, cv2.morphologyEx(grey, cv2.MORPH_BLACKHAT, kernel))
    dots = cv2.morphologyEx(grey, cv2.MORPH_BLACKHAT, _disc(max(2.0, side / 3)))
    thin = ((valleys > 12) & (dots > 8)).astype(np.uint8)
    dense = cv2.morphologyEx(cv2.morphologyEx(thin, cv2.MORPH_CLOSE, _disc(4)), cv2.MORPH_OPEN, _disc(6))
    thin[cv2.dilate(dense, _disc(2)) > 0] = 0  # lines this close together are a lesion's own surface: scales, crusts
    count, labels, stats, _ = cv2.connectedComponentsWithStats(thin, connectivity=8)
    spans = np.maximum(stats[:, cv2.CC_STAT_WIDTH], stats[:, cv2.CC_STAT_HEIGHT])
    depth = np.zeros(count, np.float32)
    np.maximum.at(depth, np.asarray(labels), cv2.distanceTransform(thin, cv2.DIST_L2, 3))
    crossing = (spans >= 5 * side) & (depth * 9 <= spans)
    long = (spans >= 2 * side) & (stats[:, cv2.CC_STAT_AREA] <= 5 * spans) | crossing
    long[0] = False
    if count == 1 or not long.any():
        return image_hwC
    hairs = cv2.dilate(long[labels].astype(np.uint8), np.ones((3, 3), np.uint8))
    return np.asarray(cv2.inpaint(image_hwC, hairs, 3, cv2.INPAINT_TELEA), np.uint8)


def _lines(side: int) -> list[NDArray[np.uint8]]:
    diagonal = np.eye(side, dtype=np.uint8)
    return [np.ones((1, side), np.uint8), np.ones((side, 1), np.uint8), diagonal, np.ascontiguousarray(diagonal[::-1])]


def _lab(image_hwC: NDArray[np.uint8]) -> Float:
    """CIE L*a*b*, smoothed below the size of a lesion."""
    lab = cv2.cvtColor(image_hwC.astype(np.float32) / np.float32(255), cv2.COLOR_RGB2LAB)
    return np.asarray(cv2.GaussianBlur(lab, (0, 0), max(lab.shape[:2]) / 160), np.float32)


def _plausible_skin(lab_hwC: Float) -> Bool:
    """Pixels that skin of any tone, or a lesion on it, may have; the rest is what stands behind a body part.

    Skin lies on an arc of Lab hue between red and yellow at every depth of pigment. Drapes (blue, green), paper and
    black velvet do not. What is enclosed by skin is a lesion whatever its colour.
    """
    lightness, a, b = (lab_hwC[..., i] for i in range(3))
    hue = np.degrees(np.arctan2(b, a))
    chroma = np.hypot(a, b)
    skin = (hue > -12) & (hue < 88) & (chroma > 5) & (lightness > 6)
    count, labels, stats, _ = cv2.connectedComponentsWithStats((~skin).astype(np.uint8), connectivity=4)
    height, width = skin.shape
    background = np.zeros(count, np.bool_)
    for i in range(1, count):
        x, y, w, h, area = (int(v) for v in stats[i])
        at_border = x == 0 or y == 0 or x + w == width or y + h == height
        background[i] = at_border and area > 0.03 * skin.size
    plausible = ~background[labels]
    if plausible.mean() < 0.15:  # a picture in other light than the arc allows for: all of it may be skin
        return np.ones_like(skin)
    return np.asarray(plausible)


def _distance(lab_hwC: Float, skin_hw: Bool) -> Float:
    """Each pixel's distance from the skin's own smooth colour, in robust standard deviations of the skin."""
    height, width = skin_hw.shape
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j].astype(np.float32)
    terms = np.stack([np.ones_like(x), x, y, x * y, x * x, y * y], axis=-1)
    border = np.maximum(np.abs(x), np.abs(y))
    step = max(1, round(max(height, width) / 96))
    some = (slice(step // 2, None, step),) * 2
    inside = skin_hw[some].ravel()
    design = terms[some].reshape(-1, terms.shape[-1])[inside]
    values = lab_hwC[some].reshape(-1, 3)[inside]
    trust = (0.15 + border[some].ravel()[inside] ** 2).astype(np.float32)
    weight = trust
    fit = np.zeros((terms.shape[-1], 3), np.float32)
    spread = np.ones(3, np.float32)
    for turn in range(8):
        # first a level, then a slope, and only then a bend, which could follow a large lesion
        columns = 1 if turn < 2 else 3 if turn < 5 else terms.shape[-1]
        part = design[:, :columns] * weight[:, None]
        fit[:] = 0
        if turn == 0:
            fit[0] = _weighted_median(values, weight)
        else:
            gram = part.T @ design[:, :columns] + 1e-3 * len(design) * np.diag([0, *[0.02] * (columns - 1)])
            fit[:columns] = np.linalg.solve(gram, part.T @ values)
        residual = values - design @ fit
        spread = np.maximum(1.4826 * _weighted_median(np.abs(residual), weight), (1.6, 0.9, 0.9)).astype(np.float32)
        squared = ((residual / spread) ** 2).sum(axis=1) / 3
        weight = trust / (1 + (squared / 4) ** 2)
    residual_hwC = (lab_hwC - terms @ fit) / spread
    residual_hwC *= np.array((0.8, 1.1, 1.1), np.float32)  # shadows change lightness alone
    distance = np.sqrt((residual_hwC**2).sum(axis=-1) / 3)
    return np.asarray(np.where(skin_hw, distance, 0), np.float32)


def _weighted_median(values_NC: Float, weight_N: Float) -> Float:
    """The weighted median of each column."""
    order = np.argsort(values_NC, axis=0)
    cumulated = np.cumsum(weight_N[order], axis=0)
    at = (cumulated < cumulated[-1] / 2).sum(axis=0)
    sorted_NC = np.take_along_axis(values_NC, order, axis=0)
    return np.asarray(sorted_NC[at, np.arange(values_NC.shape[1])], np.float32)


def _lesions(distance_hw: Float, skin_hw: Bool) -> tuple[list[tuple[Box, float]], bool]:
    """(box at working size, confidence) of each lesion, best first; and whether it is an extensive eruption."""
    inside = distance_hw[skin_hw]
    top = float(np.percentile(inside, 99.5))
    if top < MIN_CONTRAST:
        return [], False
    threshold = max(_otsu(np.minimum(inside, top), top), MIN_CONTRAST * 0.75)
    side = max(distance_hw.shape)
    above = cv2.morphologyEx((distance_hw > threshold).astype(np.uint8), cv2.MORPH_OPEN, _disc(side / 130))
    depth_hw = np.asarray(cv2.distanceTransform(above, cv2.DIST_L2, 3), np.float32)
    mask = cv2.morphologyEx(above, cv2.MORPH_CLOSE, _disc(side / 100))
    num_pixels = float(skin_hw.sum())
    if mask.sum() > MAX_AREA * num_pixels:
        return [], True
    outlines, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    scored = sorted(
        (found for outline in outlines if (found := _judged(outline, distance_hw, depth_hw, skin_hw)) is not None),
        key=lambda f: -f[0],
    )
    scored = [f for f in scored if f[0] > 0.08 * scored[0][0] and f[2] > FALLBACK_CONFIDENCE]
    if len(scored) > MAX_LESIONS:
        return [], True
    return [(box, confidence) for _, box, confidence in scored], False


def _judged(
    outline: NDArray[Any], distance_hw: Float, depth_hw: Float, skin_hw: Bool
) -> tuple[float, Box, float] | None:
    """(rank, box, confidence) of one component; None where it can be no lesion."""
    height, width = distance_hw.shape
    x, y, w, h = cv2.boundingRect(outline)
    filled = np.zeros((height, width), np.uint8)
    cv2.drawContours(filled, [outline], -1, 1, cv2.FILLED)
    area = float(filled.sum()) / filled.size
    touched = (x == 0) + (y == 0) + (x + w == width) + (y + h == height)
    if area < MIN_AREA or touched > 2:
        return None
    component = filled.astype(bool)
    ring = (cv2.dilate(filled, _disc(max(6.0, 0.35 * math.sqrt(area * filled.size)))) > 0) & ~component & skin_hw
    if ring.sum() < 20:
        return None
    within, around = float(np.median(distance_hw[component])), float(np.median(distance_hw[ring]))
    dx, dy = (2 * (x + w / 2) / width - 1), (2 * (y + h / 2) / height - 1)
    centrality = math.exp(-(dx * dx + dy * dy) / 0.9)
    contrast = max(within - around, 0.0)
    thickness = float(depth_hw[component].max()) / math.sqrt(area * filled.size / math.pi)
    drawn = 0.35 if thickness < MIN_THICKNESS else 1.0
    rank = math.sqrt(area) * centrality * min(contrast, 8.0) * (0.6**touched) * drawn
    hull = cv2.contourArea(cv2.convexHull(outline))
    solidity = min(1.0, area * filled.size / max(hull, 1.0))
    clear = 1 - math.exp(-((contrast / 4.0) ** 1.3))
    confidence = 0.97 * clear * (0.55 + 0.45 * solidity) * (0.7**touched) * (0.75 + 0.25 * centrality) * drawn
    return rank, (x, y, x + w, y + h), max(confidence, 0.01)


def _otsu(values: Float, top: float) -> float:
    """The split of `values`, 0 to `top`, with the largest variance between its two sides."""
    counts, edges = np.histogram(np.sqrt(values), bins=128, range=(0, math.sqrt(top)))
    centres = (edges[1:] + edges[:-1]) / 2
    below = np.cumsum(counts)
    sums = np.cumsum(counts * centres)
    above = below[-1] - below
    with np.errstate(divide="ignore", invalid="ignore"):
        between = below * above * (sums / below - (sums[-1] - sums) / above) ** 2
    return float(edges[1:][np.nanargmax(np.where(np.isfinite(between), between, -1))] ** 2)


def _disc(radius: float) -> NDArray[np.uint8]:
    side = 2 * max(1, round(radius)) + 1
    return np.asarray(cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side, side)), np.uint8)


def _scaled(box: Box, work: tuple[int, int], size: tuple[int, int]) -> Box:
    sx, sy = size[0] / work[0], size[1] / work[1]
    x0, y0, x1, y1 = box
    return (
        math.floor(x0 * sx), math.floor(y0 * sy), min(math.ceil(x1 * sx), size[0]), min(math.ceil(y1 * sy), size[1]),
    )  # fmt: skip


def _fallback(kind: Kind, size: tuple[int, int]) -> Detection:
    width, height = size
    if kind == "whole":
        return Detection(box=(0, 0, width, height), confidence=FALLBACK_CONFIDENCE, kind="whole")
    x, y = round(width * (1 - CENTRAL_SHARE) / 2), round(height * (1 - CENTRAL_SHARE) / 2)
    return Detection(box=(x, y, width - x, height - y), confidence=FALLBACK_CONFIDENCE / 2, kind="central")
