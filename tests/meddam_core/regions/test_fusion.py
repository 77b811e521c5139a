"""Fused boxes: votes are readers, order and names do not matter, no box is lost."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meddam_core.regions.fusion import FusedBox, ReaderBox, fuse_boxes


def _fused(*boxes: tuple[int, tuple[float, float, float, float]], min_overlap: float = 0.4) -> list[FusedBox]:
    return fuse_boxes([ReaderBox(reader=r, box=b) for r, b in boxes], min_overlap)


def test_boxes_of_one_place_become_their_mean() -> None:
    (fused,) = _fused((0, (10, 10, 50, 50)), (1, (14, 8, 54, 48)), (2, (12, 12, 52, 52)))
    assert fused == FusedBox(box=(12, 10, 52, 50), members=(0, 1, 2), num_readers=3)


def test_places_apart_stay_apart() -> None:
    assert [f.num_readers for f in _fused((0, (0, 0, 10, 10)), (1, (9, 9, 20, 20)), (2, (100, 0, 120, 20)))] == [
        1,
        1,
        1,
    ]


def test_a_reader_drawing_twice_counts_once() -> None:
    (fused,) = _fused((0, (0, 0, 40, 40)), (0, (0, 0, 40, 44)), (1, (0, 0, 40, 46)))
    assert fused.num_readers == 2 and fused.box == (0, 0, 40, 44)


def test_any_overlap_can_be_enough() -> None:
    boxes = ((0, (0.0, 0.0, 100.0, 100.0)), (1, (90.0, 0.0, 190.0, 100.0)))
    assert len(_fused(*boxes)) == 2 and len(_fused(*boxes, min_overlap=0.0)) == 1
    assert len(_fused((0, (0, 0, 10, 10)), (1, (10, 0, 20, 10)), min_overlap=0.0)) == 2, "touching is no overlap"


def test_an_overlap_that_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 0 and below 1"):
        fuse_boxes([], 1.0)


_BOXES = st.lists(
    st.tuples(st.integers(0, 2), st.integers(0, 60), st.integers(0, 60), st.integers(5, 40), st.integers(5, 40)),
    max_size=9,
)


@settings(max_examples=150, deadline=None)
@given(_BOXES, st.randoms(use_true_random=False))
def test_order_and_names_do_not_matter_and_every_box_is_somewhere(drawn: list[tuple[int, ...]], random: object) -> None:
    boxes = [ReaderBox(reader=r, box=(x, y, x + w, y + h)) for r, x, y, w, h in drawn]
    fused = fuse_boxes(boxes)
    assert sorted(i for f in fused for i in f.members) == list(range(len(boxes)))
    shuffled = boxes.copy()
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    renamed = [ReaderBox(reader=7 - b.reader, box=b.box) for b in shuffled]
    again = fuse_boxes(renamed)
    assert [(f.box, f.num_readers) for f in again] == [(f.box, f.num_readers) for f in fused]
