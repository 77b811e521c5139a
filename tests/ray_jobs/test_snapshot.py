"""What a run takes for its input, and what it refuses before any work."""

from __future__ import annotations

import shutil
from pathlib import Path

import boto3
import pytest

from meddam_core import storage
from meddam_core.records import image_id
from meddam_core.shards import read_shard, write_shard
from meddam_core.storage import StorageError
from ray_jobs import caption, qa
from ray_jobs.dataset_files import DATASET, PLAN
from ray_jobs.loop_sets import check_apart
from ray_jobs.snapshot import changed, snapshot
from tests.faults.kill_and_resume import MODEL
from tests.ray_jobs.made_shards import make_shards


def test_shards_in_the_order_of_their_ids(tmp_path: Path) -> None:
    made = make_shards(str(tmp_path / "set"), 2, 12)
    first, second = snapshot([made])
    assert (first.num_images, first.num_regions, first.first_id, first.last_id) == (12, 23, 0, 11)
    assert second.first_id == image_id(1, 0)
    assert snapshot([second.uri]) == [second]


@pytest.mark.s3
def test_the_same_on_s3(s3_bucket: str) -> None:
    (shard,) = snapshot([make_shards(f"{s3_bucket}/set", 1, 3)])
    assert shard.uri == f"{s3_bucket}/set/shards/shard-000000.parquet"
    assert len(shard.etag) == 32


def test_the_same_ids_twice_are_refused(tmp_path: Path) -> None:
    made = make_shards(str(tmp_path / "set"), 1, 3)
    shutil.copy(tmp_path / "set/shards/shard-000000.parquet", tmp_path / "set/shards/copy.parquet")
    with pytest.raises(ValueError, match="hold the same image ids"):
        snapshot([made])
    rows = list(read_shard(str(tmp_path / "set/shards/copy.parquet")))
    write_shard(str(tmp_path / "twice.parquet"), [rows[0], rows[0]])
    with pytest.raises(ValueError, match="the same image id twice"):
        snapshot([str(tmp_path / "twice.parquet")])


def test_what_is_no_shard_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there are no image shards .*meddam ingest"):
        snapshot([str(tmp_path)])
    (tmp_path / "a.parquet").write_bytes(b"PAR1 but no more")
    with pytest.raises(ValueError, match=r"a\.parquet"):
        snapshot([str(tmp_path)])


def test_an_empty_dataset_is_refused(tmp_path: Path) -> None:
    write_shard(str(tmp_path / "empty.parquet"), [])
    with pytest.raises(ValueError, match="hold no image"):
        snapshot([str(tmp_path)])


@pytest.mark.parametrize("place", ["disk", pytest.param("s3", marks=pytest.mark.s3)])
def test_a_dataset_that_is_half_made_is_not_taken_for_a_whole_one(
    place: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    store = str(tmp_path) if place == "disk" else request.getfixturevalue("s3_bucket")
    made = make_shards(f"{store}/set", 2, 3)
    assert len(snapshot([made], finished=True)) == 2, "a folder of shards that no ingest has made"
    storage.write_bytes(f"{made}/{PLAN}", b"{}")
    cfg = caption.Config(shards=(made,), out=str(tmp_path / "run"), model=MODEL)
    for refused in (
        lambda: caption.run(cfg),
        lambda: qa.run(qa.Config(shards=(made,), out=str(tmp_path / "questions"))),
        lambda: check_apart({"test": [made]}),
        lambda: snapshot([f"{made}/shards"], finished=True),
    ):
        with pytest.raises(ValueError, match=r"set is not finished.*Run the same `meddam ingest` command again"):
            refused()
    assert len(snapshot([made])) == 2, "whoever counts what is there may"
    storage.write_bytes(f"{made}/{DATASET}", b"{}")
    assert len(snapshot([made], finished=True)) == 2


@pytest.mark.s3
def test_a_bucket_that_is_not_there(s3_bucket: str) -> None:
    with pytest.raises(StorageError, match="the bucket does not exist; check its name"):
        snapshot(["s3://no-such-bucket/set"])


def test_no_server_at_the_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "y")
    monkeypatch.setattr(storage, "S3_ATTEMPTS", 1)
    with pytest.raises(StorageError, match="does not answer; check AWS_ENDPOINT_URL"):
        snapshot(["s3://bucket/set"])


@pytest.mark.s3
def test_a_shard_written_again_is_seen(s3_bucket: str) -> None:
    before = snapshot([make_shards(f"{s3_bucket}/set", 2, 3)])
    assert changed(before, before) == []
    make_shards(f"{s3_bucket}/set", 1, 3, seed=1)
    boto3.client("s3").delete_object(Bucket=s3_bucket.removeprefix("s3://"), Key="set/shards/shard-000001.parquet")
    after = snapshot([f"{s3_bucket}/set"])
    assert changed(before, after) == [f"{before[0].uri} has other content", f"{before[1].uri} is gone"]
