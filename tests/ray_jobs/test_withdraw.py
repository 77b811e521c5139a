"""`meddam withdraw`: nothing of a patient is left in any place, nothing of another's is lost, and it is on record."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from meddam_core import storage
from meddam_core.imaging.deidentify import keyed_hash
from meddam_core.records import Image
from meddam_core.shards import read_shard, shard_metadata, write_shard
from ray_jobs import report, withdraw
from ray_jobs.audit import audit
from ray_jobs.lease import Lease, LeaseHeld
from ray_jobs.run_directory import RUN, SUMMARY, RunDirectory
from ray_jobs.withdraw import RECORD, Config, run
from tests.ray_jobs.made_shards import make_shards
from tests.ray_jobs.test_report import publish

SECRET, PATIENT = "a long random text", "PID-4711"
KEY = keyed_hash(SECRET.encode(), f"patient:{PATIENT}")


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, RunDirectory, str]:
    """(dataset, its run, an export without patient keys); the patient has every third image."""
    monkeypatch.setenv("MEDDAM_SECRET", SECRET)
    shards = make_shards(str(tmp_path / "set"), 2, 12)
    for o in storage.list_objects(shards + "/"):
        images = list(read_shard(o.uri))
        keyed = [_of(i, KEY if n % 3 == 0 else i.patient_key) for n, i in enumerate(images)]
        write_shard(o.uri, keyed, {"meddam.ingest_fingerprint": "f"})
    storage.write_bytes(f"{shards}/dataset.json", json.dumps({"num_images": 24, "num_regions": 0}).encode())
    directory = RunDirectory(str(tmp_path / "run"))
    publish(directory, shards)
    described = directory.read_json(RUN) or {}
    directory.write_json(described | {"config": {"shards": [shards]}}, RUN)
    summary = {"num_images": 24, "num_regions": 1, "num_captions": 1, "by_status": {}, "by_reason": {}}
    directory.write_json((directory.read_json(SUMMARY) or {}) | summary, SUMMARY)
    export = tmp_path / "export"
    export.mkdir()
    captions = pa.concat_tables([pq.read_table(f) for f in directory.published() or []])
    text = [str(i) for i in captions["region_id"].to_pylist()]
    pq.write_table(pa.table({"region_id": text, "text": captions["text"]}), export / "rows.parquet")
    (export / "set.json").write_text("{}")
    return shards, directory, str(export)


def _of(image: Image, key: str | None) -> Image:
    return Image(**{n: getattr(image, n) for n in Image.__slots__} | {"patient_key": key})


def _rows(place: str) -> list[dict[str, Any]]:
    return [r for o in storage.list_objects(place + "/", ".parquet") for r in pq.read_table(o.uri).to_pylist()]


def test_nothing_of_the_patient_is_left_and_the_rest_is_as_it_was(places: tuple[str, RunDirectory, str]) -> None:
    shards, directory, export = places
    report.run(report.Config(run=directory.uri, num_regions=2))
    before = {i.image_id: i for o in storage.list_objects(shards + "/", ".parquet") for i in read_shard(o.uri)}
    mine = {i for i, image in before.items() if image.patient_key == KEY}
    assert len(mine) == 8
    cfg = Config(places=(shards, directory.uri, export), patient_id=PATIENT)
    dry = run(cfg.model_copy(update={"dry_run": True}))
    assert dry.num_images == 8 and len(_rows(shards)) == 24 and not storage.exists(f"{shards}/{RECORD}")
    done = run(cfg)
    assert done.num_rows == dry.num_rows and all(done.num_rows.values()) and done.deleted_pages
    assert done.not_looked_into == [f"{export}/set.json"]

    kept = {i.image_id: i for o in storage.list_objects(shards + "/", ".parquet") for i in read_shard(o.uri)}
    assert kept == {i: image for i, image in before.items() if i not in mine}
    (first, *_) = storage.list_objects(shards + "/", ".parquet")
    assert (shard_metadata(first.uri) or {})["meddam.ingest_fingerprint"] == "f"
    assert not {r["image_id"] for f in directory.published() or [] for r in pq.read_table(f).to_pylist()} & mine
    assert not {int(r["region_id"]) >> 4 for r in _rows(export)} & mine and _rows(export)
    assert not storage.exists(directory.at("report.html"))
    assert audit(directory).clean, "the run is complete for what is left"
    summary = directory.read_json(SUMMARY) or {}
    assert summary["num_images"] == 16 == json.loads(storage.read_bytes(f"{shards}/dataset.json"))["num_images"]
    assert report.run(report.Config(run=directory.uri, num_regions=2)).num_captions == summary["num_captions"]

    record = json.loads(storage.read_bytes(f"{shards}/{RECORD}"))
    assert [entry["num_rows"] for entry in record] == [8]
    everything = b"".join(storage.read_bytes(o.uri) for p in cfg.places for o in storage.list_objects(p + "/"))
    assert KEY.encode() not in everything and PATIENT.encode() not in everything
    again = run(cfg)
    assert again.num_images == 0 and not any(again.num_rows.values())
    assert len(json.loads(storage.read_bytes(f"{shards}/{RECORD}"))) == 1


def test_what_cannot_be_withdrawn_is_said(
    places: tuple[str, RunDirectory, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards, directory, _ = places
    with pytest.raises(ValueError, match="there is nothing"):
        run(Config(places=(str(tmp_path / "none"),), patient_key=KEY))
    with pytest.raises(ValueError, match="give --patient-id"):
        Config(places=(shards,))
    with Lease(directory.uri), pytest.raises(LeaseHeld):
        run(Config(places=(shards, directory.uri), patient_key=KEY))
    assert len(_rows(shards)) == 24
    monkeypatch.delenv("MEDDAM_SECRET")
    with pytest.raises(ValueError, match="needs the secret"):
        run(Config(places=(shards,), patient_id=PATIENT))


def test_one_that_was_interrupted_is_finished_by_running_it_again(
    places: tuple[str, RunDirectory, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shards, directory, export = places
    cfg = Config(places=(shards, directory.uri, export), patient_id=PATIENT)
    replace = withdraw._replace

    def cut(uri: str, *rest: Any) -> None:
        if uri.startswith(export):
            raise KeyboardInterrupt
        replace(uri, *rest)

    monkeypatch.setattr(withdraw, "_replace", cut)
    before = len(_rows(export))
    with pytest.raises(KeyboardInterrupt):
        run(cfg)
    assert len(_rows(shards)) == 16 and len(_rows(export)) == before, "the export's rows name no patient"
    monkeypatch.setattr(withdraw, "_replace", replace)
    assert run(cfg).num_rows[export] > 0 and len(_rows(export)) < before
    assert audit(directory).clean and not list(Path(shards).glob("_*"))


@pytest.mark.s3
def test_in_a_bucket(places: tuple[str, RunDirectory, str], s3_bucket: str) -> None:
    shards, *_ = places
    for o in storage.list_objects(shards + "/"):
        storage.write_bytes(f"{s3_bucket}/set/{Path(o.uri).relative_to(shards)}", storage.read_bytes(o.uri))
    done = run(Config(places=(f"{s3_bucket}/set",), patient_key=KEY))
    assert done.num_images == 8 and "lifecycle" in done.lines()[-1]
    left = [i for o in storage.list_objects(f"{s3_bucket}/set/", ".parquet") for i in read_shard(o.uri)]
    assert len(left) == 16
