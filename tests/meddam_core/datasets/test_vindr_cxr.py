"""VinDr-CXR in both of its layouts: votes, fused and raw boxes, the tables' traps, and that readers stay unknown."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as PilImage

from meddam_core.datasets.base import SourceItem
from meddam_core.datasets.rows import RowRules, rows_of
from meddam_core.datasets.vindr_cxr import VindrCxr
from meddam_core.datasets.vindr_findings import GLOBAL, LOCAL, classes, finding, verdict
from meddam_core.imaging.png import decode_png
from meddam_core.records import Image, Label, Reason, Region
from tests.meddam_core.datasets.made_vindr import TRAIN, make_kaggle, make_physionet

RULES = RowRules(dataset="vindr-cxr", licence="x", egress="deny", image_secret=b"i", patient_secret=b"p")


@pytest.fixture(scope="module")
def physionet(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_physionet(str(tmp_path_factory.mktemp("physionet") / "1.0.0"))


@pytest.fixture(scope="module")
def kaggle(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_kaggle(str(tmp_path_factory.mktemp("kaggle") / "vinbigdata"))


def _item(source: VindrCxr, number: int = 0) -> SourceItem:
    return list(source.items())[number]


def _row(source: VindrCxr, number: int = 0, recipe: str = "vindr-cxr-all") -> Image:
    rules = dataclasses.replace(RULES, recipe=recipe)
    images, _ = rows_of(source, _item(source, number), ordinal=0, rules=rules, shard=0, first_row=0)
    return images[0]


def _values(labels: list[Label]) -> dict[str, tuple[str, float | None]]:
    return {label.name: (label.value, None if label.trust is None else round(label.trust, 3)) for label in labels}


def _of(row: Image, name: str) -> Region:
    (found,) = (r for r in row.regions if _values(r.labels)["finding"][0] == name)
    return found


def test_votes_decide_present_absent_and_undecided(physionet: str) -> None:
    row = _row(VindrCxr(path=physionet))
    effusion = _of(row, "Pleural effusion")
    assert effusion.box == (62, 300, 160, 382) and effusion.confidence == 1.0 and effusion.source == "consensus"
    values = _values(effusion.labels)
    assert values["finding"] == ("Pleural effusion", 1.0)
    assert values["Pleural effusion"] == ("present", 1.0)
    assert values["Pneumothorax"] == ("absent", 1.0), "no reader saw one anywhere"
    assert values["Lung Opacity"] == ("undecided", 0.333), "one reader saw one here"
    assert "Nodule/Mass" not in values and "Cardiomegaly" not in values, "those are elsewhere on the film"
    nodule = _values(_of(row, "Nodule/Mass").labels)
    assert nodule["Nodule/Mass"] == ("undecided", 0.333)
    assert {name for name, (value, _) in nodule.items() if value == "absent"} == set(LOCAL) - {
        "Pleural effusion", "Nodule/Mass", "Cardiomegaly", "Lung Opacity", "Rib fracture",
    }  # fmt: skip


def test_there_is_one_heart(physionet: str) -> None:
    heart = _of(_row(VindrCxr(path=physionet)), "Cardiomegaly")
    assert heart.box == (220, 265, 360, 385), "the mean of two boxes that overlap by less than the threshold"
    assert _values(heart.labels)["Cardiomegaly"] == ("present", 0.667)
    assert not {"side", "zone"} & set(_values(heart.labels))


def test_labels_of_the_image_are_votes_too(physionet: str) -> None:
    values = _values(_row(VindrCxr(path=physionet)).labels)
    assert set(values) == {*LOCAL, *GLOBAL}
    assert values["Pneumonia"] == ("present", 0.667)
    assert values["Other disease"] == ("undecided", 0.333), "the training table writes `Other diseases`"
    assert values["No finding"] == ("absent", 1.0)


def test_the_test_split_is_a_consensus_without_readers(physionet: str) -> None:
    row = _row(VindrCxr(path=physionet), 3)
    assert row.split == "test" and {r.source for r in row.regions} == {"consensus"}
    assert _values(_of(row, "Edema").labels)["Edema"] == ("present", 1.0)
    assert _values(_of(row, "ILD").labels)["Nodule/Mass"] == ("absent", 1.0)
    assert _values(row.labels)["Other disease"] == ("present", 1.0), "the test table writes `Other disease`"


def test_raw_boxes_are_each_readers_own_with_the_votes_of_their_place(physionet: str) -> None:
    row = _row(VindrCxr(path=physionet, boxes="raw"))
    effusions = [r for r in row.regions if _values(r.labels)["finding"][0] == "Pleural effusion"]
    assert [r.box for r in effusions] == [(60, 300, 160, 380), (62, 304, 156, 382), (64, 296, 164, 384)]
    assert {r.source for r in effusions} == {"annotation"}
    assert {_values(r.labels)["Pleural effusion"] for r in effusions} == {("present", 1.0)}


def test_a_minimum_of_votes_keeps_what_readers_agree_on(physionet: str) -> None:
    row = _row(VindrCxr(path=physionet, min_votes=2))
    assert {_values(r.labels)["finding"][0] for r in row.regions} == {"Pleural effusion", "Cardiomegaly"}
    assert len(_row(VindrCxr(path=physionet, min_votes=2), 3).regions) == 2, "a consensus always counts"


def test_normal_films_are_counted_as_left_out_or_become_rows(physionet: str) -> None:
    assert [p.reason for p in _item(VindrCxr(path=physionet), 1).problems] == [Reason.NO_REGIONS]
    row = _row(VindrCxr(path=physionet, normals=True), 1)
    assert row.regions == [] and _values(row.labels)["No finding"] == ("present", 1.0)


def test_a_box_of_another_scale_is_rejected_and_the_others_stay(physionet: str) -> None:
    source = VindrCxr(path=physionet)
    images, rejected = rows_of(source, _item(source, 2), ordinal=0, rules=RULES, shard=0, first_row=0)
    assert [r.reason for r in rejected] == [Reason.BOX_OUTSIDE]
    assert [_values(r.labels)["finding"][0] for r in images[0].regions] == ["Consolidation"]


def test_side_and_zone_need_an_orientation(physionet: str) -> None:
    effusion = _values(_of(_row(VindrCxr(path=physionet)), "Pleural effusion").labels)
    assert effusion["side"][0] == "right", "the picture's left is the patient's right"
    assert effusion["zone"][0] == "lower"
    nodule = _values(_of(_row(VindrCxr(path=physionet)), "Nodule/Mass").labels)
    assert (nodule["side"][0], nodule["zone"][0]) == ("left", "upper")
    unknown = _values(_row(VindrCxr(path=physionet), 2).regions[0].labels)
    assert not {"side", "zone"} & set(unknown)
    usual = _values(_row(VindrCxr(path=physionet, orientation="usual"), 2).regions[0].labels)
    assert (usual["side"][0], usual["zone"][0]) == ("left", "lower")


def test_kaggle_has_the_same_regions_in_fourteen_classes(physionet: str, kaggle: str) -> None:
    ours, theirs = _row(VindrCxr(path=physionet, num_classes=14)), _row(VindrCxr(path=kaggle, num_classes=14))
    assert [r.box for r in ours.regions] == [r.box for r in theirs.regions]
    assert [_values(r.labels) for r in ours.regions] == [_values(r.labels) for r in theirs.regions]
    assert {_values(r.labels)["finding"][0] for r in ours.regions} <= set(classes(14))
    assert _values(_of(ours, "Other lesion").labels)["Other lesion"] == ("undecided", 0.333)
    assert "Pneumonia" not in _values(theirs.labels), "Kaggle's table knows no diseases"


def test_readers_never_leave_the_adapter(physionet: str, kaggle: str) -> None:
    for source in (VindrCxr(path=physionet, boxes="raw", normals=True), VindrCxr(path=kaggle, num_classes=14)):
        text = json.dumps([dataclasses.asdict(item) for item in source.items()])
        assert not any(f'"{reader}"' in text for reader in ("R8", "R9", "R10"))


def test_an_inverted_film_keeps_bone_brighter_than_air(physionet: str) -> None:
    row = _row(VindrCxr(path=physionet))
    assert row.photometric == "MONOCHROME1"
    preview = np.asarray(PilImage.open(io.BytesIO(row.preview.bytes or b"")).convert("L"))
    assert preview[2:20, 2:20].mean() < preview[preview.shape[0] // 2, preview.shape[1] // 2]


def test_films_as_png_of_the_original_size_or_not_at_all(physionet: str, tmp_path: Path) -> None:
    pixels = decode_png(_row(VindrCxr(path=physionet)).image.bytes or b"")
    for name, size in (("same", (512, 512)), ("small", (256, 256))):
        folder = tmp_path / name / "train"
        folder.mkdir(parents=True)
        PilImage.fromarray((pixels >> 4).astype(np.uint8)).resize(size).save(folder / f"{TRAIN[0].image_id}.png")
    row = _row(VindrCxr(path=physionet, images=str(tmp_path / "same"), split="train"))
    assert row.modality == "DX" and len(row.regions) == 5 and row.egress == "deny"
    source = VindrCxr(path=physionet, images=str(tmp_path / "small"), split="train")
    images, rejected = rows_of(source, _item(source), ordinal=0, rules=RULES, shard=0, first_row=0)
    assert images == [] and [r.reason for r in rejected] == [Reason.BOX_OUTSIDE]


def test_a_film_that_is_not_there_is_a_reason(physionet: str, tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    items = list(VindrCxr(path=physionet, images=str(tmp_path), split="train").items())
    assert [[p.reason for p in item.problems] for item in items] == [[Reason.NOT_FOUND]] * 3


def test_broken_lines_are_problems_and_wrong_tables_errors(physionet: str, tmp_path: Path) -> None:
    header = "image_id,rad_id,class_name,x_min,y_min,x_max,y_max"
    lines = [
        "a,R1,Edema,1,2,x,4",
        "a,R1,Sauce,1,2,3,4",
        "a,R1,Pneumonia,1,2,3,4",
        "a,R1,Edema,nan,2,3,4",
        "a,R1,Edema,5,2,3,4",
    ]
    (tmp_path / "annotations_train.csv").write_text("\n".join([header, *lines]))
    (tmp_path / "a.dicom").write_bytes(Path(physionet, "train", f"{TRAIN[0].image_id}.dicom").read_bytes())
    (item,) = VindrCxr(path=str(tmp_path)).items()
    assert [p.reason for p in item.problems] == [Reason.BAD_ANNOTATION] * 5
    (tmp_path / "annotations_train.csv").write_text("image,label\na,b\n")
    with pytest.raises(ValueError, match="no column 'image_id'"):
        list(VindrCxr(path=str(tmp_path)).items())
    with pytest.raises(ValueError, match="holds no tables of VinDr-CXR"):
        list(VindrCxr(path=str(tmp_path / "absent")).items())


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ((0, 3), ("absent", 1.0)), ((1, 3), ("undecided", 1 / 3)), ((2, 3), ("present", 2 / 3)),
        ((3, 3), ("present", 1.0)), ((0, 1), ("undecided", 1.0)), ((1, 1), ("undecided", 1.0)),
        ((1, 1, True), ("present", 1.0)), ((0, 1, True), ("absent", 1.0)),
    ],
)  # fmt: skip
def test_the_verdict_of_votes(given: Any, expected: tuple[str, float]) -> None:
    assert verdict(*given) == expected


def test_every_spelling_of_the_tables_is_known() -> None:
    assert len(LOCAL) == 22 and len(classes(14)) == 14
    spellings = ("Other diseases", "Other disease", "Lung opacity", "Nodule/Mass", "no finding", "x")
    known = ["Other disease", "Other disease", "Lung Opacity", "Nodule/Mass", "No finding", None]
    assert [finding(text) for text in spellings] == known
