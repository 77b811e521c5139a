"""Masks against pycocotools, and broken masks that must become reasons, not crashes."""

from __future__ import annotations

import contextlib
import io
import warnings
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PilImage
from pycocotools import mask as coco_mask

from meddam_core.records import Reason, Region, Rle, RowError
from meddam_core.regions.geometry import tight_box
from meddam_core.regions.masks import (
    counts_of,
    mask_of,
    mask_of_png,
    mask_of_segmentation,
    prompt_box,
    region_prompt_mask,
    rle_of,
)


@st.composite
def masks(draw: st.DrawFn) -> np.ndarray:
    height, width = draw(st.integers(1, 60)), draw(st.integers(1, 60))
    seed, share = draw(st.integers(0, 2**20)), draw(st.sampled_from([0.02, 0.3, 0.9, 1.0]))
    return (np.random.default_rng(seed).random((height, width)) < share).astype(np.uint8)


def _decoded(runs: dict[str, Any]) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # pycocotools with NumPy 2
        return np.asarray(coco_mask.decode(runs))


@settings(max_examples=200, deadline=None)
@given(masks())
def test_run_lengths_are_those_of_coco_in_both_directions(mask_HW: np.ndarray) -> None:
    rle = rle_of(mask_HW * 255)
    assert np.array_equal(mask_of(rle), mask_HW)
    assert np.array_equal(_decoded({"size": list(rle.size), "counts": rle.counts.encode()}), mask_HW)
    if mask_HW.any():
        size = (mask_HW.shape[1], mask_HW.shape[0])
        uncompressed = {"size": list(rle.size), "counts": counts_of(rle.counts).tolist()}
        assert np.array_equal(mask_of_segmentation(uncompressed, size), mask_HW)
        compressed = {"size": list(rle.size), "counts": rle.counts}
        assert np.array_equal(mask_of_segmentation(compressed, size), mask_HW)


def test_polygons_fill_as_coco_does() -> None:
    polygons = [[10.5, 10, 40, 12, 30, 44.2], [50, 50, 58, 50, 58, 58, 50, 58]]
    expected = _decoded(coco_mask.merge(coco_mask.frPyObjects(polygons, 80, 100)))
    assert np.array_equal(mask_of_segmentation(polygons, (100, 80)), expected)
    assert np.array_equal(
        mask_of_segmentation(polygons[0], (100, 80)),
        _decoded(coco_mask.frPyObjects(polygons[:1], 80, 100)[0]),
    )


@pytest.mark.parametrize(
    ("segmentation", "reason"),
    [
        ({"size": [20, 30], "counts": "~~~"}, Reason.BAD_ANNOTATION),
        ({"size": [20, 30], "counts": "P"}, Reason.BAD_ANNOTATION),  # ends inside a number
        ({"size": [20, 30], "counts": [5, 10]}, Reason.BAD_ANNOTATION),  # does not add up
        ({"size": [20, 30], "counts": [-600, 1200]}, Reason.BAD_ANNOTATION),
        ({"size": [20, 30], "counts": [600]}, Reason.MASK_EMPTY),
        ({"size": [20, 30], "counts": [1.5, 598.5]}, Reason.BAD_ANNOTATION),
        ({"size": [30, 20], "counts": [0, 600]}, Reason.MASK_SIZE),
        ({"size": [10**6, 10**6], "counts": [0, 10**12]}, Reason.MASK_SIZE),
        ({"size": "big", "counts": []}, Reason.BAD_ANNOTATION),
        ({}, Reason.BAD_ANNOTATION),
        ([[1, 2, 3, 4]], Reason.BAD_ANNOTATION),
        ([[1, 2, 3, 4, 5, float("nan")]], Reason.BAD_ANNOTATION),
        ([[1, 2, 3, 4, 5]], Reason.BAD_ANNOTATION),
        ([[0, 0, 1e12, 0, 1e12, 1e12]], Reason.BOX_OUTSIDE),
        ([], Reason.BAD_ANNOTATION),
        ("polygon", Reason.BAD_ANNOTATION),
        (None, Reason.BAD_ANNOTATION),
        ([[35, 5, 50, 5, 45, 15]], Reason.MASK_EMPTY),  # wholly beside the image
    ],
)
def test_broken_segmentations_get_their_reason(segmentation: Any, reason: Reason) -> None:
    with pytest.raises(RowError) as error:
        mask_of_segmentation(segmentation, (30, 20))
    assert error.value.reason is reason


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(min_codepoint=40, max_codepoint=120), max_size=30))
def test_any_string_of_run_lengths_is_a_mask_or_a_reason(counts: str) -> None:
    with contextlib.suppress(RowError):
        assert mask_of(Rle(size=(20, 30), counts=counts)).shape == (20, 30)


def _png(picture: PilImage.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("mode", ["1", "L", "P", "I;16", "RGB", "RGBA", "LA"])
def test_mask_pictures_of_every_mode(mode: str) -> None:
    wanted_HW = np.zeros((20, 30), np.uint8)
    wanted_HW[5:9, 10:22] = 1
    if mode == "I;16":
        picture = PilImage.fromarray(wanted_HW.astype(np.uint16) * 300)
    elif mode == "P":
        picture = PilImage.fromarray(wanted_HW)
        picture.putpalette([0, 0, 0, 7, 7, 7])
    else:
        picture = PilImage.fromarray(wanted_HW * 255).convert(mode)
    assert np.array_equal(mask_of_png(_png(picture), (30, 20)), wanted_HW)


def test_bad_mask_pictures_get_their_reason() -> None:
    blank = _png(PilImage.new("L", (30, 20)))
    for data, size, reason in [
        (blank, (30, 20), Reason.MASK_EMPTY),
        (blank, (20, 30), Reason.MASK_SIZE),
        (blank[:40], (30, 20), Reason.BAD_ANNOTATION),
        (b"not a picture", (30, 20), Reason.BAD_ANNOTATION),
        (b"", (30, 20), Reason.BAD_ANNOTATION),
    ]:
        with pytest.raises(RowError) as error:
            mask_of_png(data, size)
        assert error.value.reason is reason


def _disc_region() -> Region:
    ys, xs = np.mgrid[:100, :120]
    mask_HW = ((xs - 60) ** 2 + (ys - 40) ** 2 <= 20**2).astype(np.uint8)
    return Region(region_id=0, box=tight_box(mask_HW), mask=rle_of(mask_HW))


def test_a_box_prompt_has_the_margin_and_a_mask_prompt_has_not() -> None:
    region, size = _disc_region(), (120, 100)
    boxed = region_prompt_mask(region, size, 0.10, "box")
    assert tight_box(boxed) == (36, 16, 85, 65) == prompt_box(region, size, 0.10, "box")
    assert boxed.sum() == 49 * 49
    masked = region_prompt_mask(region, size, 0.10, "mask")
    assert region.mask is not None and np.array_equal(masked, mask_of(region.mask))
    assert prompt_box(region, size, 0.10, "mask") == region.box == (40, 20, 81, 61)


def test_a_mask_prompt_without_a_mask_is_the_box_with_its_margin() -> None:
    region = Region(region_id=0, box=(40, 20, 81, 61))
    assert tight_box(region_prompt_mask(region, (120, 100), 0.10, "mask")) == (36, 16, 85, 65)


def test_a_mask_of_another_size_is_refused() -> None:
    with pytest.raises(RowError) as error:
        region_prompt_mask(_disc_region(), (100, 120), 0, "mask")
    assert error.value.reason is Reason.MASK_SIZE
