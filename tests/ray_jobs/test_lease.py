"""One driver at a time on a run directory: on disk and on S3, through a takeover, a lost renewal and a bad bucket."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import boto3
import pytest

from meddam_core import storage
from ray_jobs.lease import Lease, LeaseHeld, _S3Lease
from tests.faults.faulty_s3 import Faults, faulty
from tests.faults.kill_and_resume import Job
from tests.ray_jobs.made_shards import make_shards

HOLD = """
import sys
from ray_jobs.lease import Lease
with Lease(sys.argv[1], ttl_s=float(sys.argv[2])):
    print("held", flush=True)
    sys.stdin.read()
"""


def _holder(uri: str, ttl_s: float) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, uri, str(ttl_s)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_second_driver_is_refused_on_disk_and_a_dead_one_is_not_waited_for(tmp_path: Path) -> None:
    first = _holder(str(tmp_path), ttl_s=60)
    with pytest.raises(LeaseHeld, match=f"process {first.pid} on .* still at work"), Lease(str(tmp_path)):
        pass
    first.kill()
    first.wait()
    with Lease(str(tmp_path)):
        pass


@pytest.mark.s3
def test_second_driver_is_refused_on_s3_while_the_first_renews(s3_bucket: str) -> None:
    first = _holder(f"{s3_bucket}/run", ttl_s=2)
    with pytest.raises(LeaseHeld, match=f"process {first.pid}"), Lease(f"{s3_bucket}/run", ttl_s=2):
        pass
    first.communicate()  # ends it in peace: the lease object is gone
    assert boto3.client("s3").list_objects_v2(Bucket=s3_bucket.removeprefix("s3://"))["KeyCount"] == 0


@pytest.mark.s3
def test_a_killed_drivers_lease_on_s3_is_taken_over_after_its_ttl(s3_bucket: str) -> None:
    first = _holder(f"{s3_bucket}/run", ttl_s=1)
    first.kill()
    first.wait()
    with Lease(f"{s3_bucket}/run", ttl_s=1):
        pass


@pytest.mark.s3
def test_a_driver_whose_lease_was_taken_over_is_told(s3_bucket: str) -> None:
    lost = threading.Event()
    with Lease(f"{s3_bucket}/run", ttl_s=1, on_lost=lost.set):
        boto3.client("s3").put_object(Bucket=s3_bucket.removeprefix("s3://"), Key="run/lease", Body=b"{}")
        assert lost.wait(timeout=30)


@pytest.mark.s3
def test_a_bucket_that_hangs_keeps_a_renewal_waiting_for_less_than_the_ttl(s3_bucket: str) -> None:
    with Lease(f"{s3_bucket}/run", ttl_s=20) as lease:
        assert isinstance(lease._backend, _S3Lease)
        patience = lease._backend._client.meta.config
        assert patience.retries["total_max_attempts"] * max(patience.read_timeout, patience.connect_timeout) <= 10


@pytest.mark.s3
def test_a_renewal_whose_answer_was_lost_keeps_the_lease(s3_bucket: str) -> None:
    lost = threading.Event()
    with Lease(f"{s3_bucket}/run", ttl_s=1, on_lost=lost.set) as lease:
        # the same body with another etag: what the bucket holds when a put went through and its answer did not
        boto3.client("s3").put_object(Bucket=s3_bucket.removeprefix("s3://"), Key="run/lease", Body=lease.body(99))
        assert not lost.wait(timeout=3)


@pytest.mark.s3
def test_a_first_put_whose_answer_was_lost_is_the_drivers_own_and_is_not_waited_for(
    s3_bucket: str, s3_endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with faulty(s3_endpoint, Faults(unanswered=1)) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        with Lease(f"{s3_bucket}/run", ttl_s=4):
            assert server.given["unanswered"] == 1
            reads = [n for (method, path), n in server.asked.items() if method == "GET" and "run/lease" in path]
            assert sum(reads) == 1, "whose it is was looked up once; it was not watched"


@pytest.mark.s3
@pytest.mark.parametrize("faults", [Faults(unanswered=1), Faults(cut=0.4, seed=1)], ids=["unanswered", "cut"])
def test_a_takeover_outlives_a_put_without_an_answer_and_bodies_that_break_off(
    s3_bucket: str, s3_endpoint: str, monkeypatch: pytest.MonkeyPatch, faults: Faults
) -> None:
    first = _holder(f"{s3_bucket}/run", ttl_s=1)
    first.kill()
    first.wait()
    with faulty(s3_endpoint, faults) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        with Lease(f"{s3_bucket}/run", ttl_s=1):
            assert server.given["unanswered"] + server.given["cut"] > 0


@pytest.mark.s3
def test_renewals_go_on_after_a_body_that_broke_off(
    s3_bucket: str, s3_endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    faults, lost = Faults(), threading.Event()
    s3, place = boto3.client("s3"), {"Bucket": s3_bucket.removeprefix("s3://"), "Key": "run/lease"}
    with faulty(s3_endpoint, faults) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        with Lease(f"{s3_bucket}/run", ttl_s=4, on_lost=lost.set) as lease:
            faults.cut = 1.0
            etag = s3.put_object(**place, Body=lease.body(99))["ETag"]  # a renewal whose answer was lost: it is read
            while server.given["cut"] < 2:  # the put that is refused, the read that breaks off
                assert not lost.wait(0.05)
            faults.cut = 0.0
            deadline = time.monotonic() + 60
            while s3.head_object(**place)["ETag"] == etag:
                assert not lost.wait(0.05)
                assert time.monotonic() < deadline


@pytest.mark.s3
def test_a_lease_that_cannot_be_given_back_does_not_undo_the_run(
    s3_bucket: str, s3_endpoint: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    faults = Faults()
    with faulty(s3_endpoint, faults) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        with Lease(f"{s3_bucket}/run", ttl_s=60):
            faults.expired_after = 0
    assert "could not be given back" in caplog.text
    assert "ExpiredToken" in caplog.text


@pytest.mark.s3
def test_a_job_is_turned_away_while_another_holds_the_run(s3_bucket: str, tmp_path: Path) -> None:
    """Two that start at the same moment: `python -m tests.faults.suite --only rivals`."""
    out, log = f"{s3_bucket}/run", tmp_path / "log"
    job = Job(make_shards(str(tmp_path / "set"), 1, 4), ["--engine", "torch"])
    with Lease(out):
        assert job.start(out, log).wait() == 5
    assert f"is held by process {os.getpid()}" in log.read_text()
    assert not storage.exists(f"{out}/run.json")
