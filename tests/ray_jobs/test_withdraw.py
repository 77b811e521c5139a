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
from meddam_core.records import Image, image_id
from meddam_core.shards import read_shard, shard_metadata, write_shard
from ray_jobs import report, withdraw
from ray_jobs.audit import audit
from ray_jobs.fingerprint import inputs_digest
from ray_jobs.lease import Lease, LeaseHeld
from ray_jobs.run_directory import INPUTS, MANIFEST, RUN, SUMMARY, RunDirectory
from ray_jobs.snapshot import changed, snapshot
from ray_jobs.withdraw import BEGUN, RECORD, Config, run
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


@pytest.mark.parametrize("at", ["rows.parquet", "report.html", RECORD, INPUTS, BEGUN])
def test_one_that_was_interrupted_is_finished_by_running_it_again(
    places: tuple[str, RunDirectory, str], monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    """Before a table, a page, the record, the counts, and before the last note of it was deleted."""
    shards, directory, export = places
    report.run(report.Config(run=directory.uri, num_regions=2))
    cfg = Config(places=(shards, directory.uri, export), patient_id=PATIENT)
    planned = run(cfg.model_copy(update={"dry_run": True}))
    with monkeypatch.context() as patch:
        for name in ("write_bytes", "delete"):
            patch.setattr(storage, name, _cut(getattr(storage, name), at))
        patch.setattr(withdraw, "take_out", _cut(withdraw.take_out, at))
        with pytest.raises(KeyboardInterrupt):
            run(cfg)
    if at == "rows.parquet":
        assert len(_rows(shards)) == 16 and len(_rows(export)) > 20, "the export's rows name no patient"
    done = run(cfg)
    assert done.num_rows == planned.num_rows, "what was taken out in all"
    assert audit(directory).clean and not list(Path(shards).glob("_*"))
    assert not {int(r["region_id"]) >> 4 for r in _rows(export)} & _mine()
    assert not storage.exists(directory.at("report.html"))
    for place in cfg.places:
        (entry,) = json.loads(storage.read_bytes(f"{place}/{RECORD}"))
        assert entry["num_rows"] == planned.num_rows[place]


def _cut(call: Any, at: str) -> Any:
    """`call`, which ends with Ctrl-C instead where it comes to a name with `at` in it; deletes count, not the puts."""

    def cut(uri: str, *rest: Any) -> Any:
        if at in uri and not (at == BEGUN and rest):
            raise KeyboardInterrupt
        return call(uri, *rest)

    return cut


def _mine() -> set[int]:
    """The image ids of the patient, who has every third one of two shards of twelve."""
    return {image_id(shard, row) for shard in range(2) for row in range(0, 12, 3)}


def test_a_withdrawal_of_another_patient_is_finished_first(places: tuple[str, RunDirectory, str]) -> None:
    shards, *_ = places
    storage.write_bytes(f"{shards}/{BEGUN}", json.dumps({"patient": "0" * 64, "at": "2026-01-01"}).encode())
    with pytest.raises(ValueError, match="another patient was interrupted"):
        run(Config(places=(shards,), patient_key=KEY))
    assert len(_rows(shards)) == 24


def test_other_datasets_number_their_images_alike_and_keep_them(
    places: tuple[str, RunDirectory, str], tmp_path: Path
) -> None:
    shards, directory, export = places
    other = make_shards(str(tmp_path / "other"), 2, 12, seed=1)
    (shard, _) = storage.list_objects(other + "/", ".parquet")
    write_shard(shard.uri, [_of(i, None) for i in read_shard(shard.uri)])
    with pytest.raises(ValueError, match=r"rows.parquet name no patient, and .*other/shards"):
        run(Config(places=(shards, directory.uri, other, export), patient_key=KEY))
    assert len(_rows(shards)) == 24, "nothing was changed"
    done = run(Config(places=(shards, directory.uri, other), patient_key=KEY))
    assert done.num_images == 8 and done.num_rows[other] == 0
    assert len(_rows(other)) == 24 and len(_rows(shards)) == 16


def test_somebody_at_work_below_a_place_is_not_disturbed(places: tuple[str, RunDirectory, str], tmp_path: Path) -> None:
    shards, directory, _ = places
    judging = directory.at("judging", "one")
    storage.write_bytes(f"{judging}/judge.json", b"{}")
    for at_work in (judging, directory.uri):
        with Lease(at_work), pytest.raises(LeaseHeld):
            run(Config(places=(str(tmp_path),), patient_key=KEY))
    assert len(_rows(shards)) == 24
    assert run(Config(places=(str(tmp_path), shards), patient_key=KEY)).num_rows.keys() == {str(tmp_path)}
    assert len(_rows(shards)) == 16 and audit(directory).clean, "a run below a place is counted again too"


def test_verdict_files_are_made_again_because_their_captions_moved(places: tuple[str, RunDirectory, str]) -> None:
    shards, directory, _ = places
    judging = directory.at("judging", "one")
    verdicts = f"{judging}/verdicts/set=run/captions-000001/rows-00000000.parquet"
    storage.write_bytes(f"{judging}/judge.json", b"{}")
    storage.write_bytes(f"{judging}/{SUMMARY}", b"{}")
    Path(verdicts).parent.mkdir(parents=True)
    pq.write_table(pa.table({"region_id": [5], "image_id": [0], "dataset": ["none"]}), verdicts)
    done = run(Config(places=(shards, directory.uri), patient_key=KEY))
    assert done.judge_again == [judging] and any("judged again" in line for line in done.lines())
    assert not storage.exists(verdicts) and not storage.exists(f"{judging}/{SUMMARY}")
    assert storage.exists(f"{judging}/judge.json")


@pytest.mark.parametrize("published", [True, False])
def test_the_run_can_go_on_afterwards(places: tuple[str, RunDirectory, str], published: bool) -> None:
    """Its snapshot and fingerprint are those of the shards as they are now; shards that came later are not taken in."""
    shards, directory, _ = places
    if not published:
        storage.delete(directory.at(SUMMARY))
    make_shards(f"{shards}/later", 3, 2)
    Path(f"{shards}/later/shards/shard-000002.parquet").rename(f"{shards}/shards/shard-000002.parquet")
    run(Config(places=(shards, directory.uri), patient_key=KEY))
    inputs = directory.inputs()
    assert changed(inputs, snapshot([shards])) == [f"{shards}/shards/shard-000002.parquet is new"]
    assert (directory.read_json(RUN) or {})["fingerprint"]["inputs"] == inputs_digest(inputs)
    assert [s.num_images for s in inputs] == [8, 8]
    if published:
        said = [f["num_rows"] for f in (directory.read_json("captions", "gen=1", MANIFEST) or {})["files"]]
        assert said == [pq.read_metadata(f).num_rows for f in directory.published() or []]


def test_a_patient_who_has_every_image_leaves_an_empty_run(places: tuple[str, RunDirectory, str]) -> None:
    shards, directory, export = places
    for o in storage.list_objects(shards + "/", ".parquet"):
        write_shard(o.uri, [_of(i, KEY) for i in read_shard(o.uri)])
    for captions in directory.published() or []:
        table = pq.read_table(captions)
        at, field = table.schema.get_field_index("patient_key"), table.schema.field("patient_key")
        pq.write_table(table.set_column(at, field, pa.array([KEY] * len(table), field.type)), captions)
    run(Config(places=(shards, directory.uri, export), patient_key=KEY))
    assert _rows(shards) == _rows(export) == [] and directory.inputs() == []
    assert json.loads(storage.read_bytes(f"{shards}/dataset.json"))["num_images"] == 0
    assert audit(directory).clean and (directory.read_json(SUMMARY) or {})["num_captions"] == 0


def test_what_would_bring_the_patient_back_is_refused(places: tuple[str, RunDirectory, str]) -> None:
    shards, directory, _ = places
    with pytest.raises(ValueError, match="give its dataset too"):
        run(Config(places=(directory.uri,), patient_key=KEY))
    storage.delete(f"{shards}/dataset.json")
    storage.write_bytes(f"{shards}/ingest.json", b"{}")
    with pytest.raises(ValueError, match="is not finished"):
        run(Config(places=(shards, directory.uri), patient_key=KEY))
    assert len(_rows(shards)) == 24


@pytest.mark.s3
def test_in_a_bucket(places: tuple[str, RunDirectory, str], s3_bucket: str) -> None:
    shards, *_ = places
    for o in storage.list_objects(shards + "/"):
        storage.write_bytes(f"{s3_bucket}/set/{Path(o.uri).relative_to(shards)}", storage.read_bytes(o.uri))
    done = run(Config(places=(f"{s3_bucket}/set",), patient_key=KEY))
    assert done.num_images == 8 and "lifecycle" in done.lines()[-1]
    left = [i for o in storage.list_objects(f"{s3_bucket}/set/", ".parquet") for i in read_shard(o.uri)]
    assert len(left) == 16
