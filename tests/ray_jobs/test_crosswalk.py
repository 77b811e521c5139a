"""`meddam ingest --crosswalk`: the way back from keys to studies, for its owner alone and nowhere near the rows."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import pydicom
import pytest
from pydicom.data import get_testdata_file

from meddam_core import storage
from meddam_core.shards import read_shard
from ray_jobs.ingest import run
from ray_jobs.ingest_config import ManifestConfig

pytestmark = pytest.mark.usefixtures("ray_session")
PATIENTS = ("PID-8841", "PID-8842")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Three DICOM files of two patients: one named by the manifest, the others by their headers."""
    lines = []
    for number in range(3):
        dataset = pydicom.dcmread(get_testdata_file("CT_small.dcm", download=False))
        dataset.PatientID, dataset.StudyInstanceUID = PATIENTS[number // 2], f"1.2.826.0.1.{number}"
        dataset.save_as(tmp_path / f"{number}.dcm")
        lines.append({"image": f"{number}.dcm", "box": [40, 4, 79, 49]})
    lines[0] |= {"patient_id": PATIENTS[0]}
    (tmp_path / "list.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    (tmp_path / "secret").write_text("a long random text")
    return tmp_path


def config(source: Path, out: str, **changed: object) -> ManifestConfig:
    values = {"path": str(source / "list.jsonl"), "out": out, "secret_file": source / "secret"} | changed
    return ManifestConfig(**values)  # type: ignore[arg-type]


def test_every_key_leads_back_and_only_for_the_owner(
    source: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    out, walk = str(tmp_path / "set"), kept / "crosswalk.csv"
    before = os.umask(0)
    try:
        run(config(source, out, crosswalk=walk))
    finally:
        os.umask(before)
    assert walk.stat().st_mode & 0o777 == 0o600
    with walk.open() as stream:
        back = {(r["kind"], r["key"]): r["id"] for r in csv.DictReader(stream)}
    images = [i for o in storage.list_objects(out + "/shards/") for i in read_shard(o.uri)]
    assert [back["patient", i.patient_key] for i in images] == [PATIENTS[0], PATIENTS[0], PATIENTS[1]]  # type: ignore[index]
    assert [back["study", i.study_key] for i in images] == [f"1.2.826.0.1.{n}" for n in range(3)]  # type: ignore[index]
    said = "".join(capfd.readouterr())
    assert "crosswalk: 2 patients, 3 studies\n" in said
    written = said.encode() + b"".join(storage.read_bytes(o.uri) for o in storage.list_objects(out + "/"))
    assert not [word for word in (*PATIENTS, "1.2.826.0.1.", str(walk)) if word.encode() in written]


def test_a_complete_dataset_gets_its_crosswalk_later_and_two_share_one(source: Path, tmp_path: Path) -> None:
    walk = tmp_path / "crosswalk.csv"
    first = run(config(source, str(tmp_path / "set")))
    assert run(config(source, str(tmp_path / "set"), crosswalk=walk)) == first
    before = set(walk.read_text().splitlines())
    dataset = pydicom.dcmread(source / "0.dcm")
    dataset.PatientID = "PID-9000"
    dataset.save_as(source / "0.dcm")
    (source / "list.jsonl").write_text(json.dumps({"image": "0.dcm", "box": [40, 4, 79, 49]}))
    run(config(source, str(tmp_path / "other"), crosswalk=walk))
    after = set(walk.read_text().splitlines())
    assert before < after and [line for line in after - before if line.endswith("PID-9000")]


def test_what_the_source_no_longer_explains_is_counted(
    source: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "set")
    run(config(source, out))
    (source / "2.dcm").unlink()
    run(config(source, out, crosswalk=tmp_path / "crosswalk.csv"))
    assert "1 patients, 2 studies; 2 keys of the shards were not found" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("where", "says"),
    [
        ("s3://lab/crosswalk.csv", "never a bucket"),
        ("{out}/crosswalk.csv", "lies inside"),
        ("{folder}/absent/crosswalk.csv", "is not there"),
        ("{folder}/open.csv", "chmod 600"),
    ],
)
def test_places_that_are_not_safe_are_refused_before_any_work(
    source: Path, tmp_path: Path, where: str, says: str
) -> None:
    (source / "open.csv").write_text("kind,key,id\n")
    (source / "open.csv").chmod(0o644)
    out = str(tmp_path / "set")
    walk = Path(where.format(out=out, folder=source))
    with pytest.raises(ValueError, match=says):
        run(config(source, out, crosswalk=walk))
    assert not Path(out).exists()
    if says == "never a bucket":
        with pytest.raises(ValueError, match="needs the secret"):
            run(config(source, out, crosswalk=source / "new.csv", secret_file=None))
