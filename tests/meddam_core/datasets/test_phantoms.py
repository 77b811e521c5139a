"""Phantoms: the truth holds in the pixels and masks, and nothing gives a fact away where it should not be seen."""

from __future__ import annotations

import numpy as np
import pytest

from meddam_core.datasets.phantoms import KINDS, Options, Phantom, Phantoms, make_phantom
from meddam_core.datasets.phantoms.scene import MIN_SIDE_PX
from meddam_core.focal import expanded_box
from meddam_core.imaging.limits import Limits
from meddam_core.imaging.render import render
from meddam_core.records import Rle
from meddam_core.regions.geometry import tight_box
from meddam_core.regions.masks import mask_of

PER_KIND = 14


@pytest.fixture(scope="module")
def phantoms() -> list[Phantom]:
    return [make_phantom(kind, 5, index) for kind in KINDS for index in range(PER_KIND)]


def test_same_numbers_same_phantom() -> None:
    for kind in KINDS:
        one, two, other = make_phantom(kind, 1, 2), make_phantom(kind, 1, 2), make_phantom(kind, 1, 3)
        assert np.array_equal(one.stored, two.stored)
        assert [r.truth for r in one.regions] == [r.truth for r in two.regions]
        assert not np.array_equal(one.stored, other.stored)


def test_stored_pixels_are_as_scanners_store_them(phantoms: list[Phantom]) -> None:
    for phantom in phantoms:
        if phantom.kind == "skin":
            assert phantom.stored.shape == (1024, 1024, 3) and phantom.stored.dtype == np.uint8
            continue
        assert phantom.stored.shape == (1024, 1024) and phantom.stored.dtype == np.uint16
        assert phantom.stored.max() < 1 << 12
    hounsfield = [p.stored.astype(int) - 1024 for p in phantoms if p.kind == "ct"]
    for hu in hounsfield:
        assert -1100 < np.median(hu[:40]) < -900  # air above the patient
        assert np.percentile(hu, 99.5) > 150  # bone


def test_lesions_are_whole_large_enough_and_their_crops_unclipped(phantoms: list[Phantom]) -> None:
    for phantom in phantoms:
        for region in phantom.regions:
            x0, y0, x1, y1 = tight_box(region.mask_HW)
            assert min(x1 - x0, y1 - y0) >= MIN_SIDE_PX
            fx0, fy0, fx1, fy1 = expanded_box((x0, y0, x1, y1), (1024, 1024))
            assert (fx1 - fx0, fy1 - fy0) == (3 * (x1 - x0), 3 * (y1 - y0))


def test_regions_of_different_things_do_not_overlap(phantoms: list[Phantom]) -> None:
    for phantom in phantoms:
        total = np.sum([r.mask_HW for r in phantom.regions], axis=0)
        assert total.max() == 1


def test_twins_and_core_with_halo_differ_by_their_masks_alone(phantoms: list[Phantom]) -> None:
    pairs = 0
    for phantom in phantoms:
        parts = [r for r in phantom.regions if r.truth.get("part") in ("twin", "core", "halo")]
        attribute = "colour" if phantom.kind == "skin" else "density"
        for one, two in zip(parts[::2], parts[1::2], strict=True):
            assert tight_box(one.mask_HW) == tight_box(two.mask_HW)
            assert one.truth[attribute] != two.truth[attribute]
            same = {k: v for k, v in one.truth.items() if k not in (attribute, "part")}
            assert same == {k: v for k, v in two.truth.items() if k not in (attribute, "part")}
            pairs += 1
    assert pairs >= 10


def test_sides_zones_and_directions_follow_the_place(phantoms: list[Phantom]) -> None:
    for phantom in phantoms:
        for region in phantom.regions:
            x0, y0, x1, _ = tight_box(region.mask_HW)
            if phantom.kind == "skin":
                assert "side" not in region.truth  # a photograph has no patient side
                if x1 < 1024 / 3:
                    assert region.truth["column"] == "left"
                if y0 > 1024 * 2 / 3:
                    assert region.truth["zone"] == "lower"
                continue
            if x1 < 480:
                assert region.truth["side"] == "right"  # the patient's right is on the left of the picture
            if x0 > 544:
                assert region.truth["side"] == "left"
    zones = {r.truth["zone"] for p in phantoms if p.kind == "chest" for r in p.regions}
    assert zones == {"upper", "middle", "lower"}


def test_sizes_in_mm_are_those_of_the_masks(phantoms: list[Phantom]) -> None:
    for phantom in phantoms:
        for region in phantom.regions:
            if region.truth.get("part") != "whole":
                continue
            ys, xs = np.nonzero(region.mask_HW)
            turns = np.linspace(0, np.pi, 45, endpoint=False)
            longest_px = np.ptp(np.outer(xs, np.cos(turns)) + np.outer(ys, np.sin(turns)), axis=0).max() + 1
            assert abs(longest_px * phantom.spacing_mm - float(region.truth["size_mm"])) <= 0.04 * longest_px + 1
            if phantom.kind != "skin" and region.truth["finding"] in ("nodule", "mass"):
                assert (region.truth["finding"] == "mass") == (longest_px * phantom.spacing_mm > 30) or (
                    abs(longest_px * phantom.spacing_mm - 30) < 2
                )


def _inside_and_around(phantom: Phantom, image_HWC: np.ndarray, index: int) -> tuple[float, float]:
    """Mean brightness inside a region and in a ring around all regions of its place."""
    mask_HW = phantom.regions[index].mask_HW.astype(bool)
    everything = np.any([r.mask_HW for r in phantom.regions], axis=0)
    x0, y0, x1, y1 = expanded_box(tight_box(phantom.regions[index].mask_HW), (1024, 1024))
    window = np.zeros_like(mask_HW)
    window[y0:y1, x0:x1] = True
    grey = image_HWC.mean(axis=-1)
    return float(grey[mask_HW].mean()), float(grey[window & ~everything].mean())


def test_solid_nodules_are_brighter_than_lung_and_solid_than_ground_glass() -> None:
    shown = {}
    for density in ("solid", "ground-glass"):
        options = Options(max_lesions=1, only=(f"density={density}&form=whole&texture=homogeneous",))
        source = Phantoms(count=8, kinds=("ct",), seed=11, options=options, distractors=False)
        contrasts = []
        for item in source.items():
            decoded, regions = source.load(item, Limits())
            image_HWC = render(decoded, "lung")
            mask_HW = mask_of(Rle(size=regions[0].segmentation["size"], counts=regions[0].segmentation["counts"]))
            contrasts.append(image_HWC[mask_HW > 0].mean() - np.median(image_HWC[300:700, 200:400]))
        shown[density] = np.mean(contrasts)
    assert shown["solid"] > shown["ground-glass"] + 30 > 30


def test_films_look_the_same_whichever_way_they_are_stored(phantoms: list[Phantom]) -> None:
    source = Phantoms(count=12, kinds=("chest",), seed=5)
    kinds = set()
    for item in source.items():
        decoded, _ = source.load(item, Limits())
        kinds.add(decoded.photometric)
        image_HWC = render(decoded)
        spine, air = image_HWC[300:700, 500:524].mean(), image_HWC[:60, :60].mean()
        assert spine > 120 > 60 > air  # dense is bright, in both
    assert kinds == {"MONOCHROME1", "MONOCHROME2"}


def test_held_out_combinations_do_not_appear() -> None:
    combination = "margin=spiculated&density=solid"
    for index in range(12):
        without = make_phantom("ct", 3, index, Options(without=(combination,)))
        assert not any(lesion.look.has(combination) for lesion in without.scene.lesions)
        only = make_phantom("ct", 3, index, Options(only=(combination,)))
        assert only.scene.lesions and all(lesion.look.has(combination) for lesion in only.scene.lesions)
    with pytest.raises(ValueError, match="no lesion is of"):
        make_phantom("ct", 3, 0, Options(only=("density=wooden",)))


def test_spicules_are_outside_the_mask_and_thin() -> None:
    options = Options(max_lesions=1, only=("margin=spiculated&density=solid&texture=homogeneous&size=large",))
    for index in range(4):
        phantom = make_phantom("ct", 8, index, options)
        lesion, mask_HW = phantom.scene.lesions[0], phantom.regions[0].mask_HW
        assert lesion.outline.reach > 1.25 * lesion.outline.radius
        assert {s.width_px for s in lesion.outline.spicules} <= {2, 3}
        assert np.hypot(*(np.array(tight_box(mask_HW)[2:]) - (lesion.x, lesion.y))) < 1.5 * lesion.outline.radius


def test_neutral_surroundings_hide_the_anatomy() -> None:
    for kind, seed in (("chest", 1), ("ct", 2)):
        spread = {}
        for surroundings in ("anatomy", "neutral"):
            means = []
            for index in range(10):
                phantom = make_phantom(kind, seed, index, Options(surroundings=surroundings, max_lesions=1))  # type: ignore[arg-type]
                stored = phantom.stored if phantom.photometric != "MONOCHROME1" else 4095 - phantom.stored
                means.append(_inside_and_around(phantom, np.repeat(stored[..., None], 3, -1), 0)[1])
            spread[surroundings] = np.std(means)
        assert spread["neutral"] < 0.35 * spread["anatomy"]


def test_bad_settings_say_what_to_do() -> None:
    with pytest.raises(ValueError, match="chest, ct, skin"):
        Phantoms(kinds=("knee",))  # type: ignore[arg-type]
    for wrong in ("density=wooden", "wood=solid", "colour=red"):
        with pytest.raises(ValueError, match="no lesion is of"):
            Phantoms(kinds=("ct",), options=Options(only=(wrong,)))
    with pytest.raises(ValueError, match="at least 512"):
        Phantoms(options=Options(size=100))
    with pytest.raises(ValueError, match="chest, ct, skin"):
        make_phantom("knee", 0, 0)  # type: ignore[arg-type]
