"""One phantom: a scene, painted, with its regions and their truth.

    phantom = make_phantom("ct", seed=0, index=12)
    phantom.stored                      # (1024, 1024) uint16 or (1024, 1024, 3) uint8
    phantom.regions[0].truth["margin"]  # "spiculated"

Invariant: the same kind, seed, index and options give the same phantom, bit for bit, on the same versions of NumPy and
OpenCV; nothing else is read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from meddam_core.datasets.phantoms import chest, ct, skin
from meddam_core.datasets.phantoms.outline import Bool, Float, Rng, core_mask, twin_mask
from meddam_core.datasets.phantoms.scene import KINDS, MAX_LESIONS, Kind, Lesion, LookDrawer, Scene, Thing, draw_scene
from meddam_core.datasets.phantoms.texture import blur, noise, step
from meddam_core.datasets.phantoms.truth import PhantomRegion, Places, lesion_truth, thing_truth
from meddam_core.records import Rescale, Window

SIZE = 1024

Surroundings = Literal["anatomy", "neutral"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Phantom:
    """A synthetic picture with its truth."""

    kind: Kind
    scene: Scene
    stored: NDArray[np.uint8] | NDArray[np.uint16]
    """(H, W) uint16 stored values, or (H, W, 3) uint8."""
    photometric: str
    rescale: Rescale | None
    window: Window | None
    orientation: str | None
    modality: str
    spacing_mm: float
    regions: list[PhantomRegion]


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What may be drawn."""

    size: int = SIZE
    """Side of the canvas, pixels."""
    max_lesions: int = MAX_LESIONS
    surroundings: Surroundings = "anatomy"
    """neutral: around every region of a film or slice the anatomy gives way to even tissue, so that a crop tells
    nothing about its place."""
    only: tuple[str, ...] = ()
    """Combinations such as "margin=spiculated&density=solid"; if any are given, every lesion is of one of them."""
    without: tuple[str, ...] = ()
    """Combinations that no lesion has: held out."""

    def allows(self, drawer: LookDrawer) -> LookDrawer:
        """`drawer`, asked again until it gives what is allowed. Raises ValueError where it never does."""

        def draw(rng: Rng, size: str) -> object:
            for _ in range(2000):
                look = drawer(rng, size)
                wanted = not self.only or any(look.has(c) for c in self.only)
                if wanted and not any(look.has(c) for c in self.without):
                    return look
                size = str(rng.choice(("small", "medium", "large")))
            raise ValueError(f"no lesion is of {self.only} without {self.without}")

        return draw  # type: ignore[return-value]


_LOOKS: dict[Kind, LookDrawer] = {"chest": chest.draw_look, "ct": ct.draw_look, "skin": skin.draw_look}


def check_options(kind: Kind, options: Options) -> None:
    """Raises ValueError where no lesion of this kind of picture is allowed by the options."""
    rng = np.random.default_rng(0)
    try:
        for size in ("small", "medium", "large"):
            options.allows(_LOOKS[kind])(rng, size)
    except (ValueError, AttributeError) as error:
        raise ValueError(
            f"{kind} phantoms: no lesion is of {options.only} without {options.without}; check names and values, and "
            "choose the kinds that have them"
        ) from error


def make_phantom(kind: Kind, seed: int, index: int, options: Options | None = None) -> Phantom:
    """Phantom number `index` of the set named by `kind` and `seed`. Raises ValueError for an unknown kind."""
    if kind not in KINDS:
        raise ValueError(f"there is no phantom {kind!r}; use one of {', '.join(KINDS)}")
    rng = np.random.default_rng([seed, KINDS.index(kind), index])
    return {"chest": _chest, "ct": _ct, "skin": _skin}[kind](rng, options or Options())


@dataclass(frozen=True, slots=True)
class _Patch:
    """The pixels around a lesion or thing: where they are, and fields over them."""

    rows: slice
    columns: slice
    dx: Float
    dy: Float

    @property
    def at(self) -> tuple[slice, slice]:
        return self.rows, self.columns

    @property
    def angle(self) -> Float:
        return np.arctan2(self.dy, self.dx)


def _patch(x: float, y: float, reach: float, size: int) -> _Patch:
    half = int(np.ceil(reach)) + 3
    x0, y0 = max(int(x) - half, 0), max(int(y) - half, 0)
    x1, y1 = min(int(x) + half + 1, size), min(int(y) + half + 1, size)
    dx = np.arange(x0, x1, dtype=np.float32)[None, :] - np.float32(x)
    dy = np.arange(y0, y1, dtype=np.float32)[:, None] - np.float32(y)
    dx, dy = np.broadcast_arrays(dx, dy)
    return _Patch(slice(y0, y1), slice(x0, x1), dx, dy)


def _whole_mask(size: int, patch: _Patch, inside: Bool) -> NDArray[np.uint8]:
    mask_HW = np.zeros((size, size), np.uint8)
    mask_HW[patch.at] = inside
    return mask_HW


def _parts(lesion: Lesion, patch: _Patch, fraction: Float, looks: tuple[str, str]) -> list[tuple[str, str, Bool]]:
    """(part, density or colour, inside) of each region of a lesion."""
    inside = fraction < 1
    if lesion.look.form == "twins":
        first = twin_mask(fraction, patch.angle) & inside
        return [("twin", looks[0], first), ("twin", looks[1], inside & ~first)]
    if lesion.look.form == "core-halo":
        core = core_mask(fraction, patch.angle, lesion.outline.radius) & inside
        return [("core", looks[0], core), ("halo", looks[1], inside & ~core)]
    return [("whole", looks[0], inside)]


def _layers(
    lesion: Lesion, patch: _Patch, fraction: Float, parts: list[tuple[str, str, Bool]]
) -> list[tuple[str, Float]]:
    """(density or colour, alpha) of each part, with soft or antialiased edges and spicules."""
    alpha = lesion.outline.alpha(fraction)
    if len(parts) > 1:
        first = blur(parts[0][2].astype(np.float32), 0.8) * alpha
        return [(parts[0][1], first), (parts[1][1], np.clip(alpha - first, 0, 1))]
    centre = (-float(patch.dx[0, 0]), -float(patch.dy[0, 0]))
    rays = lesion.outline.rays(alpha.shape, centre)
    return [(parts[0][1], np.maximum(alpha, rays))]


def _regions(
    lesion: Lesion, truth: dict[str, str], attribute: str, size: int, patch: _Patch, parts: list[tuple[str, str, Bool]]
) -> list[PhantomRegion]:
    return [
        PhantomRegion(mask_HW=_whole_mask(size, patch, inside), truth={**truth, "part": part, attribute: look})
        for part, look, inside in parts
    ]


def _thing_region(scene: Scene, thing: Thing, places: Places) -> PhantomRegion:
    size = scene.field.size
    patch = _patch(thing.x, thing.y, thing.radius, size)
    inside = np.hypot(patch.dx, patch.dy) < thing.radius
    return PhantomRegion(mask_HW=_whole_mask(size, patch, inside), truth=thing_truth(scene, thing, places))


def _neutral(scene: Scene, image: Float, level: Float) -> Float:
    """The image with even tissue in three times the box of every lesion and thing."""
    size = scene.field.size
    weight = np.zeros((size, size), np.float32)
    marks = [(o.x, o.y, o.outline.radius) for o in scene.lesions] + [(t.x, t.y, t.radius) for t in scene.things]
    for x, y, radius in marks:
        reach = 3 * radius + 6
        weight[max(int(y - reach), 0) : int(y + reach) + 1, max(int(x - reach), 0) : int(x + reach) + 1] = 1
    weight = np.maximum(weight, blur(weight, 10))
    return np.asarray(image * (1 - weight) + level * weight, np.float32)


def _chest(rng: Rng, options: Options) -> Phantom:
    thorax = chest.draw_thorax(rng, options.size)
    scene = draw_scene(
        "chest", rng, thorax.field(), options.allows(_LOOKS["chest"]), chest.DISTRACTOR, options.max_lesions
    )
    film = chest.background(rng, thorax)
    if options.surroundings == "neutral":
        film = _neutral(scene, film, np.float32(chest.NEUTRAL) + 0.02 * noise(rng, options.size, 30))
    regions: list[PhantomRegion] = []

    def places(x: float, y: float) -> dict[str, str]:
        return {"side": thorax.side(x), "zone": thorax.zone(y)}

    for index, lesion in enumerate(scene.lesions):
        patch = _patch(lesion.x, lesion.y, lesion.outline.reach, options.size)
        fraction = lesion.outline.fraction(patch.dx, patch.dy)
        second = "hazy" if lesion.look.density != "hazy" else "calcified"
        parts = _parts(lesion, patch, fraction, (lesion.look.density or "dense", second))
        fine = noise(rng, max(fraction.shape), 2.2)[: fraction.shape[0], : fraction.shape[1]]
        for density, alpha in _layers(lesion, patch, fraction, parts):
            film[patch.at] += chest.lesion_layer(lesion.look, density, alpha, fine, patch.dx, patch.dy)
        truth = lesion_truth(scene, index, places)
        regions += _regions(lesion, truth, "density", options.size, patch, parts)
    for thing in scene.things:
        if thing.kind == "distractor":
            _electrode(film, thing)
        regions.append(_thing_region(scene, thing, places))
    inverted = bool(rng.random() < 0.25)
    window = Window(center=2047.5, width=4096.0, source="header")
    return Phantom(
        kind="chest", scene=scene, stored=chest.stored(chest.grain(rng, film), inverted), modality="DX",
        photometric="MONOCHROME1" if inverted else "MONOCHROME2", rescale=None, window=window, orientation="L\\F",
        spacing_mm=thorax.spacing_mm, regions=regions,
    )  # fmt: skip


def _electrode(film: Float, thing: Thing) -> None:
    patch = _patch(thing.x, thing.y, thing.radius * 1.1, film.shape[0])
    distance = np.hypot(patch.dx, patch.dy) / thing.radius
    disc = step(0.96 - distance, 0.05) * 0.05 + step(0.08 - np.abs(distance - 0.86), 0.06) * 0.16
    film[patch.at] += disc + step(0.30 - distance, 0.06) * 0.42


def _ct(rng: Rng, options: Options) -> Phantom:
    slice_ = ct.draw_slice(rng, options.size)
    scene = draw_scene("ct", rng, slice_.field(), options.allows(_LOOKS["ct"]), ct.DISTRACTOR, options.max_lesions)
    hu = ct.background(rng, slice_)
    if options.surroundings == "neutral":
        hu = _neutral(scene, hu, np.float32(ct.NEUTRAL) + 20 * noise(rng, options.size, 30))

    def places(x: float, y: float) -> dict[str, str]:
        return {"side": slice_.side(x), "zone": slice_.zone(y)}

    regions = paint_ct(rng, hu, scene, places)
    return Phantom(
        kind="ct", scene=scene, stored=ct.stored(ct.grain(rng, hu)), photometric="MONOCHROME2", modality="CT",
        rescale=Rescale(slope=1.0, intercept=-1024.0), window=Window(center=-600.0, width=1500.0, source="header"),
        orientation="L\\P", spacing_mm=slice_.spacing_mm, regions=regions,
    )  # fmt: skip


def paint_ct(rng: Rng, hu: Float, scene: Scene, places: Places) -> list[PhantomRegion]:
    """Paints a scene into a slice, (H, W) square, HU, in place. Returns its regions."""
    regions: list[PhantomRegion] = []
    size = hu.shape[0]
    for index, lesion in enumerate(scene.lesions):
        patch = _patch(lesion.x, lesion.y, lesion.outline.reach, size)
        fraction = lesion.outline.fraction(patch.dx, patch.dy)
        parts = _parts(lesion, patch, fraction, (lesion.look.density or "solid", "ground-glass"))
        fine = noise(rng, max(fraction.shape), 2.2)[: fraction.shape[0], : fraction.shape[1]]
        for density, alpha in _layers(lesion, patch, fraction, parts):
            hu[patch.at] = ct.lesion_layer(lesion.look, density, alpha, fraction, fine, hu[patch.at])
        regions += _regions(lesion, lesion_truth(scene, index, places), "density", size, patch, parts)
    for thing in scene.things:
        if thing.kind == "distractor":
            _crossing_vessel(hu, thing)
        regions.append(_thing_region(scene, thing, places))
    return regions


def _crossing_vessel(hu: Float, thing: Thing) -> None:
    """A vessel that runs through the slice and divides: long, smooth, tapering; not a nodule."""
    patch = _patch(thing.x, thing.y, thing.radius * 1.2, hu.shape[0])
    along = (np.cos(thing.turn) * patch.dx + np.sin(thing.turn) * patch.dy) / thing.radius
    across = (-np.sin(thing.turn) * patch.dx + np.cos(thing.turn) * patch.dy) / thing.radius
    bend = 0.18 * np.sin(along * 2.2)
    trunk = step(0.16 - 0.07 * along - np.abs(across - bend), 0.05) * step(1.0 - np.abs(along), 0.1)
    fork = (
        step(0.07 - np.abs(across - bend - 0.55 * np.maximum(along, 0)), 0.05)
        * step(along, 0.1)
        * step(0.9 - along, 0.1)
    )
    tube = np.maximum(trunk, fork)
    hu[patch.at] = hu[patch.at] * (1 - tube) + ct.SOFT_HU * tube


def _skin(rng: Rng, options: Options) -> Phantom:
    ground = skin.draw_patch(rng, options.size)
    scene = draw_scene(
        "skin", rng, ground.field(), options.allows(_LOOKS["skin"]), skin.DISTRACTOR, options.max_lesions
    )
    image_HWC = skin.background(rng, ground)
    regions: list[PhantomRegion] = []

    def places(x: float, y: float) -> dict[str, str]:
        return {"zone": ground.vertical(y), "column": ground.horizontal(x)}

    for index, lesion in enumerate(scene.lesions):
        patch = _patch(lesion.x, lesion.y, lesion.outline.reach * 1.15, options.size)
        fraction = lesion.outline.fraction(patch.dx, patch.dy)
        colour = lesion.look.colour or "red"
        second = str(rng.choice([c for c in skin.COLOURS if c != colour]))
        parts = _parts(lesion, patch, fraction, (colour, second))
        pixels = image_HWC[patch.at]
        mottle = 1 + 0.07 * noise(rng, max(fraction.shape), 7)[: fraction.shape[0], : fraction.shape[1], None]
        for name, alpha in _layers(lesion, patch, fraction, parts):
            shade = pixels.mean(axis=-1, keepdims=True) / max(float(np.mean(ground.tone)), 1e-3)
            painted = skin.lesion_colour(lesion.look, name, ground.tone) * mottle * shade
            pixels = pixels * (1 - alpha[..., None]) + painted * alpha[..., None]
        alpha = lesion.outline.alpha(fraction)
        image_HWC[patch.at] = skin.paint_surface(
            rng, lesion.look, lesion.outline, pixels, alpha, fraction, ground.light
        )
        truth = lesion_truth(scene, index, places)
        regions += _regions(lesion, truth, "colour", options.size, patch, parts)
    for thing in scene.things:
        if thing.kind == "distractor":
            _ink(image_HWC, thing)
        regions.append(_thing_region(scene, thing, places))
    photograph = skin.stored(rng, skin.hair(rng, ground, image_HWC))
    return Phantom(
        kind="skin", scene=scene, stored=photograph, photometric="RGB", modality="XC", rescale=None, window=None,
        orientation=None, spacing_mm=ground.spacing_mm, regions=regions,
    )  # fmt: skip


def _ink(image_HWC: Float, thing: Thing) -> None:
    """A surgeon's pen mark: a circle with a cross."""
    patch = _patch(thing.x, thing.y, thing.radius, image_HWC.shape[0])
    distance = np.hypot(patch.dx, patch.dy)
    along = np.cos(thing.turn) * patch.dx + np.sin(thing.turn) * patch.dy
    across = -np.sin(thing.turn) * patch.dx + np.cos(thing.turn) * patch.dy
    ring = step(3.0 - np.abs(distance - thing.radius * 0.85), 2.0)
    cross = step(2.4 - np.minimum(np.abs(along), np.abs(across)), 2.0) * step(thing.radius * 0.6 - distance, 4.0)
    cover = (np.maximum(ring, cross) * 0.78)[..., None]
    image_HWC[patch.at] = image_HWC[patch.at] * (1 - cover) + np.array((0.16, 0.14, 0.46), np.float32) * cover
