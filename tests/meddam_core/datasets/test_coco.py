"""COCO instances: polygons, crowds, categories; and large files read a piece at a time."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meddam_core.datasets import json_stream
from meddam_core.datasets.coco import Coco
from meddam_core.datasets.json_stream import array_elements
from meddam_core.records import Label, Reason

BASE: dict[str, Any] = {
    "info": {"note": "a [tricky] {text} \\", "n": [1, [2, {"x": "]"}]]},
    "annotations": [
        {"id": 1, "image_id": 7, "category_id": 3, "bbox": [10, 20, 30, 40], "segmentation": [[10, 20, 40, 20, 40, 6]]},
        {"id": 2, "image_id": 7, "category_id": 4, "bbox": [0, 0, 5, 5], "iscrowd": 1,
         "segmentation": {"size": [100, 80], "counts": [0, 25, 7975]}},
        {"id": 3, "image_id": 9, "category_id": 3, "bbox": [1, 1, 2, 2]},
        {"id": 3, "image_id": 9, "category_id": 3, "bbox": [4, 4, 2, 2]},
        {"id": 5, "image_id": 9, "category_id": 3},
        {"id": 6, "image_id": 55, "category_id": 3, "bbox": [1, 1, 2, 2]},
    ],
    "images": [
        {"id": 7, "file_name": "seven.jpg", "width": 80, "height": 100},
        {"id": 9, "file_name": "nine.jpg"},
        {"id": 11, "file_name": "eleven.jpg"},
        {"id": 7, "file_name": "copy.jpg"},
    ],
    "categories": [{"id": 3, "name": "cat"}, {"id": 4, "name": "people"}],
}  # fmt: skip


def _coco(tmp_path: Path, content: Any, **changes: Any) -> Coco:
    path = tmp_path / "instances.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return Coco(annotations=str(path), images="s3://bucket/val", **changes)


def test_images_with_their_instances(tmp_path: Path) -> None:
    items = list(_coco(tmp_path, BASE).items())
    seven = next(i for i in items if i.key == "seven.jpg")
    assert seven.uri == "s3://bucket/val/seven.jpg"
    assert [r.box for r in seven.regions] == [[10, 20, 40, 60], [0, 0, 5, 5]]
    assert seven.regions[0].labels == [Label(name="cat", value="present", trust=1.0)]
    assert [x.name for x in seven.regions[1].labels] == ["people", "crowd"]
    assert seven.regions[1].segmentation == {"size": [100, 80], "counts": [0, 25, 7975]}
    nine = next(i for i in items if i.key == "nine.jpg")
    assert len(nine.regions) == 1
    assert [p.reason for p in nine.problems] == [Reason.DUPLICATE_ID, Reason.BAD_ANNOTATION]
    assert next(i for i in items if i.key == "eleven.jpg").regions == []
    lost = [p.reason for i in items if not i.uri for p in i.problems]
    assert sorted(lost) == [Reason.BAD_ANNOTATION, Reason.DUPLICATE_ID]  # a stray annotation, an image id twice


def test_crowds_can_be_left_out(tmp_path: Path) -> None:
    items = list(_coco(tmp_path, BASE, crowds=False).items())
    assert len(next(i for i in items if i.key == "seven.jpg").regions) == 1


@pytest.mark.parametrize(
    "content", ["", "[]", "{", '{"images": [{"id": 1}', '{"annotations": []}', '{"images": [3]}', '{"images": 3}']
)
def test_files_that_are_not_cocos_say_so(tmp_path: Path, content: str) -> None:
    with pytest.raises(ValueError, match="not a COCO instances file"):
        list(_coco(tmp_path, content).items())


def test_an_absent_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no annotation file"):
        Coco(annotations=str(tmp_path / "none.json"), images=".").fingerprint()


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(VALUES, max_size=6), VALUES, st.lists(VALUES, max_size=3), st.integers(1, 40), st.sampled_from([None, 1])
)
def test_streamed_elements_are_those_of_the_whole_file(
    wanted: list[Any], skipped: Any, more: list[Any], chunk: int, indent: int | None
) -> None:
    text = json.dumps({"first": skipped, "images": wanted, "other": more, "annotations": more}, indent=indent)
    before, json_stream.CHUNK = json_stream.CHUNK, chunk
    try:
        found = list(array_elements(io.StringIO(text), {"images", "annotations"}))
    finally:
        json_stream.CHUNK = before
    assert found == [("images", v) for v in wanted] + [("annotations", v) for v in more]
