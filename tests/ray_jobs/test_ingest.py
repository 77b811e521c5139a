"""Ingest on a real Ray and a real S3 server: good files, dead files, kills, and what must never be written."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pydicom
import pytest
from PIL import Image as PilImage

from meddam_core import storage
from meddam_core.imaging.render import render
from meddam_core.records import Image
from meddam_core.shards import read_shard, shard_facts
from ray_jobs.ingest import run
from ray_jobs.ingest_config import CocoConfig, Config, ManifestConfig, PhantomsConfig, PydicomSamplesConfig
from ray_jobs.report import Config as ReportConfig
from ray_jobs.report import run as report
from tests.ray_jobs.poison import PoisonedConfig, ThrottledConfig

pytestmark = pytest.mark.usefixtures("ray_session")

ROOT = Path(__file__).parents[2]
BUNDLED = Path(pydicom.__file__).parent / "data" / "test_files"


def _png(seed: int, height: int = 60, width: int = 80) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    PilImage.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def _images(out: str) -> list[Image]:
    return [i for o in storage.list_objects(storage.join(out, "shards") + "/") for i in read_shard(o.uri)]


def _rejected(out: str) -> list[dict[str, Any]]:
    files = storage.list_objects(storage.join(out, "rejected") + "/")
    return [r for o in files for r in pq.read_table(io.BytesIO(storage.read_bytes(o.uri))).to_pylist()]


def _everything(out: str) -> dict[str, bytes]:
    return {o.uri.removeprefix(out): storage.read_bytes(o.uri) for o in storage.list_objects(out + "/")}


def test_a_manifest_with_good_and_dead_files_out_of_a_bucket_and_into_it(s3_bucket: str) -> None:
    files = {f"in/{n}.png": _png(n) for n in range(5)} | {
        "in/cut.png": _png(7)[:400],
        "in/text.png": b"hello",
        "in/empty.dcm": b"",
        "in/ct.dcm": (BUNDLED / "CT_small.dcm").read_bytes(),
        "in/plan.dcm": (BUNDLED / "rtplan.dcm").read_bytes(),
        "in/masks/small.png": _png(1, 10, 10),
    }
    for name, data in files.items():
        storage.write_bytes(f"{s3_bucket}/{name}", data)
    lines: list[dict[str, Any]] = [
        {"image": "0.png", "box": [10, 10, 30, 30], "label": "nodule"},
        {"image": "1.png", "box": [100, 100, 130, 130]},
        {"image": "1.png", "box": [5, 5, 30, 30]},
        {"image": "2.png", "mask": "masks/small.png", "box": [5, 5, 30, 30]},
        {"image": "2.png", "mask": [[5, 5, 30, 5, 30, 30]]},
        {"image": "3.png", "box": [5, 5, 5, 30]},
        {"image": "4.png"},
        {"image": "cut.png", "box": [5, 5, 30, 30]},
        {"image": "text.png", "box": [5, 5, 30, 30]},
        {"image": "empty.dcm", "box": [5, 5, 30, 30]},
        {"image": "plan.dcm", "box": [5, 5, 30, 30]},
        {"image": "absent.png", "box": [5, 5, 30, 30]},
        {"image": f"{s3_bucket}-absent/a.png", "box": [5, 5, 30, 30]},
        {"image": "ct.dcm", "box": [40, 4, 79, 49], "split": "test"},
    ]
    manifest = f"{s3_bucket}/in/list.jsonl"
    storage.write_bytes(manifest, "\n".join(json.dumps(line) for line in lines).encode())
    out = f"{s3_bucket}/out"
    summary = run(ManifestConfig(path=manifest, out=out, images_per_shard=4, dataset="films"))

    assert (summary.num_items, summary.num_images, summary.num_regions, summary.num_shards) == (12, 5, 4, 3)
    assert summary.rejected_regions == {"box_outside": 1, "mask_size": 1, "box_empty": 1}
    assert summary.rejected_images == {"no_regions": 1, "corrupt": 3, "not_an_image": 1, "not_found": 2}
    assert summary.exit_code == 0 and summary.modalities == {"CT": 1, "XC": 4}
    images = _images(out)
    assert len({i.image_id for i in images}) == 5 and {i.dataset for i in images} == {"films"}
    ct = next(i for i in images if i.modality == "CT")
    assert ct.split == "test" and ct.recipe == "ct" and ct.stored_bits > 8
    assert render(ct).shape == (128, 128, 3)
    original = np.asarray(PilImage.open(io.BytesIO(files["in/0.png"])))
    assert any(np.array_equal(render(i), original) for i in images)
    reasons = sorted((r["item"], r["region"] is None, r["reason"]) for r in _rejected(out))
    assert len(reasons) == 10
    assert json.loads(storage.read_bytes(f"{out}/dataset.json"))["num_images"] == 5
    assert not storage.list_objects(f"{out}/_work/")


def test_nothing_that_names_a_patient_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MEDDAM_SECRET", "a long random text")
    planted = [
        "DOE^JANE",
        "PID-77-XYZ",
        "ACC-4711",
        "19620131",
        "1.2.826.0.1.999.4242",
        "ST-GIMLI-HOSPITAL",
        "FOLDER-DOE",
    ]
    folder = tmp_path / "FOLDER-DOE"
    folder.mkdir()
    for number in range(3):
        dataset = pydicom.dcmread(BUNDLED / "CT_small.dcm")
        dataset.PatientName, dataset.PatientID, dataset.AccessionNumber, dataset.PatientBirthDate = planted[:4]
        dataset.StudyInstanceUID, dataset.InstitutionName = planted[4], planted[5]
        dataset.save_as(folder / f"{number}.dcm")
    whole = (folder / "2.dcm").read_bytes()
    (folder / "2.dcm").write_bytes(whole[: len(whole) // 2])
    lines: list[dict[str, Any]] = [
        {"image": f"FOLDER-DOE/{n}.dcm", "box": [40, 4, 79, 49], "patient_id": planted[1]} for n in range(3)
    ]
    lines[1]["patient_id"] = None
    lines.append({"image": "FOLDER-DOE/0.dcm", "box": [900, 900, 950, 950]})
    (tmp_path / "list.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    out = str(tmp_path / "out")
    summary = run(ManifestConfig(path=str(tmp_path / "list.jsonl"), out=out))
    assert summary.num_images == 2 and summary.rejected_images == {"corrupt": 1}
    first, second = _images(out)
    assert first.patient_key == second.patient_key is not None  # the manifest's id and the header's are one patient
    assert first.study_key == second.study_key is not None
    page = report(ReportConfig(run=out))
    assert page.num_shown == 2 and page.out == f"{out}/report.html"
    assert b"<td>corrupt</td>" in storage.read_bytes(page.out)
    written = b"".join(data for name, data in _everything(out).items()) + "".join(capfd.readouterr()).encode()
    assert len(written) > 20_000
    for word in planted:
        assert word.encode() not in written, word
    again = run(ManifestConfig(path=str(tmp_path / "list.jsonl"), out=str(tmp_path / "again")))
    assert again.num_images == 2
    assert [i.image_key for i in _images(str(tmp_path / "again"))] == [first.image_key, second.image_key]


def test_without_a_secret_patients_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MEDDAM_SECRET", raising=False)
    keys = []
    for name in ("a", "b"):
        summary = run(PydicomSamplesConfig(out=str(tmp_path / name)))
        assert not summary.patient_keys
        images = _images(str(tmp_path / name))
        assert all(i.patient_key is None and i.study_key is None for i in images)
        keys.append([i.image_key for i in images])
        assert not (tmp_path / name / "_work").exists()  # the salt among it
    assert not set(keys[0]) & set(keys[1])


def test_an_ingest_killed_at_any_moment_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    settings = {"count": 9, "images_per_shard": 3, "size": 512}
    secret = tmp_path / "secret"
    secret.write_text("the same for all")
    run(PhantomsConfig(out=str(tmp_path / "calm"), secret_file=secret, **settings))
    out = tmp_path / "killed"
    command = [sys.executable, "-c", (
        "from ray_jobs.ingest import run; from ray_jobs.ingest_config import PhantomsConfig;"
        f"run(PhantomsConfig(out={str(out)!r}, secret_file={str(secret)!r}, num_cpus=2, **{settings!r}))"
    )]  # fmt: skip
    child = subprocess.Popen(command, cwd=ROOT, start_new_session=True, stderr=subprocess.DEVNULL)
    while child.poll() is None and not list(out.glob("shards/shard-*.parquet")):
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(timeout=0.05)
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    assert not (out / "dataset.json").exists()
    kept = {p.name: p.stat().st_mtime_ns for p in out.glob("shards/shard-*.parquet")}
    assert kept
    summary = run(PhantomsConfig(out=str(out), secret_file=secret, **settings))
    assert summary.num_images == 9
    assert {name: (out / "shards" / name).stat().st_mtime_ns for name in kept} == kept  # not done again
    calm, killed = _everything(str(tmp_path / "calm" / "shards")), _everything(str(out / "shards"))
    assert {Path(n).name: data for n, data in calm.items()} == {Path(n).name: data for n, data in killed.items()}
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*.parquet")}
    assert run(PhantomsConfig(out=str(out), secret_file=secret, **settings)) == summary  # complete: nothing to do
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*.parquet")} == before


def test_a_file_that_kills_its_process_is_left_out_and_the_rest_goes_on(tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    summary = run(PoisonedConfig(out=out, count=10, deadly=(3, 4), images_per_shard=5))
    assert summary.num_images == 8
    assert summary.rejected_images == {"killed_process": 2}
    assert [r["item"] for r in _rejected(out)] == [3, 4]
    ids = [i.image_id for i in _images(out)]
    assert ids == [0, 1, 2, *(1 << 24 | row for row in range(5))]


def test_a_part_that_a_throttled_store_interrupted_is_tried_again(tmp_path: Path) -> None:
    noted = tmp_path / "noted"
    summary = run(ThrottledConfig(out=str(tmp_path / "out"), noted=str(noted), images_per_shard=2))
    assert noted.exists() and (summary.num_images, summary.rejected_images) == (4, {})


def test_what_cannot_work_is_said_before_any_work(tmp_path: Path, s3_bucket: str) -> None:
    out = str(tmp_path / "out")
    (tmp_path / "list.jsonl").write_text('{"image": "a.png", "bbox": [1, 2, 3, 4]}')
    manifest = str(tmp_path / "list.jsonl")
    cases: list[tuple[Config, str]] = [
        (ManifestConfig(path=str(tmp_path / "none.jsonl"), out=out), "there is no manifest"),
        (ManifestConfig(path=manifest, out=out), "unknown column 'bbox'"),
        (ManifestConfig(path=manifest, out=out, recipe="sauce"), "there is no recipe 'sauce'"),
        (ManifestConfig(path=manifest, out=f"{s3_bucket}-absent/x"), "bucket does not exist"),
        (ManifestConfig(path=f"{s3_bucket}-absent/list.jsonl", out=out), "manifest"),
        (ManifestConfig(path=manifest, out=out, secret_file=tmp_path / "none"), "there is no secret file"),
        (CocoConfig(annotations=manifest, images=".", out=out), "not a COCO instances file"),
        (PhantomsConfig(out=out, only=("density=wooden",), count=1), "no lesion is of"),
    ]
    for cfg, message in cases:
        with pytest.raises(ValueError, match=message):
            run(cfg)
        assert not list((tmp_path / "out").glob("shards/*")) and not (tmp_path / "out" / "ingest.json").exists()
    (tmp_path / "list.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="lists no image"):
        run(ManifestConfig(path=manifest, out=out))
    storage.write_bytes(f"{tmp_path}/a.png", _png(0))
    (tmp_path / "list.jsonl").write_text('{"image": "a.png", "box": [1, 2, 30, 40]}')
    assert run(ManifestConfig(path=manifest, out=out)).num_images == 1  # a corrected manifest finds nothing in its way
    with pytest.raises(ValueError, match="holds another ingest"):
        run(ManifestConfig(path=manifest, out=out, seed=1))


def test_a_dataset_of_dead_files_ends_with_another_exit_code(tmp_path: Path) -> None:
    (tmp_path / "list.jsonl").write_text('{"image": "a.png"}\n{"image": "b.png"}')
    summary = run(ManifestConfig(path=str(tmp_path / "list.jsonl"), out=str(tmp_path / "out")))
    assert summary.exit_code == 3 and summary.rejected_images == {"not_found": 2}
    assert shard_facts(str(tmp_path / "out" / "shards" / "shard-000000.parquet")).num_rows == 0
    assert "no image could be read" in summary.lines()[-1]


def test_coco_on_disk(tmp_path: Path) -> None:
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / "a.png").write_bytes(_png(0))
    (tmp_path / "instances.json").write_text(
        json.dumps(
            {
                "images": [{"id": 1, "file_name": "a.png"}],
                "categories": [{"id": 1, "name": "cat"}],
                "annotations": [
                    {"id": 1, "image_id": 1, "category_id": 1, "bbox": [5, 5, 20, 20],
                     "segmentation": [[5, 5, 25, 5, 25, 25]]},
                    {"id": 2, "image_id": 1, "category_id": 1, "bbox": [5, 5, 20, 20], "iscrowd": 1,
                     "segmentation": {"size": [60, 80], "counts": [60, 60, 4680]}},
                ],
            }
        )
    )  # fmt: skip
    cfg = CocoConfig(
        annotations=str(tmp_path / "instances.json"), images=str(tmp_path / "val"), out=str(tmp_path / "out")
    )
    assert run(cfg).num_regions == 2
    (image,) = _images(str(tmp_path / "out"))
    assert image.recipe == "coco" and image.modality == "XC" and image.egress == "deny"
    assert all(r.mask is not None for r in image.regions)
