"""Manifests: every way to write a region, and every way to get one wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from meddam_core.datasets.base import SourceItem
from meddam_core.datasets.manifest import Manifest, labels_of
from meddam_core.records import Label, Reason


def _items(tmp_path: Path, lines: list[Any], **settings: Any) -> list[SourceItem]:
    path = tmp_path / "list.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return list(Manifest(path=str(path), **settings).items())


def test_lines_of_one_image_belong_together_wherever_they_stand(tmp_path: Path) -> None:
    items = _items(
        tmp_path,
        [
            {"image": "b.png", "box": [1, 2, 3, 4]},
            {"image": "a.png", "box": [1, 2, 3, 4], "label": "nodule", "split": "test", "patient_id": "P1"},
            {"image": "b.png", "box": [5, 6, 7, 8]},
            {"image": "a.png", "frame": 3, "box": [1, 2, 3, 4]},
            {"image": "c.png"},
        ],
    )
    assert [(Path(i.uri or "").name, i.frame, len(i.regions)) for i in items] == [
        ("b.png", None, 2),
        ("a.png", None, 1),
        ("a.png", 3, 1),
        ("c.png", None, 0),
    ]
    assert items[0].uri == str(tmp_path / "b.png")
    assert items[1].split == "test" and items[1].patient_id == "P1"
    assert items[1].regions[0].labels == [Label(name="nodule", value="present")]
    assert len({i.key for i in items}) == 4


def test_every_kind_of_region(tmp_path: Path) -> None:
    rle = {"size": [4, 4], "counts": "0@"}
    (item,) = _items(
        tmp_path,
        [
            {
                "image": "s3://bucket/a.png",
                "regions": [
                    {"box": "1, 2.5, 30 40", "confidence": 0.5},
                    {"mask": rle, "labels": {"margin": "smooth", "crust": False}},
                    {"mask": [[0, 0, 3, 0, 3, 3]], "labels": ["a", {"name": "b", "value": "absent", "trust": 0.5}]},
                    {"mask": "masks/1.png", "box": [0, 0, 2, 2], "label": "x; y"},
                ],
            }
        ],
        root="s3://other/root",
    )
    assert item.uri == "s3://bucket/a.png" and not item.problems
    box, run_lengths, polygon, picture = item.regions
    assert box.box == [1, 2.5, 30, 40] and box.confidence == 0.5
    assert run_lengths.segmentation == rle
    assert run_lengths.labels == [Label(name="margin", value="smooth"), Label(name="crust", value="absent")]
    assert polygon.segmentation == [[0, 0, 3, 0, 3, 3]]
    assert polygon.labels == [Label(name="a", value="present"), Label(name="b", value="absent", trust=0.5)]
    assert picture.mask_uri == "s3://other/root/masks/1.png" and [x.name for x in picture.labels] == ["x", "y"]


def test_csv_says_the_same_as_jsonl(tmp_path: Path) -> None:
    path = tmp_path / "list.csv"
    path.write_text(
        "image,box,label,frame,labels,split\n"
        'a.dcm,"10,20,30,40",nodule;mass,2,,train\n'
        'a.dcm,"[1, 2, 3, 4]",,2,"{""margin"": ""smooth""}",\n'
        "b.dcm,,,,,\n",
        encoding="utf-8-sig",
    )
    first, second = Manifest(path=str(path)).items()
    assert first.frame == 2 and first.split == "train" and not first.problems
    assert [r.box for r in first.regions] == [[10, 20, 30, 40], [1, 2, 3, 4]]
    assert [x.name for x in first.regions[0].labels] == ["nodule", "mass"]
    assert first.regions[1].labels == [Label(name="margin", value="smooth")]
    assert second.regions == [] and not second.problems


@pytest.mark.parametrize(
    "region",
    [
        {"box": [1, 2, 3]},
        {"box": "somewhere"},
        {"box": {"x": 1}},
        {"box": [1, 2, 3, 4], "confidence": 7},
        {"box": [1, 2, 3, 4], "labels": 7},
        {"box": [1, 2, 3, 4], "labels": [{"value": "x"}]},
        {"box": [1, 2, 3, 4], "labels": [{"name": "x", "trust": "much"}]},
        {"box": [1, 2, 3, 4], "colour": "red"},
        {"label": "x"},
        "box",
    ],
)
def test_a_bad_region_is_a_problem_and_the_others_stay(tmp_path: Path, region: Any) -> None:
    (item,) = _items(tmp_path, [{"image": "a.png", "regions": [{"box": [1, 2, 3, 4]}, region]}])
    assert len(item.regions) == 1
    assert [(p.reason, p.region) for p in item.problems] == [(Reason.BAD_ANNOTATION, 1)]


def test_duplicates_are_named(tmp_path: Path) -> None:
    items = _items(
        tmp_path,
        [
            {"image": "a.png", "id": "one", "box": [1, 2, 3, 4]},
            {"image": "a.png", "id": "one", "box": [1, 2, 3, 4]},
            {"image": "b.png", "id": "one", "box": [1, 2, 3, 4]},
            {"image": "a.png", "id": "one", "frame": 1, "box": [1, 2, 3, 4]},
        ],
    )
    assert [[(p.reason, p.region) for p in i.problems] for i in items] == [
        [(Reason.DUPLICATE_ID, 1)],
        [(Reason.DUPLICATE_ID, None)],
        [],
    ]


def test_broken_lines_and_contradictions_are_problems(tmp_path: Path) -> None:
    items = _items(
        tmp_path,
        [
            "{not json",
            {"image": "a.png", "split": "train", "box": [1, 2, 3, 4]},
            {"image": "a.png", "split": "test", "box": [5, 6, 7, 8]},
            {"box": [1, 2, 3, 4]},
            {"image": "c.png", "frame": "first"},
            "[1, 2]",
        ],
    )
    assert [[p.reason for p in i.problems] for i in items] == [[Reason.BAD_ANNOTATION]] * 5
    assert items[1].split == "train" and len(items[1].regions) == 1
    assert [p.region for i in items for p in i.problems] == [None, 1, None, None, None]


def test_what_is_wrong_with_the_whole_manifest_is_said_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown column 'bbox'; allowed are image, frame, box"):
        _items(tmp_path, [{"image": "a.png", "bbox": [1, 2, 3, 4]}])
    with pytest.raises(ValueError, match="there is no manifest"):
        list(Manifest(path=str(tmp_path / "absent.jsonl")).items())
    with pytest.raises(ValueError, match="there is no manifest"):
        Manifest(path=str(tmp_path / "absent.jsonl")).fingerprint()
    (tmp_path / "list.xlsx").write_bytes(b"")
    with pytest.raises(ValueError, match=r"use \.jsonl"):
        list(Manifest(path=str(tmp_path / "list.xlsx")).items())
    (tmp_path / "list.csv").write_text("picture,box\na.png,\n")
    with pytest.raises(ValueError, match="unknown column 'picture'"):
        list(Manifest(path=str(tmp_path / "list.csv")).items())
    (tmp_path / "list.csv").write_text("box,label\n,\n")
    with pytest.raises(ValueError, match="no column `image`"):
        list(Manifest(path=str(tmp_path / "list.csv")).items())


def test_the_fingerprint_follows_the_content(tmp_path: Path) -> None:
    path = tmp_path / "list.jsonl"
    path.write_text('{"image": "a.png"}')
    before = Manifest(path=str(path)).fingerprint()
    assert before == Manifest(path=str(path)).fingerprint()
    assert before != Manifest(path=str(path), root="/elsewhere").fingerprint()
    path.write_text('{"image": "b.png"}')
    assert before != Manifest(path=str(path)).fingerprint()


def test_labels_that_are_none_of_the_forms() -> None:
    assert labels_of(None, None) == []
    assert labels_of("a;;b ", None) == [Label(name="a", value="present"), Label(name="b", value="present")]
    assert labels_of('[{"name": "a"}]') == [Label(name="a", value="present")]
    assert labels_of("{broken") is None
