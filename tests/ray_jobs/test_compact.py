"""`meddam compact` and `meddam migrate`: other files, the same rows and ids; what refers to them stays valid."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pyarrow.parquet as pq
import pytest

from meddam_core import storage
from meddam_core.records import SCHEMA_VERSION, Caption, Image, arrow_schema
from meddam_core.shards import images_by_id, read_shard
from ray_jobs import compact, migrate, report
from ray_jobs.audit import audit
from ray_jobs.judge_plan import Slice, read_slice
from ray_jobs.lease import Lease, LeaseHeld
from ray_jobs.publish import grouped, write_captions
from ray_jobs.run_directory import MANIFEST, SUMMARY, RunDirectory
from ray_jobs.snapshot import changed, snapshot
from tests.meddam_core.test_migrations import age
from tests.ray_jobs.made_shards import make_shards
from tests.ray_jobs.test_report import publish


@pytest.fixture(params=["disk", pytest.param("s3", marks=pytest.mark.s3)])
def made(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, RunDirectory]:
    """(dataset, a published run on it with a caption file a shard)."""
    shards = make_shards(str(tmp_path / "set"), 4, 12)
    (tmp_path / "set/dataset.json").write_text(json.dumps({"schema_version": 1, "num_shards": 4, "dataset": "made"}))
    directory = RunDirectory(str(tmp_path / "run"))
    publish(directory, shards)
    if request.param == "s3":
        bucket = request.getfixturevalue("s3_bucket")
        for place in ("set", "run"):
            for o in storage.list_objects(str(tmp_path / place) + "/"):
                storage.write_bytes(f"{bucket}/{Path(o.uri).relative_to(tmp_path)}", storage.read_bytes(o.uri))
        shards, directory = f"{bucket}/set", RunDirectory(f"{bucket}/run")
        directory.write_inputs(snapshot([shards]))
    return shards, directory


def rows(directory: RunDirectory) -> list[dict[str, object]]:
    paths = [storage.open_uri(uri)[1] for uri in directory.published() or []]
    return [row for p in paths for row in pq.read_table(p, filesystem=directory.filesystem).to_pylist()]


def images(place: str) -> list[Image]:
    return [i for o in storage.list_objects(place + "/shards/", ".parquet") for i in read_shard(o.uri)]


def test_a_run_gets_fewer_files_with_the_same_captions(made: tuple[str, RunDirectory]) -> None:
    _, directory = made
    before, old = rows(directory), directory.published()
    found = compact.run(compact.Config(place=directory.uri))
    assert (found.num_files_before, found.num_files, found.generation) == (4, 1, 2)
    assert rows(directory) == before and audit(directory).clean
    assert all(storage.exists(uri) for uri in old or []), "the generation before stays"
    manifest = directory.read_json("captions", "gen=2", MANIFEST) or {}
    assert manifest["schema_version"] == SCHEMA_VERSION and manifest["files"][0]["num_rows"] == len(before)
    assert (directory.read_json(SUMMARY) or {})["generation"] == 2
    assert report.run(report.Config(run=directory.uri, num_regions=4)).num_captions == len(before)
    with Lease(directory.uri), pytest.raises(LeaseHeld):
        compact.run(compact.Config(place=directory.uri))


def test_shards_are_merged_into_another_place_with_their_ids(made: tuple[str, RunDirectory], tmp_path: Path) -> None:
    shards, directory = made
    inputs, out = directory.inputs(), str(tmp_path / "large")
    found = compact.run(compact.Config(place=shards, out=out))
    assert (found.num_files_before, found.num_files, found.num_rows) == (4, 1, 48)
    assert images(out) == images(shards)
    (merged,) = snapshot([out])
    assert (merged.first_id, merged.last_id) == (inputs[0].first_id, inputs[-1].last_id)
    some = images(shards)[30]
    assert list(images_by_id(merged.uri, {some.image_id})) == [some]
    assert json.loads(storage.read_bytes(out + "/dataset.json"))["num_shards"] == 1
    assert changed(directory.inputs(), snapshot([shards])) == [], "the run's own shards are what they were"
    with pytest.raises(ValueError, match="holds files already"):
        compact.run(compact.Config(place=shards, out=out))
    for wrong in (None, shards):
        with pytest.raises(ValueError, match="give --out, another place"):
            compact.run(compact.Config(place=shards, out=wrong))


@pytest.mark.parametrize(("job", "module"), [(compact, "ray_jobs.compact"), (migrate, "ray_jobs.migrate")])
def test_a_dataset_whose_making_was_cut_off_is_refused_until_the_same_command_ends_it(
    job: ModuleType, module: str, made: tuple[str, RunDirectory], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards, out = made[0], f"{made[0]}-new"
    settings = {"file_mb": 1} if job is compact else {}
    first, *_ = snapshot([shards])
    with monkeypatch.context() as killed:
        killed.setattr(f"{module}.copy_facts", interrupt)
        with pytest.raises(KeyboardInterrupt):
            job.run(job.Config(place=shards, out=out, **settings))
    assert images(out) == images(shards), "all shards are there, and yet it has not ended"
    again = f"`meddam {module.rpartition('.')[2]} .*set --out .*set-new` again"
    with pytest.raises(ValueError, match=f"set-new is not finished.*{again}"):
        snapshot([out], finished=True)
    other = make_shards(str(tmp_path / "other"), 1, 3)
    with pytest.raises(ValueError, match="holds files already"):
        job.run(job.Config(place=other, out=out))
    assert job.run(job.Config(place=shards, out=out, **settings)).place == out
    assert images(out) == images(shards) and snapshot([out], finished=True)[0].first_id == first.first_id
    with pytest.raises(ValueError, match="holds files already"):
        job.run(job.Config(place=shards, out=out, **settings))


def interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_the_size_of_files_can_be_chosen() -> None:
    files = [("a", 3), ("b", 4), ("c", 9), ("d", 1), ("e", 1)]
    assert list(grouped(files, 8)) == [["a", "b"], ["c"], ["d", "e"]]
    assert list(grouped([], 8)) == []


def test_a_slice_of_a_large_file_is_read_from_its_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = RunDirectory(str(tmp_path / "run"))
    publish(directory, make_shards(str(tmp_path / "set"), 2, 12))
    monkeypatch.setattr("ray_jobs.publish.ROW_GROUP_ROWS", 5)
    tables = [pq.read_table(uri).slice(i, 1) for uri in directory.published() or [] for i in range(20)]
    uri = str(tmp_path / "one.parquet")
    counts = write_captions(uri, tables)
    assert pq.ParquetFile(uri).num_row_groups == counts["rows"] // 5 == 8
    whole = pq.read_table(uri).to_pylist()
    assert set(whole[0]) == set(arrow_schema(Caption).names)
    for first, num in ((0, 40), (0, 3), (4, 2), (17, 11), (38, 10), (40, 5)):
        found = read_slice(Slice(of="run", uri=uri, first=first, num=num, out=""))
        assert [r["region_id"] for r in found] == [r["region_id"] for r in whole[first : first + num]]


def test_an_old_dataset_is_brought_to_the_present_version(tmp_path: Path) -> None:
    shards = make_shards(str(tmp_path / "set"), 2, 5)
    (tmp_path / "set/dataset.json").write_text(json.dumps({"schema_version": 1, "num_shards": 2}))
    files = sorted((tmp_path / "set/shards").iterdir())
    wanted = images(shards)
    age(files[0])
    found = migrate.run(migrate.Config(place=shards, out=str(tmp_path / "new")))
    assert (found.num_migrated, found.num_current) == (1, 1)
    assert images(str(tmp_path / "new")) == wanted
    assert "labels" not in pq.read_schema(files[0]).names, "the old one is left as it is"
    before = files[1].read_bytes()
    assert migrate.run(migrate.Config(place=shards)).num_migrated == 1
    assert "labels" in pq.read_schema(files[0]).names and images(shards) == wanted
    assert files[1].read_bytes() == before, "a shard of the present version is not touched"
    assert json.loads((tmp_path / "set/dataset.json").read_text())["schema_version"] == SCHEMA_VERSION
    again = migrate.run(migrate.Config(place=shards))
    assert (again.num_migrated, again.num_current) == (0, 2)


def test_a_run_of_an_older_version_is_published_anew_and_a_newer_one_refused(tmp_path: Path) -> None:
    directory = RunDirectory(str(tmp_path / "run"))
    publish(directory, make_shards(str(tmp_path / "set"), 2, 5))
    before = rows(directory)
    assert migrate.run(migrate.Config(place=directory.uri)).num_migrated == 2
    assert rows(directory) == before
    assert migrate.run(migrate.Config(place=directory.uri)).num_migrated == 0
    manifest = directory.read_json("captions", "gen=2", MANIFEST) or {}
    directory.write_json(manifest | {"schema_version": SCHEMA_VERSION + 1}, "captions", "gen=2", MANIFEST)
    with pytest.raises(ValueError, match="newer MedDAM"):
        directory.published()


def test_what_is_neither_is_said(tmp_path: Path) -> None:
    for job in (compact, migrate):
        with pytest.raises(ValueError, match="neither a run nor a folder of image shards"):
            job.run(job.Config(place=str(tmp_path)))
