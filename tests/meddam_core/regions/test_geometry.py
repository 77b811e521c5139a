"""Boxes: what is clipped, what is rejected, and what a margin is."""

from __future__ import annotations

import contextlib
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meddam_core.records import Reason, RowError
from meddam_core.regions.geometry import box_mask, checked_box, intersection_over_union, tight_box, with_margin

SIZES = st.tuples(st.integers(1, 400), st.integers(1, 300))


@st.composite
def boxes_inside(draw: st.DrawFn) -> tuple[tuple[int, int, int, int], tuple[int, int]]:
    size = draw(SIZES)
    x0, y0 = draw(st.integers(0, size[0] - 1)), draw(st.integers(0, size[1] - 1))
    x1, y1 = draw(st.integers(x0 + 1, size[0])), draw(st.integers(y0 + 1, size[1]))
    return (x0, y0, x1, y1), size


@pytest.mark.parametrize(
    ("box", "reason"),
    [
        ((10, 10, 10, 20), Reason.BOX_EMPTY),
        ((30, 10, 20, 20), Reason.BOX_EMPTY),
        ((200, 200, 260, 260), Reason.BOX_OUTSIDE),
        ((-50, -50, 0, 0), Reason.BOX_OUTSIDE),
        ((90, 90, 2000, 2000), Reason.BOX_OUTSIDE),
        ((math.nan, 0, 1, 1), Reason.BAD_ANNOTATION),
        ((0, 0, math.inf, 1), Reason.BAD_ANNOTATION),
        ((1, 2, 3), Reason.BAD_ANNOTATION),
        (("1", "2", "3", "4"), Reason.BAD_ANNOTATION),
    ],
)
def test_bad_boxes_get_their_reason(box: tuple[float, ...], reason: Reason) -> None:
    with pytest.raises(RowError) as error:
        checked_box(box, (100, 100))
    assert error.value.reason is reason


def test_a_box_that_hangs_over_the_edge_is_clipped_and_fractions_round_outwards() -> None:
    assert checked_box((-3, 90.2, 20.1, 104), (100, 100)) == (0, 90, 21, 100)


def test_a_margin_is_a_share_of_each_side_added_on_both() -> None:
    assert with_margin((100, 100, 200, 140), 0.10, (1000, 1000)) == (90, 96, 210, 144)
    assert with_margin((100, 100, 200, 140), 0.15, (1000, 1000)) == (85, 94, 215, 146)
    assert with_margin((0, 0, 100, 100), 0.10, (100, 105)) == (0, 0, 100, 105)
    with pytest.raises(ValueError, match="0 or more"):
        with_margin((0, 0, 10, 10), -0.1, (20, 20))


@settings(max_examples=200, deadline=None)
@given(boxes_inside(), st.floats(0, 3))
def test_margins_grow_inside_the_image(case: tuple[tuple[int, int, int, int], tuple[int, int]], margin: float) -> None:
    box, size = case
    grown = with_margin(box, margin, size)
    assert 0 <= grown[0] <= box[0] < box[2] <= grown[2] <= size[0]
    assert 0 <= grown[1] <= box[1] < box[3] <= grown[3] <= size[1]
    assert with_margin(box, 0, size) == box


@settings(max_examples=200, deadline=None)
@given(boxes_inside())
def test_the_tight_box_of_a_box_mask_is_the_box(case: tuple[tuple[int, int, int, int], tuple[int, int]]) -> None:
    box, size = case
    mask_HW = box_mask(box, size)
    assert mask_HW.shape == (size[1], size[0]) and tight_box(mask_HW) == box
    assert int(mask_HW.sum()) == (box[2] - box[0]) * (box[3] - box[1])
    assert intersection_over_union(box, box) == 1


@settings(max_examples=300, deadline=None)
@given(st.lists(st.floats(-600, 900), min_size=4, max_size=4), SIZES)
def test_a_box_is_rejected_or_ends_up_inside(box: list[float], size: tuple[int, int]) -> None:
    with contextlib.suppress(RowError):
        x0, y0, x1, y1 = checked_box(box, size)
        assert 0 <= x0 < x1 <= size[0] and 0 <= y0 < y1 <= size[1]
        assert x0 <= max(box[0], 0) and x1 >= min(box[2], size[0])


def test_an_empty_mask_has_no_box() -> None:
    with pytest.raises(RowError) as error:
        tight_box(np.zeros((4, 4), np.uint8))
    assert error.value.reason is Reason.MASK_EMPTY
