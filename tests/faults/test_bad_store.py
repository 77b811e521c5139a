"""A bucket that throttles, drips, cuts answers short and lets credentials expire: nothing is lost, doubled or wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from meddam_core import storage
from meddam_core.shards import read_shard
from ray_jobs.audit import audit
from ray_jobs.run_directory import RunDirectory
from ray_jobs.status import Config as StatusConfig
from ray_jobs.status import run as status
from tests.faults.faulty_s3 import Faults, faulty
from tests.faults.kill_and_resume import Job, captions
from tests.ray_jobs.made_shards import make_shards

pytestmark = pytest.mark.s3
WAITING = ["--engine", "benchmarks.waiting_engine:WaitingEngine"]


def test_objects_come_whole_through_a_store_that_misbehaves(
    s3_bucket: str, s3_endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    faults = Faults(throttled=0.08, reset=0.03, cut=0.15, slow=0.1, slow_s=0.02)
    with faulty(s3_endpoint, faults) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        written = {f"{s3_bucket}/a/{n:03}": bytes([n % 251]) * (1000 + 997 * n) for n in range(10)}
        for uri, data in written.items():
            storage.write_bytes(uri, data)
        listed = {o.uri: o.size for o in storage.list_objects(f"{s3_bucket}/a/")}
        assert listed == {uri: len(data) for uri, data in written.items()}
        assert all(storage.read_bytes(uri) == data for uri, data in written.items())
        make_shards(f"{s3_bucket}/set", 1, 6)
        (shard,) = storage.list_objects(f"{s3_bucket}/set/")
        assert len(list(read_shard(shard.uri))) == 6
    assert min(server.given[k] for k in ("throttled", "reset", "cut", "slow")) > 0, server.given


@pytest.mark.slow
def test_a_whole_job_on_a_store_that_misbehaves(
    s3_bucket: str, s3_endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Job(make_shards(f"{s3_bucket}/set", 3, 40), WAITING)
    assert job.start(f"{s3_bucket}/calm", tmp_path / "calm.log").wait() == 0, (tmp_path / "calm.log").read_text()
    faults = Faults(throttled=0.08, reset=0.02, cut=0.05, slow=0.05)
    with faulty(s3_endpoint, faults) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        for attempt in range(4):  # a job may end over it; it must never end well and be wrong
            log = tmp_path / f"log-{attempt}"
            if (code := job.start(f"{s3_bucket}/run", log).wait()) == 0:
                break
            assert code in (1, 2, 4), log.read_text()
        assert code == 0, log.read_text()
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_endpoint)
    assert server.given["throttled"] > 3
    assert audit(RunDirectory(f"{s3_bucket}/run")).clean
    columns = ["region_id", "prompt_id", "text", "status"]
    calm, found = (captions(f"{s3_bucket}/{name}").select(columns) for name in ("calm", "run"))
    assert calm.equals(found)


@pytest.mark.slow
def test_credentials_that_expire_end_a_job_that_then_resumes(
    s3_bucket: str, s3_endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Job(make_shards(f"{s3_bucket}/set", 3, 40), WAITING)
    with faulty(s3_endpoint, Faults(expired_after=60)) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        log = tmp_path / "log"
        assert job.start(f"{s3_bucket}/run", log).wait() != 0
        assert server.given["expired"] > 0
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_endpoint)
    assert status(StatusConfig(run=f"{s3_bucket}/run")).state != "complete"
    assert job.start(f"{s3_bucket}/run", log).wait() == 0, log.read_text()
    assert audit(RunDirectory(f"{s3_bucket}/run")).clean
