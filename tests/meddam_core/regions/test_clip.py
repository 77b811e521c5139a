"""The frames of a video prompt: the reference's choice, among the frames that show the region."""

from __future__ import annotations

import numpy as np
import pytest

from meddam_core.records import Reason, Region, RowError
from meddam_core.regions.clip import clip_frames, clip_masks
from meddam_core.regions.masks import rle_of


@pytest.mark.parametrize(
    ("shows", "expected"),
    [
        ([True] * 8, [0, 1, 2, 3, 4, 5, 6, 7]),
        ([True] * 20, [0, 2, 5, 8, 10, 13, 16, 19]),
        ([False, True, True, True, False], [1, 1, 1, 1, 2, 2, 2, 3]),
        ([False, True], [1] * 8),
    ],
)
def test_frames_at_equal_steps_among_those_that_show_the_region(shows: list[bool], expected: list[int]) -> None:
    assert clip_frames(shows) == expected


def test_a_region_on_no_frame_is_a_reason() -> None:
    with pytest.raises(RowError) as caught:
        clip_frames([False, False])
    assert caught.value.reason == Reason.MASK_EMPTY


def test_a_region_known_on_one_frame_is_taken_to_be_on_all() -> None:
    region = Region(region_id=1, box=(2, 3, 5, 7))
    masks = clip_masks(region, (10, 12), 3)
    assert [int(mask.sum()) for mask in masks] == [12] * 3 and masks[0].shape == (12, 10)


def test_masks_must_fit_the_frames() -> None:
    mask = rle_of(np.ones((12, 10), np.uint8))
    region = Region(region_id=1, box=(2, 3, 5, 7), frame_masks=[mask, mask])
    assert [int(m.sum()) for m in clip_masks(region, (10, 12), 2)] == [120, 120]
    for size, num_frames in (((10, 12), 3), ((11, 12), 2)):
        with pytest.raises(RowError) as caught:
            clip_masks(region, size, num_frames)
        assert caught.value.reason == Reason.MASK_SIZE
