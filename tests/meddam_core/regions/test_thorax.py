"""The thorax on films: where it is on phantoms, nowhere where it cannot be told, and sides as the patient has them."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from meddam_core.datasets.phantoms import Options, Phantom, make_phantom
from meddam_core.datasets.phantoms.scene import Kind
from meddam_core.imaging.decode import decode
from meddam_core.imaging.render import render
from meddam_core.regions.thorax import (
    Midline,
    Thorax,
    film_midline,
    find_thorax,
    lung_zone,
    patient_side,
    slice_midline,
)

REAL = Path(__file__).parents[4] / "shared/data/real/cxr"
"""Two real films, for whoever has them."""


SIZE_PX = 512


@cache
def _phantom(kind: Kind, index: int) -> Phantom:
    return make_phantom(kind, seed=5, index=index, options=Options(size=SIZE_PX))


def _film(index: int) -> NDArray[np.uint8]:
    phantom = _phantom("chest", index)
    grey_HW = (phantom.stored >> 4).astype(np.uint8)
    return 255 - grey_HW if phantom.photometric == "MONOCHROME1" else grey_HW


@pytest.mark.parametrize("index", range(5))
def test_the_sides_and_zones_of_a_phantoms_lesions_are_those_it_was_drawn_with(index: int) -> None:
    phantom = _phantom("chest", index)
    thorax = find_thorax(_film(index))
    assert thorax is not None and thorax.confidence > 0.8
    asked = 0
    for region in phantom.regions:
        side = patient_side(_box(region.mask_HW), film_midline(thorax), phantom.orientation)
        assert side in (None, region.truth["side"])
        asked += side is not None
    assert asked > 0


def test_the_frame_holds_the_lungs_as_they_were_drawn() -> None:
    errors = []
    for index in range(8):
        phantom = _phantom("chest", index)
        thorax = find_thorax(_film(index))
        assert thorax is not None
        zones = [(lung_zone(_box(r.mask_HW), thorax), r.truth["zone"]) for r in phantom.regions]
        errors += [a != b for a, b in zones if a is not None]
    assert len(errors) > 10 and np.mean(errors) < 0.15, "zones may differ only at their borders"


def _box(mask_HW: NDArray[np.uint8]) -> list[float]:
    ys, xs = np.nonzero(mask_HW)
    return [float(v) for v in (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)]


def test_no_frame_where_there_is_no_thorax() -> None:
    rng = np.random.default_rng(0)
    assert find_thorax(np.zeros((300, 300), np.uint8)) is None
    assert find_thorax(rng.integers(0, 255, (300, 260)).astype(np.uint8)) is None
    assert find_thorax(np.tile(np.linspace(0, 255, 300), (300, 1))) is None
    for index in range(3):
        skin = _phantom("skin", index).stored.mean(axis=-1)
        assert find_thorax(skin) is None


def test_no_frame_where_a_lung_is_opaque_or_cut_off() -> None:
    film_HW = _film(0)
    opaque_HW = film_HW.copy()
    opaque_HW[:, : film_HW.shape[1] // 2] = 200
    assert find_thorax(opaque_HW) is None
    assert find_thorax(film_HW[:, film_HW.shape[1] // 2 :]) is None
    inverted = find_thorax(255 - film_HW)
    assert inverted is None or inverted.confidence < 0.9


def test_the_frame_scales_with_the_film() -> None:
    film_HW = _film(3)
    small, large = find_thorax(film_HW), find_thorax(np.kron(film_HW, np.ones((3, 3), np.uint8)))
    assert small is not None and large is not None
    assert np.abs(np.array(large.box) / 3 - np.array(small.box)).max() < 0.02 * film_HW.shape[0]


THORAX = Thorax(box=(100, 100, 400, 400), midline_x=250, confidence=1.0)


@pytest.mark.parametrize(
    ("box", "zone"),
    [
        ((120, 110, 160, 150), "upper"),
        ((120, 230, 160, 270), "middle"),
        ((120, 360, 160, 420), "lower"),
        ((120, 110, 160, 300), None),
        ((120, 0, 160, 40), None),
    ],
)
def test_zones_are_thirds(box: tuple[int, ...], zone: str | None) -> None:
    assert lung_zone(box, THORAX) == zone


@pytest.mark.parametrize(
    ("box", "orientation", "side"),
    [
        ((120, 110, 160, 150), "L\\F", "right"),
        ((320, 110, 360, 150), "L\\F", "left"),
        ((320, 110, 360, 150), "R\\F", "right"),
        ((320, 110, 360, 150), "LP\\F", "left"),
        ((320, 110, 360, 150), None, None),
        ((320, 110, 360, 150), "P\\F", None),
        ((235, 110, 275, 150), "L\\F", None),
        ((150, 110, 420, 150), "L\\F", None),
    ],
)
def test_sides_follow_the_patient(box: tuple[int, ...], orientation: str | None, side: str | None) -> None:
    assert patient_side(box, film_midline(THORAX), orientation) == side


def test_the_midline_of_a_slice_is_the_bodys_not_the_pictures() -> None:
    hounsfield_HW = np.full((200, 300), -1000)
    hounsfield_HW[40:160, 60:220] = 30
    hounsfield_HW[60:140, 80:120] = -850
    hounsfield_HW[190:192, :] = 200
    assert slice_midline(hounsfield_HW, "L\\P") == Midline(x=140.0, width=160.0)
    assert slice_midline(hounsfield_HW, None) is None
    assert slice_midline(np.full((200, 300), -1000), "L\\P") is None


@pytest.mark.skipif(not REAL.is_dir(), reason="the real films are not beside the repository")
def test_the_real_films_have_their_lungs_in_the_frame() -> None:
    expected = {"00000001_000.png": (42, 70, 466, 406), "00027426_000.png": (70, 58, 484, 398)}  # checked by eye
    for path in sorted(REAL.glob("*.png")):
        thorax = find_thorax(render(decode(path.read_bytes()))[..., 0])
        assert thorax is not None
        assert np.abs(np.array(thorax.box) - np.array(expected[path.name])).max() < 15
