"""Filters say why, the best sample is kept, licences stop what they forbid, and exports hold what went in."""

from __future__ import annotations

import json
import shutil
import subprocess
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from meddam_core.curation.best import best_of, with_agreement, yield_curve
from meddam_core.curation.candidate import Candidate, agreements
from meddam_core.curation.exporters import FORMATS, Card, Item
from meddam_core.curation.filters import Drop, Rules, filters_of, passing
from meddam_core.curation.licences import Export, check_export, terms_of
from meddam_core.records import Caption, Label, Status
from meddam_core.regions.masks import rle_of

TEXT = "A small solid round nodule lies in the left lung."


def caption(number: int = 0, text: str = TEXT, **changed: object) -> Caption:
    mask_HW = np.zeros((64, 80), np.uint8)
    mask_HW[10:30, 20:50] = 1
    made = Caption(
        region_id=number, prompt_id="meddam-v1", sample=0, text=text, num_tokens=12, mean_logprob=-0.2,
        finish_reason="stop", status=Status.OK, reason=None, detail=None, image_id=number >> 4,
        image_key=f"k{number >> 4}",
        patient_key="p", study_key=None, dataset="made", split="train", recipe="generic-mask", modality="CT", width=80,
        height=64, pixel_spacing_mm=[0.5, 0.5], box=(20, 10, 50, 30), mask=rle_of(mask_HW), source="annotation",
        confidence=None, labels=[Label(name="finding", value="nodule")], licence="CC0-1.0", egress="open", attempt=1,
        model="meddam-tiny", engine="torch", kernels="torch",
    )  # fmt: skip
    return replace(made, **changed)  # type: ignore[arg-type]


def candidate(number: int = 0, text: str = TEXT, **changed: object) -> Candidate:
    fields = {k: changed.pop(k) for k in ("right", "asked", "agreement") if k in changed}
    return Candidate(caption=caption(number, text, **changed), run="r", **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("rules", "bad", "name"),
    [
        (Rules(), candidate(status=Status.TRUNCATED), "status"),
        (Rules(), candidate(text="nodule"), "length"),
        (Rules(), candidate(text="the lung the lung the lung the lung the lung"), "repetition"),
        (Rules(), candidate(text="There is possibly a nodule here."), "hedging"),
        (Rules(min_logprob=-0.1), candidate(), "confidence"),
        (Rules(min_logprob=-0.1), candidate(mean_logprob=None), "confidence"),
        (Rules(min_agreement=0.9), candidate(agreement=0.5), "agreement"),
        (Rules(min_verdicts=0.8), candidate(right=1, asked=2), "verdicts"),
    ],
)
def test_each_filter_says_why(rules: Rules, bad: Candidate, name: str) -> None:
    dropped: list[Drop] = []
    kept = list(passing([bad], filters_of(rules), dropped.append))
    assert kept == [] and [d.filter for d in dropped] == [name]
    assert len(dropped[0].why) > 10
    assert list(passing([candidate()], filters_of(Rules()), dropped.append)) == [candidate()]


def test_counting_filters_keep_the_first() -> None:
    rows = [candidate(16 * i, f"{TEXT} Number {i}.") for i in range(6)]
    kept = list(passing(rows, filters_of(Rules(max_per_patient=2)), lambda d: None))
    assert kept == rows[:2]
    same = [candidate(16 * i) for i in range(4)]
    assert len(list(passing(same, filters_of(Rules(max_same_text=3)), lambda d: None))) == 3
    mixed = [candidate(i, labels=[Label(name="finding", value="mass" if i == 29 else "nodule")]) for i in range(30)]
    balanced = list(passing(mixed, filters_of(Rules(balance=("finding",), balance_ratio=2.0)), lambda d: None))
    assert len(balanced) == 9 and balanced[-1].caption.labels[0].value == "mass"


def test_samples_that_agree_win() -> None:
    texts = [TEXT, TEXT.replace("left", "right"), TEXT]
    assert agreements(texts)[0] == pytest.approx(agreements(texts)[2])
    samples = with_agreement([candidate(0, t, sample=i) for i, t in enumerate(texts)])
    assert best_of(samples).caption.text == TEXT
    judged = [replace(samples[1], right=3, asked=3), replace(samples[0], right=1, asked=3)]
    assert best_of(judged).caption.text == texts[1]
    assert agreements(["alone"]) == [None]


def test_the_yield_curve_falls_where_confidence_tells_right_from_wrong() -> None:
    points = yield_curve([(-0.1 * i, int(i < 5), 1) for i in range(10)], num_points=10)
    assert [p.kept for p in points] == list(range(1, 11))
    assert points[4].right == 1.0 and points[9].right == 0.5
    assert yield_curve([]) == []


def test_licences() -> None:
    assert terms_of("CC BY-NC-SA 4.0").share_alike and not terms_of("CC-BY-NC-SA-4.0").commercial
    assert terms_of("CC0-1.0").redistribute and not terms_of("PhysioNet Credentialed 1.5.0").redistribute
    open_export = Export(pixels=True, audience="public", purpose="commercial")
    assert check_export(["CC0-1.0"], ["Apache-2.0"], ["open"], open_export)
    for images, weights, egress, why in (
        (["CC-BY-NC-4.0"], ["Apache-2.0"], ["open"], "no commercial use"),
        (["CC0-1.0"], ["NVIDIA-noncommercial"], ["open"], "the weights are under NVIDIA"),
        (["PhysioNet Credentialed"], ["Apache-2.0"], ["open"], "forbids passing pictures on"),
        (["unknown"], ["Apache-2.0"], ["open"], "may forbid"),
        (["CC0-1.0"], ["Apache-2.0"], ["deny"], "egress policy is deny"),
    ):
        with pytest.raises(ValueError, match=why):
            check_export(images, weights, egress, open_export)
    assert check_export(["PhysioNet Credentialed"], ["NVIDIA-noncommercial"], ["deny"], Export(pixels=False))


CARD = Card(name="made", licences={"images": ["CC0-1.0"], "weights": ["Apache-2.0"]}, conditions=["Be kind."])


def items() -> list[Item]:
    picture_HWC = np.random.default_rng(0).integers(0, 255, (64, 80, 3)).astype(np.uint8)
    return [
        Item(captions=[caption(16 * i), caption(16 * i + 1, f"{TEXT} Two.")], picture_HWC=picture_HWC) for i in range(2)
    ]


def test_the_hugging_face_dataset_loads(tmp_path: Path) -> None:
    import datasets

    assert FORMATS["hf"](items(), tmp_path, CARD) == 4
    found = datasets.load_dataset(
        "parquet", data_files=str(tmp_path / "data" / "*.parquet"), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert found[0]["image"].size == (80, 64) and found[1]["caption"] == f"{TEXT} Two."
    assert found[0]["labels"][0]["value"] == "nodule"
    assert "Be kind." in (tmp_path / "README.md").read_text()
    assert json.loads((tmp_path / "croissant.json").read_text())["recordSet"][0]["name"] == "captions"


def test_json_and_tar_formats(tmp_path: Path) -> None:
    for name in ("llava", "webdataset", "coco", "dlc-bench"):
        (tmp_path / name).mkdir()
        num = FORMATS[name](items(), tmp_path / name, CARD)
        assert num == 4
    conversation = json.loads((tmp_path / "llava" / "llava.json").read_text())[0]
    assert conversation["conversations"][0]["value"].startswith("<image>")
    assert (tmp_path / "llava" / conversation["image"]).is_file()
    with tarfile.open(tmp_path / "webdataset" / "captions-000000.tar") as tar:
        assert tar.getnames()[:3] == ["000000000.png", "000000000.txt", "000000000.json"]
    from pycocotools.coco import COCO

    coco = COCO(str(tmp_path / "coco" / "captions.json"))
    annotation = coco.loadAnns(coco.getAnnIds())[0]
    assert annotation["caption"] == TEXT and int(coco.annToMask(annotation).sum()) == 20 * 30
    predictions = json.loads((tmp_path / "dlc-bench" / "predictions.json").read_text())
    assert predictions["1"] == TEXT and "query" in predictions
    assert json.loads((tmp_path / "dlc-bench" / "class_names.json").read_text())["1"] == "nodule"


@pytest.fixture
def dicom_folder(tmp_path: Path) -> Path:
    """One image with two regions, as DICOM files."""
    pytest.importorskip("highdicom")
    assert FORMATS["dicom"](items()[:1], tmp_path, CARD) == 2
    return next(p for p in tmp_path.iterdir() if p.is_dir())


def test_dicom_reports_read_back(dicom_folder: Path) -> None:
    import highdicom
    import pydicom

    folder, image = dicom_folder, pydicom.dcmread(dicom_folder / "image.dcm")
    report = highdicom.sr.srread(folder / "report.sr.dcm")
    groups = report.content.get_planar_roi_measurement_groups()
    comments = [c.TextValue for g in groups for c in g[0].ContentSequence if c.ValueType == "TEXT"]
    assert len(groups) == 2 and TEXT in comments
    assert {g.finding_type.meaning for g in groups} == {"Lesion"}
    segmentation = highdicom.seg.segread(folder / "regions.seg.dcm")
    assert segmentation.number_of_segments == 2 and int(segmentation.pixel_array.sum()) == 2 * 20 * 30
    for number, group in enumerate(groups, start=1):
        frame = group.referenced_segmentation_frame
        assert frame[0].referenced_sop_instance_uid == segmentation.SOPInstanceUID
        assert frame[0].referenced_frame_numbers == [number]
        assert frame[1].referenced_sop_instance_uid == image.SOPInstanceUID
    studies = {d.StudyInstanceUID for d in (image, segmentation, report)}
    named = {i.ReferencedSOPInstanceUID for s in report.CurrentRequestedProcedureEvidenceSequence
             for series in s.ReferencedSeriesSequence for i in series.ReferencedSOPSequence}  # fmt: skip
    assert len(studies) == 1 and named == {image.SOPInstanceUID, segmentation.SOPInstanceUID}


@pytest.mark.skipif(shutil.which("dsrdump") is None, reason="dcmtk is not installed")
def test_dcmtk_reads_the_report(dicom_folder: Path) -> None:
    report = _said("dsrdump", "--print-long-values", "--unknown-relationship", dicom_folder / "report.sr.dcm")
    assert f'(,,"Comment")="{TEXT}"' in report and report.count('"Referenced Segmentation Frame")=(SG image,,') == 2
    assert not [line for line in report.splitlines() if line.startswith(("W:", "E:", "F:"))]
    assert "SegmentationStorage" in _said("dcmdump", dicom_folder / "regions.seg.dcm")


@pytest.mark.skipif(shutil.which("dciodvfy") is None, reason="dicom3tools is not installed")
@pytest.mark.parametrize("name", ["image", "regions.seg", "report.sr"])
def test_files_keep_the_standard(dicom_folder: Path, name: str) -> None:
    said = _said("dciodvfy", dicom_folder / f"{name}.dcm")
    assert not [line for line in said.splitlines() if line.startswith("Error")], said


def _said(*command: object) -> str:
    ended = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False, timeout=60)
    assert ended.returncode == 0, ended.stderr
    return ended.stderr + ended.stdout
