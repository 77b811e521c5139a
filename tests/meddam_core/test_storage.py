"""Files by URI, on disk and on a real S3 server on loopback: the same calls, the same answers."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from meddam_core import storage
from tests.faults.faulty_s3 import Faults, faulty


@pytest.fixture(params=["disk", pytest.param("s3", marks=pytest.mark.s3)])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty folder, once on disk and once in a bucket."""
    if request.param == "disk":
        return str(tmp_path / "store")
    bucket: str = request.getfixturevalue("s3_bucket")
    return bucket


def test_write_read_replace_delete(place: str) -> None:
    uri = storage.join(place, "a", "b.json")
    assert not storage.exists(uri)
    storage.write_bytes(uri, b"one")
    storage.write_bytes(uri, b"two")
    assert storage.exists(uri)
    assert storage.read_bytes(uri) == b"two"
    storage.delete(uri)
    storage.delete(uri)
    assert not storage.exists(uri)
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(uri)


def test_listing_is_sorted_and_leaves_private_names_out(place: str) -> None:
    for name in ("b.parquet", "a.parquet", "_half.parquet", ".hidden.parquet", "c.json", "deep/d.parquet"):
        storage.write_bytes(storage.join(place, "set", name), b"x")
    found = [i.base_name for i in storage.list_files(storage.join(place, "set"), ".parquet")]
    assert found == ["a.parquet", "b.parquet"]
    everything = storage.list_objects(storage.join(place, "set") + "/", ".parquet")
    assert [o.uri.rpartition("set/")[2] for o in everything] == ["a.parquet", "b.parquet", "deep/d.parquet"]
    assert storage.list_files(storage.join(place, "nowhere")) == []


@pytest.mark.s3
def test_an_object_that_stands_for_a_folder_is_no_file(s3_bucket: str) -> None:
    fs, path = storage.open_uri(f"{s3_bucket}/set/empty")
    fs.create_dir(path)
    storage.write_bytes(f"{s3_bucket}/set/a.bin", b"x")
    assert [o.uri for o in storage.list_objects(f"{s3_bucket}/set/")] == [f"{s3_bucket}/set/a.bin"]


def test_a_tag_changes_with_the_content(place: str) -> None:
    uri = storage.join(place, "t", "a.bin")

    def tag() -> str:
        (info,) = storage.list_objects(storage.join(place, "t") + "/")
        assert info.uri == uri
        return info.etag

    storage.write_bytes(uri, b"one")
    first = tag()
    assert tag() == first
    storage.write_bytes(uri, b"another")
    assert tag() != first


def test_a_writable_place_is_left_as_it_was(place: str) -> None:
    storage.check_writable(place)
    assert storage.list_files(place, recursive=True) == []


def test_a_dead_writer_leaves_no_half_file(tmp_path: Path) -> None:
    (tmp_path / ".a.json.0123").write_bytes(b"ha")
    assert storage.list_files(str(tmp_path)) == []


def interrupted(call: Callable[[], None], line: int) -> bool:
    """Presses Ctrl-C at a line of storage.py, counted as they are run; False where the call ends before."""
    lines = itertools.count()

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        if frame.f_code.co_filename != storage.__file__:
            return None
        if event == "line" and next(lines) == line:
            raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


@pytest.mark.parametrize("size", [3, 2 << 10], ids=["one request", "in parts"])
def test_a_file_is_there_whole_or_not_at_all_wherever_its_writing_is_interrupted(
    place: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "PUT_BYTES", 1 << 10)
    data = bytes(size)
    for line in itertools.count():
        uri = storage.join(place, f"run-{line}.json")
        was = interrupted(lambda uri=uri: storage.write_bytes(uri, data), line)  # type: ignore[misc]
        assert not storage.exists(uri) or storage.read_bytes(uri) == data, line
        if not was:
            assert storage.read_bytes(uri) == data and line > 5
            break


@pytest.mark.s3
def test_a_request_is_tried_as_often_as_it_is_said(
    s3_bucket: str, s3_endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "S3_ATTEMPTS", 2)
    with faulty(s3_endpoint, Faults(throttled=1.0)) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        for number, call in enumerate((storage.list_objects, lambda uri: storage.write_bytes(uri, b"x")), start=1):
            with pytest.raises((storage.StorageError, storage.BucketError), match="the bucket answers SlowDown"):
                call(f"{s3_bucket}/a")
            assert server.given["throttled"] == 2 * number


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("gs://bucket/x", "use s3://BUCKET/PREFIX or a path"),
        ("s3://", "names no bucket"),
        ("s3:///key", "names no bucket"),
    ],
)
def test_a_uri_that_cannot_work_says_what_to_write(uri: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        storage.open_uri(uri)


@pytest.mark.s3
def test_a_bucket_that_is_not_there_is_named(s3_bucket: str) -> None:
    with pytest.raises(storage.StorageError, match=r"no-such-bucket-here.*does not exist"):
        storage.list_objects("s3://no-such-bucket-here/shards/")
    with pytest.raises(storage.StorageError, match=r"no-such-bucket-here.*does not exist"):
        storage.check_writable("s3://no-such-bucket-here/run")
    with pytest.raises(storage.BucketError, match=r"no-such-bucket-here.*does not exist"):
        storage.write_bytes("s3://no-such-bucket-here/run/a.json", b"{}")


def test_an_endpoint_that_is_dead_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setattr(storage, "S3_ATTEMPTS", 1)
    for call in (storage.list_objects, storage.check_writable, lambda uri: storage.write_bytes(uri, b"x")):
        with pytest.raises((storage.StorageError, storage.BucketError), match=r"127\.0\.0\.1:9.*does not answer"):
            call("s3://bucket/shards/403")


def test_the_endpoint_for_s3_alone_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://all:1")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://s3:2")
    assert storage.s3_endpoint() == "http://s3:2"
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3")
    assert storage.s3_endpoint() == "http://all:1"


@pytest.mark.parametrize("name", ["AWS_REGION", "AWS_DEFAULT_REGION"])
def test_all_requests_go_to_the_same_region(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Past a VPC's own endpoint, which knows one region, a private node reaches nothing."""
    for other in ("AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_PROFILE"):
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, "eu-central-1")
    client = storage.s3_client()
    assert client.meta.region_name == "eu-central-1"
    url = client.generate_presigned_url("get_object", Params={"Bucket": "b", "Key": "k"}, ExpiresIn=60)
    assert "eu-central-1" in url
    filesystem, _ = storage.open_uri("s3://b/k")
    assert filesystem.region == "eu-central-1"
