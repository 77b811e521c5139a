"""The two states of Ray's checkpoint from which its own recovery loses rows, and a third we do not want."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ray_jobs.checkpoints import committed_ids, repair


def _put(path: Path, ids: list[int]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"image_id": pa.array(ids, pa.int64())}), path)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    checkpoint, parts = tmp_path / "checkpoint", tmp_path / "parts"
    _put(checkpoint / "u_w_000000.parquet", [1, 2])
    _put(parts / "u_w_000000-0.parquet", [1, 2])
    return checkpoint, parts


def _names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_a_sound_checkpoint_is_left_alone(folders: tuple[Path, Path]) -> None:
    checkpoint, parts = folders
    assert repair(str(checkpoint), str(parts)) == 0
    assert committed_ids(str(checkpoint)).tolist() == [1, 2]


def test_pending_beside_committed_is_dropped_so_that_ray_does_not_delete_the_data(folders: tuple[Path, Path]) -> None:
    checkpoint, parts = folders
    _put(checkpoint / "u_w_000000.pending.parquet", [1, 2])
    assert repair(str(checkpoint), str(parts)) == 1
    assert _names(checkpoint) == ["u_w_000000.parquet"]
    assert _names(parts) == ["u_w_000000-0.parquet"]


def test_committed_ids_whose_data_is_gone_count_as_not_done(folders: tuple[Path, Path]) -> None:
    checkpoint, parts = folders
    _put(checkpoint / "u_w_000001.parquet", [3])
    assert repair(str(checkpoint), str(parts)) == 1
    assert committed_ids(str(checkpoint)).tolist() == [1, 2]


def test_data_that_nobody_committed_is_dropped(folders: tuple[Path, Path]) -> None:
    checkpoint, parts = folders
    _put(parts / "u_x_000000-0.parquet", [1, 2])
    assert repair(str(checkpoint), str(parts)) == 1
    assert _names(parts) == ["u_w_000000-0.parquet"]


def test_a_pending_commit_is_left_to_ray(folders: tuple[Path, Path]) -> None:
    checkpoint, parts = folders
    _put(checkpoint / "u_w_000001.pending.parquet", [3])
    _put(parts / "u_w_000001-0.parquet", [3])
    assert repair(str(checkpoint), str(parts)) == 0


@pytest.mark.s3
def test_the_same_on_s3(s3_bucket: str, folders: tuple[Path, Path]) -> None:
    import boto3

    client = boto3.client("s3")
    bucket = s3_bucket.removeprefix("s3://")
    for folder in folders:
        for file in folder.iterdir():
            client.upload_file(str(file), bucket, f"run/{folder.name}/{file.name}")
    client.copy_object(
        Bucket=bucket, Key="run/checkpoint/u_w_000000.pending.parquet",
        CopySource=f"{bucket}/run/checkpoint/u_w_000000.parquet",
    )  # fmt: skip
    assert repair(f"{s3_bucket}/run/checkpoint", f"{s3_bucket}/run/parts") == 1
    assert committed_ids(f"{s3_bucket}/run/checkpoint").tolist() == [1, 2]


def test_nothing_there_yet(tmp_path: Path) -> None:
    assert repair(str(tmp_path / "checkpoint"), str(tmp_path / "parts")) == 0
    assert len(committed_ids(str(tmp_path / "checkpoint"))) == 0
