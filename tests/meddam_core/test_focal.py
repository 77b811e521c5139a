"""The focal crop and the 8-channel input against the reference implementation's own numbers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PilImage

from meddam_core.focal import FocalImage, expanded_box, focal_box, focal_views, full_view, region_crop
from meddam_core.records import Reason, RowError
from meddam_core.regions.geometry import tight_box

ORACLE = Path(__file__).parents[1] / "data" / "oracle"
CASES = sorted((ORACLE / "dam_tiny" / "cases").glob("*.npz"))


def _box_mask(width: int, height: int, box_xywh: list[int]) -> np.ndarray:
    mask_HW = np.zeros((height, width), np.uint8)
    x, y, w, h = box_xywh
    mask_HW[y : y + h, x : x + w] = 1
    return mask_HW


def test_every_crop_of_the_reference_is_reproduced() -> None:
    cases = json.loads((ORACLE / "crop_cases.json").read_text())
    assert len(cases) == 200
    for case in cases:
        size = (case["W"], case["H"])
        mask_HW = _box_mask(*size, case["mask_box_xywh"])
        tight = tight_box(mask_HW)
        assert focal_box(mask_HW) == tuple(case["focal_crop_xyxy"])
        assert expanded_box(tight, size, min_side_px=0) == tuple(case["context_crop_xyxy"])
        assert tight == tuple(case["crop_xyxy"])


@pytest.mark.parametrize("path", CASES, ids=[p.stem for p in CASES])
def test_model_input_of_the_reference_is_reproduced_exactly(path: Path) -> None:
    case = np.load(path)
    images = case["images"] if "images" in case else case["image"][None]
    masks = case["masks"] if "masks" in case else case["mask"][None]
    wanted_N8SS = case["input8"]
    for image_HWC, mask_HW, box, wanted_8SS in zip(images, masks, case["focal_box_xyxy"], wanted_N8SS, strict=True):
        assert focal_box(mask_HW) == tuple(box)
        views_8SS = focal_views(image_HWC, mask_HW, wanted_8SS.shape[-1])
        assert views_8SS.dtype == np.uint8
        value = (views_8SS.astype(np.float32) / 255 - 0.5) / 0.5
        assert np.array_equal(value, wanted_8SS)


def test_any_nonzero_pixel_is_inside() -> None:
    rng = np.random.default_rng(0)
    image_HWC = rng.integers(0, 256, (90, 120, 3), dtype=np.uint8)
    mask_HW = _box_mask(120, 90, [20, 10, 40, 30])
    views = [focal_views(image_HWC, m, 32) for m in (mask_HW, mask_HW * 255, mask_HW * 7, mask_HW.astype(bool))]
    assert all(np.array_equal(views[0], v) for v in views[1:])


def test_regions_of_one_image_are_seen_as_each_alone() -> None:
    rng = np.random.default_rng(1)
    image_HWC = rng.integers(0, 256, (90, 120, 3), dtype=np.uint8)
    masks = [_box_mask(120, 90, box) for box in ([20, 10, 40, 30], [0, 0, 5, 90], [100, 60, 20, 30])]
    for aspect in ("stretch", "pad"):
        shared = FocalImage(image_HWC, 56, aspect)
        assert np.array_equal(shared.full_SSC, full_view(image_HWC, 56, aspect))
        for mask_HW in masks:
            assert np.array_equal(focal_views(image_HWC, mask_HW, 56, aspect), shared.views(mask_HW))
        assert np.array_equal(shared.box_views((20, 10, 60, 40), (120, 90)), shared.views(masks[0]))
        with pytest.raises(RowError, match=r"the mask is \(90, 121\)"):
            shared.box_views((20, 10, 60, 40), (121, 90))


def test_pad_keeps_the_aspect_ratio_and_keeps_image_and_mask_together() -> None:
    image_HWC = np.full((100, 300, 3), 200, np.uint8)
    mask_HW = _box_mask(300, 100, [0, 0, 300, 100])
    views = focal_views(image_HWC, mask_HW, 60, "pad")
    for first in (0, 4):
        rows = np.flatnonzero((views[first] == 200).all(axis=1))
        assert list(rows) == list(range(20, 40))
        assert np.array_equal(np.flatnonzero(views[first + 3].all(axis=1)), rows)
        assert not views[first : first + 4, :20].any() and not views[first : first + 4, 40:].any()


def test_bad_masks_are_row_errors() -> None:
    image_HWC = np.zeros((20, 30, 3), np.uint8)
    with pytest.raises(RowError) as empty:
        focal_views(image_HWC, np.zeros((20, 30), np.uint8), 16)
    assert empty.value.reason is Reason.MASK_EMPTY
    with pytest.raises(RowError) as other_size:
        focal_views(image_HWC, np.ones((30, 20), np.uint8), 16)
    assert other_size.value.reason is Reason.MASK_SIZE
    with pytest.raises(ValueError, match="render it first"):
        focal_views(np.zeros((20, 30, 4), np.uint8), np.ones((20, 30), np.uint8), 16)  # RGBA would be premultiplied


def test_region_crop_is_the_box_and_keeps_its_shape_when_resized() -> None:
    rng = np.random.default_rng(2)
    image_HWC = rng.integers(1, 256, (50, 80, 3), dtype=np.uint8)
    assert np.array_equal(region_crop(image_HWC, (10, 5, 30, 15)), image_HWC[5:15, 10:30])
    resized = region_crop(image_HWC, (10, 5, 30, 15), size=40)
    assert resized.shape == (40, 40, 3)
    assert not resized[:10].any() and not resized[30:].any() and resized[10:30].any(axis=-1).all()
    with pytest.raises(RowError):
        region_crop(image_HWC, (90, 5, 100, 15))


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_the_focal_box_holds_the_region_and_stays_inside_the_image(data: st.DataObject) -> None:
    width, height = data.draw(st.integers(1, 300)), data.draw(st.integers(1, 300))
    x0, y0 = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
    x1, y1 = data.draw(st.integers(x0 + 1, width)), data.draw(st.integers(y0 + 1, height))
    fx0, fy0, fx1, fy1 = expanded_box((x0, y0, x1, y1), (width, height))
    assert 0 <= fx0 <= x0 < x1 <= fx1 <= width
    assert 0 <= fy0 <= y0 < y1 <= fy1 <= height


@given(
    st.integers(1, 130),
    st.integers(1, 130),
    st.integers(8, 70),
    st.integers(0, 2**32 - 1),
    st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_views_equal_a_plain_resize_of_everything(
    width: int, height: int, size: int, seed: int, is_box: bool
) -> None:  # fmt: skip
    """The crops are resized around the region only and grey pictures once: none of it may show in a single bit."""
    rng = np.random.default_rng(seed)
    grey_HW = rng.integers(0, 256, (height, width), dtype=np.uint8)
    image_HWC = np.repeat(grey_HW[:, :, None], 3, 2) if seed % 2 else rng.integers(0, 256, (height, width, 3), np.uint8)
    x0, y0 = int(rng.integers(0, width)), int(rng.integers(0, height))
    x1, y1 = int(rng.integers(x0 + 1, width + 1)), int(rng.integers(y0 + 1, height + 1))
    mask_HW = np.zeros((height, width), np.uint8)
    mask_HW[y0:y1, x0:x1] = 1 if is_box else rng.integers(0, 2, (y1 - y0, x1 - x0))
    mask_HW[y0, x0] = 1
    views_8SS = focal_views(image_HWC, mask_HW, size)
    left, top, right, bottom = focal_box(mask_HW)
    for part, views in (
        ((slice(None), slice(None)), views_8SS[:4]), ((slice(top, bottom), slice(left, right)), views_8SS[4:])
    ):  # fmt: skip
        plain = PilImage.fromarray(np.ascontiguousarray(image_HWC[part]))
        plain_mask = PilImage.fromarray(np.ascontiguousarray(mask_HW[part] * np.uint8(255)))
        assert np.array_equal(np.asarray(plain.resize((size, size), 3)).transpose(2, 0, 1), views[:3])
        assert np.array_equal(np.asarray(plain_mask.resize((size, size), 3)), views[3])
    if is_box:
        box = (x0, y0, x1, y1)
        assert np.array_equal(FocalImage(image_HWC, size).box_views(box, (width, height)), views_8SS)
        one_grey = np.broadcast_to(image_HWC[:, :, :1], image_HWC.shape)
        if seed % 2:
            assert np.array_equal(FocalImage(one_grey, size).box_views(box, (width, height)), views_8SS)
