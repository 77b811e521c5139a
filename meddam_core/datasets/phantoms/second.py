"""A second generator of phantoms, written otherwise than the first, to test what was learnt from that one.

    picture = make_second("skin", seed=0, index=3)

The same vocabulary of facts, but nothing of the painting is shared: outlines are drawn as polygons and discs, edges
come from blurred masks, tissue from filtered noise, lungs from ellipses. A model that has learnt the first generator's
habits rather than the facts falls here. There are no twins and no core with halo.

Arrays: H rows and W columns, equal; pixels; brightness 0 to 1 on films and photographs, HU on CT slices.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from meddam_core.datasets.phantoms.outline import Float, Rng
from meddam_core.datasets.phantoms.scene import KINDS, SIZES, Kind
from meddam_core.datasets.phantoms.skin import COLOURS, PAPULE_MM
from meddam_core.datasets.phantoms.truth import MASS_MM, PhantomRegion
from meddam_core.records import Rescale, Window

SIZE = 1024
_DIAMETERS = {"small": 0.092, "medium": 0.135, "large": 0.175}
"""Share of the field's width."""
_ADDED = {"dense": 0.26, "hazy": 0.13, "calcified": 0.42}
_HU = {"solid": 30.0, "part-solid": -560.0, "ground-glass": -560.0, "cavitary": 30.0}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SecondPhantom:
    """A picture of the second generator with its truth; fields as in `phantom.Phantom`."""

    kind: Kind
    stored: NDArray[np.uint8] | NDArray[np.uint16]
    photometric: str
    rescale: Rescale | None
    window: Window | None
    orientation: str | None
    modality: str
    spacing_mm: float
    regions: list[PhantomRegion] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Field:
    """Where lesions lie."""

    cx: float
    cy: float
    half: float
    """Half the width that sizes are relative to."""
    tall: float
    """Half the height of the lungs; of the picture on skin."""
    spacing_mm: float


def make_second(kind: Kind, seed: int, index: int) -> SecondPhantom:
    """Picture number `index` of the set named by `kind` and `seed`. Raises ValueError for an unknown kind."""
    if kind not in KINDS:
        raise ValueError(f"there is no phantom {kind!r}; use one of {', '.join(KINDS)}")
    rng = np.random.default_rng([seed, 7919, KINDS.index(kind), index])
    place = _field(kind, rng)
    image = {"chest": _film, "ct": _slice, "skin": _skin}[kind](rng, place)
    regions: list[PhantomRegion] = []
    taken: list[tuple[float, float, float]] = []
    drawn = [_draw(kind, rng, place, taken) for _ in range(int(rng.integers(1, 5)))]
    lesions = [lesion for lesion in drawn if lesion is not None]
    for truth, x, y, radius in lesions:
        body, alpha = _outline(rng, truth, x, y, radius)
        image = _painted(kind, rng, image, truth, body, alpha)
        regions.append(PhantomRegion(mask_HW=body, truth={**truth, "number": str(len(lesions))}))
    return _stored(kind, rng, image, place, regions)


def _field(kind: Kind, rng: Rng) -> _Field:
    side, middle = float(SIZE), SIZE * float(rng.uniform(0.49, 0.51))
    if kind == "skin":
        return _Field(side / 2, side / 2, 0.36 * side, side / 2, float(rng.uniform(0.09, 0.13)))
    half = side * float(rng.uniform(0.35, 0.40) if kind == "chest" else rng.uniform(0.41, 0.45))
    tall = side * float(rng.uniform(0.32, 0.34)) if kind == "chest" else half * 0.62
    return _Field(middle, side * 0.5, half, tall, float(rng.uniform(0.30, 0.37)))


def _draw(kind: Kind, rng: Rng, place: _Field, taken: list[tuple[float, float, float]]) -> Any:
    """(truth, x, y, radius) of a lesion, or None where there is no room."""
    size = str(rng.choice(SIZES))
    radius = place.half * _DIAMETERS[size] * float(rng.uniform(0.96, 1.04))
    for _ in range(100):
        x, y = rng.uniform(3.2 * radius, SIZE - 3.2 * radius, 2).tolist()
        clear = all(np.hypot(x - tx, y - ty) > 1.7 * (radius + tr) for tx, ty, tr in taken)
        if clear and (kind == "skin" or _in_lung(place, x, y, radius)):
            taken.append((x, y, radius))
            return {**_look(kind, rng, size, 2 * radius * place.spacing_mm), **_where(kind, place, x, y)}, x, y, radius
    return None


def _in_lung(place: _Field, x: float, y: float, radius: float) -> bool:
    for sign in (-1, 1):
        u = (x - place.cx - sign * 0.5 * place.half) / max(0.38 * place.half - 0.4 * radius, 1)
        v = (y - place.cy) / max(place.tall - 0.6 * radius, 1)
        if u * u + v * v < 1:
            return True
    return False


def _look(kind: Kind, rng: Rng, size: str, diameter_mm: float) -> dict[str, str]:
    def one(*values: str) -> str:
        return str(rng.choice(values))

    shape = one("round", "oval", "irregular")
    common = {"kind": "lesion", "part": "whole", "shape": shape, "size": size, "size_mm": f"{diameter_mm:.0f}"}
    if kind == "skin":
        elevation, surface = one("flat", "raised"), one("smooth", "scaly", "ulcerated", "crusted")
        names = ("macule", "patch") if elevation == "flat" else ("papule", "plaque")
        finding = "ulcer" if surface == "ulcerated" else names[diameter_mm >= PAPULE_MM]
        return {**common, "finding": finding, "colour": one(*COLOURS), "margin": one("regular", "irregular"),
                "surface": surface, "elevation": elevation}  # fmt: skip
    finding = "mass" if diameter_mm > MASS_MM else "nodule"
    density = one("dense", "hazy", "calcified") if kind == "chest" else one(*_HU)
    return {**common, "finding": finding, "density": density, "texture": one("homogeneous", "granular"),
            "margin": one("smooth", "lobulated", "spiculated", "ill-defined")}  # fmt: skip


def _where(kind: Kind, place: _Field, x: float, y: float) -> dict[str, str]:
    third = int(np.clip((y - place.cy + place.tall) / (2 * place.tall) * 3, 0, 2))
    if kind == "skin":
        return {"zone": ("upper", "middle", "lower")[third], "column": ("left", "centre", "right")[int(3 * x / SIZE)]}
    names = ("upper", "middle", "lower") if kind == "chest" else ("anterior", "middle", "posterior")
    return {"side": "right" if x < place.cx else "left", "zone": names[third]}


def _outline(rng: Rng, truth: dict[str, str], x: float, y: float, radius: float) -> tuple[NDArray[np.uint8], Float]:
    """(mask, alpha) of a lesion on the whole canvas."""
    turn, narrow = float(rng.uniform(0, 180)), {"oval": 0.72}.get(truth["shape"], 1.0)
    canvas: Any = np.zeros((SIZE, SIZE), np.uint8)
    if truth["shape"] == "irregular":
        knots = rng.uniform(0.72, 1.0, 9)
        radii: Any = np.interp(np.linspace(0, 9, 90), np.arange(10), np.r_[knots, knots[0]])
        radii = np.convolve(np.r_[radii[-4:], radii, radii[:4]], np.ones(9) / 9, "valid")
        angle = np.linspace(0, 2 * np.pi, len(radii), endpoint=False)
        points = np.stack([x + radius * radii * np.cos(angle), y + radius * radii * narrow * np.sin(angle)], axis=1)
        cv2.fillPoly(canvas, [np.round(points * 16).astype(np.int32)], 255, cv2.LINE_AA, 4)
    else:
        axes = (round(radius), round(radius * narrow))
        cv2.ellipse(canvas, (round(x), round(y)), axes, turn, 0, 360, 255, -1, cv2.LINE_AA)
    if truth["margin"] == "lobulated":
        canvas = cv2.erode(canvas, np.ones((3, 3), np.uint8), iterations=round(radius * 0.12))
        count = int(rng.integers(6, 8))
        for i in range(count):
            a = 2 * np.pi * (i + float(rng.uniform(-0.1, 0.1))) / count
            centre = (round(x + 0.66 * radius * np.cos(a)), round(y + 0.66 * radius * narrow * np.sin(a)))
            cv2.circle(canvas, centre, round(radius * 0.31), 255, -1, cv2.LINE_AA)
    if truth["margin"] == "irregular":
        _gnaw(rng, canvas, round(radius * 0.09))
    body = (canvas > 127).astype(np.uint8)
    alpha: Any = canvas.astype(np.float32) / 255
    if truth["margin"] == "ill-defined":
        alpha = cv2.GaussianBlur(alpha, (0, 0), radius * 0.22)
    if truth["margin"] == "spiculated":
        alpha = np.maximum(alpha, _spikes(rng, x, y, radius))
    return body, np.asarray(alpha, np.float32)


def _gnaw(rng: Rng, canvas: NDArray[np.uint8], bite_px: int) -> None:
    """Takes small bites out of the edge, all around."""
    edges, _ = cv2.findContours((canvas > 127).astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    edge = edges[0][:, 0]
    for at in np.linspace(0, len(edge), int(rng.integers(13, 18)), endpoint=False):
        x, y = edge[int(at + rng.uniform(0, 6)) % len(edge)]
        cv2.circle(canvas, (int(x), int(y)), bite_px, 0, -1, cv2.LINE_AA)


def _spikes(rng: Rng, x: float, y: float, radius: float) -> Float:
    canvas = np.zeros((SIZE, SIZE), np.uint8)
    for angle in np.linspace(0, 2 * np.pi, int(rng.integers(15, 22)), endpoint=False) + rng.uniform(0, 1):
        along, across = np.array([np.cos(angle), np.sin(angle)]), np.array([-np.sin(angle), np.cos(angle)])
        tip = np.array([x, y]) + along * radius * rng.uniform(1.3, 1.6)
        foot = np.array([x, y]) + along * radius * 0.85
        points = np.round(np.stack([foot + 2.2 * across, tip, foot - 2.2 * across]) * 16).astype(np.int32)
        cv2.fillPoly(canvas, [points], 220, cv2.LINE_AA, 4)
    return canvas.astype(np.float32) / 255


def _grains(rng: Rng) -> Float:
    """-1, 0 or 1 in grains of two pixels."""
    noise = cv2.resize(rng.standard_normal((SIZE // 2, SIZE // 2)).astype(np.float32), (SIZE, SIZE))
    return np.asarray(np.sign(noise) * (np.abs(noise) > 0.5), np.float32)


def _painted(kind: Kind, rng: Rng, image: Float, truth: dict[str, str], body: NDArray[np.uint8], alpha: Float) -> Float:
    grains = _grains(rng) if truth.get("texture") == "granular" else np.zeros((SIZE, SIZE), np.float32)
    if kind == "chest":
        return image + alpha * _ADDED[truth["density"]] * (1 + 0.42 * grains)
    depth: Any = cv2.distanceTransform(body, cv2.DIST_L2, 5)
    depth = depth / max(float(depth.max()), 1.0)
    if kind == "ct":
        target = np.full_like(alpha, _HU[truth["density"]]) + 240 * grains
        if truth["density"] == "part-solid":
            target = np.where(depth > 0.5, 30.0, target)
        if truth["density"] == "cavitary":
            target = np.where(depth > 0.42, -900.0, target)
        return np.asarray(image * (1 - alpha) + target * alpha, np.float32)
    return _on_skin(rng, image, truth, alpha, depth)


def _on_skin(rng: Rng, image: Float, truth: dict[str, str], alpha: Float, depth: Float) -> Float:
    cover = (alpha * 0.85)[..., None]
    image = image * (1 - cover) + np.array(COLOURS[truth["colour"]], np.float32) * cover
    blobs: Any = cv2.GaussianBlur(rng.standard_normal((SIZE, SIZE)).astype(np.float32), (0, 0), 2.2)
    blobs = blobs / float(blobs.std()) * alpha
    if truth["elevation"] == "raised":
        light = cv2.Sobel(cv2.GaussianBlur(depth, (0, 0), 3), cv2.CV_32F, 1, 0, ksize=5)
        image = image * (1 + np.clip(6 * light / max(float(np.abs(light).max()), 1e-6), -0.35, 0.35))[..., None]
    if truth["surface"] == "scaly":
        flakes = np.clip(2.2 * (blobs - 0.6), 0, 0.75)[..., None]
        image = image * (1 - flakes) + np.array((0.93, 0.91, 0.88), np.float32) * flakes
    elif truth["surface"] == "crusted":
        crust = (
            np.clip(1.8 * (cv2.GaussianBlur(blobs, (0, 0), 2) + 0.15), 0, 0.85)[..., None] * (alpha > 0.3)[..., None]
        )
        image = image * (1 - crust) + np.array((0.66, 0.47, 0.17), np.float32) * crust
    elif truth["surface"] == "ulcerated":
        pit = np.clip((depth - 0.38) * 8, 0, 1)[..., None]
        image = image * (1 - pit) + np.array((0.52, 0.06, 0.08), np.float32) * pit
    return np.asarray(image, np.float32)


def _smooth(rng: Rng, sigma_px: float) -> Float:
    """Filtered noise of deviation 1."""
    small = max(SIZE // max(int(sigma_px / 2), 1), 8)
    coarse: Any = cv2.GaussianBlur(rng.standard_normal((small, small)).astype(np.float32), (0, 0), 2)
    enlarged = cv2.resize(coarse / float(coarse.std()), (SIZE, SIZE), interpolation=cv2.INTER_LINEAR)
    return np.asarray(enlarged, np.float32)


def _lungs(place: _Field) -> Float:
    canvas = np.zeros((SIZE, SIZE), np.float32)
    for sign in (-1, 1):
        centre = (round(place.cx + sign * 0.5 * place.half), round(place.cy))
        cv2.ellipse(canvas, centre, (round(0.4 * place.half), round(place.tall)), 0, 0, 360, 1.0, -1)
    return cv2.GaussianBlur(canvas, (0, 0), 6).astype(np.float32)


def _film(rng: Rng, place: _Field) -> Float:
    x = np.abs(np.arange(SIZE, dtype=np.float32) - place.cx)[None, :] / place.half
    body = np.broadcast_to(np.clip((1.12 - x) * 12, 0, 1), (SIZE, SIZE))
    film = 0.04 + 0.55 * body - 0.32 * _lungs(place) + 0.012 * _smooth(rng, 40)
    ribs = np.zeros((SIZE, SIZE), np.float32)
    for i in range(8):
        y = place.cy - place.tall + i * place.tall / 4.2
        for sign in (-1, 1):
            centre = (round(place.cx + sign * place.half * 0.5), round(y + 40))
            cv2.ellipse(ribs, centre, (round(place.half * 0.47), 70), 0, 190, 350, 1.0, 9)
    return np.asarray(film + 0.05 * cv2.GaussianBlur(ribs, (0, 0), 2) * body, np.float32)


def _slice(rng: Rng, place: _Field) -> Float:
    canvas = np.full((SIZE, SIZE), -1000, np.float32)
    centre = (round(place.cx), round(place.cy))
    cv2.ellipse(canvas, centre, (round(place.half), round(place.half * 0.78)), 0, 0, 360, 20.0, -1)
    lungs = _lungs(place)
    vessels = np.zeros((SIZE, SIZE), np.float32)
    for _ in range(80):
        point = (round(place.cx + place.half * float(rng.uniform(-0.85, 0.85))), round(rng.uniform(250, 780)))
        cv2.circle(vessels, point, int(rng.integers(1, 4)), 1.0, -1)
    lung = -860 + 15 * _smooth(rng, 30) + 700 * vessels
    return np.asarray(canvas * (1 - lungs) + lung * lungs, np.float32)


def _skin(rng: Rng, place: _Field) -> Float:
    light, dark = np.array((0.94, 0.78, 0.68), np.float32), np.array((0.40, 0.26, 0.18), np.float32)
    tone = light + (dark - light) * float(rng.uniform(0, 1))
    shade = 1 + 0.03 * _smooth(rng, 120) + 0.02 * _smooth(rng, 6)
    return np.asarray(tone * shade[..., None], np.float32)


def _stored(kind: Kind, rng: Rng, image: Float, place: _Field, regions: list[PhantomRegion]) -> SecondPhantom:
    noise = rng.standard_normal((SIZE, SIZE)).astype(np.float32)
    if kind == "skin":
        photograph = np.clip(np.round((image + 0.01 * noise[..., None]) * 255), 0, 255).astype(np.uint8)
        return SecondPhantom(
            kind=kind, stored=photograph, photometric="RGB", rescale=None, window=None, orientation=None, modality="XC",
            spacing_mm=place.spacing_mm, regions=regions,
        )  # fmt: skip
    if kind == "chest":
        film = np.clip(np.round((image + 0.010 * noise) * 3600 + 220), 0, 4095).astype(np.uint16)
        return SecondPhantom(
            kind=kind, stored=film, photometric="MONOCHROME2", rescale=None, orientation="L\\F", modality="DX",
            window=Window(center=2047.5, width=4096.0, source="header"), spacing_mm=place.spacing_mm, regions=regions,
        )  # fmt: skip
    hu = np.clip(np.round(image + 18 * noise + 1024), 0, 4095).astype(np.uint16)
    return SecondPhantom(
        kind=kind, stored=hu, photometric="MONOCHROME2", rescale=Rescale(slope=1.0, intercept=-1024.0),
        orientation="L\\P", modality="CT", window=Window(center=-600.0, width=1500.0, source="header"),
        spacing_mm=place.spacing_mm, regions=regions,
    )  # fmt: skip
