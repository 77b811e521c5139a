"""Real kills of a real job, a few; `python -m tests.faults.suite` does all kinds, `kill_and_resume` many at random."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from meddam_core import storage
from ray_jobs.audit import audit
from ray_jobs.checkpoints import PENDING
from ray_jobs.lease import Lease
from ray_jobs.run_directory import RunDirectory
from tests.faults.kill_and_resume import Job, captions, check, committed
from tests.faults.processes import Victim, kill, victims
from tests.ray_jobs.made_shards import make_shards

pytestmark = pytest.mark.s3

DEADLINE_S = 240.0


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Job, pa.Table]:
    """A job and the captions it makes when left alone. Two CPUs in all: the fewest that a resume can live with."""
    scratch = tmp_path_factory.mktemp("undisturbed")
    job = Job(make_shards(str(scratch / "set"), 2, 40), ["--engine", "torch"])
    assert job.start(str(scratch / "run"), scratch / "log").wait() == 0, (scratch / "log").read_text()
    return job, captions(str(scratch / "run"))


def _run_until(job: Job, out: str, log: Path, moment: Callable[[], bool], victim: Victim, at_work: bool = False) -> int:
    """Starts the job, kills `victim` as soon as `moment` has come, and returns the job's exit code."""
    process = job.start(out, log)
    deadline = time.monotonic() + DEADLINE_S
    while not (moment() and (found := victims(process.pid, victim, at_work))):
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)
    kill(found[0])
    return process.wait()


def test_driver_killed_on_s3_between_the_two_halves_of_a_commit(
    undisturbed: tuple[Job, pa.Table], s3_bucket: str, tmp_path: Path
) -> None:
    """LOSS 2: a rename on S3 is a copy and a delete. Ray alone would delete the data and count its ids as done."""
    job, table = undisturbed
    out = f"{s3_bucket}/run"
    assert _run_until(job, out, tmp_path / "log", committed(out), "driver") == -9
    assert not audit(RunDirectory(out)).published
    files = [info.path for info in storage.list_files(RunDirectory(out).checkpoint(1), ".parquet")]
    done = next(path for path in files if not path.endswith(PENDING))
    filesystem, _ = storage.open_uri(out)
    filesystem.copy_file(done, done.removesuffix(".parquet") + PENDING)
    assert job.start(out, tmp_path / "log").wait() == 0, (tmp_path / "log").read_text()
    check(out, table)


@pytest.mark.slow
def test_a_captioner_killed_after_a_commit_is_replaced(undisturbed: tuple[Job, pa.Table], tmp_path: Path) -> None:
    job, table = undisturbed
    out = str(tmp_path / "run")
    assert _run_until(job, out, tmp_path / "log", committed(out), "captioner") == 0, (tmp_path / "log").read_text()
    check(out, table)


@pytest.mark.slow
def test_an_extractor_killed_with_rows_in_hand_is_replaced(undisturbed: tuple[Job, pa.Table], tmp_path: Path) -> None:
    """It works far ahead of the captioner: by the first commit a fast machine has no extractor left to kill."""
    job, table = undisturbed
    out = str(tmp_path / "run")
    code = _run_until(job, out, tmp_path / "log", lambda: True, "extractor", at_work=True)
    assert code == 0, (tmp_path / "log").read_text()
    check(out, table)


def test_two_drivers_started_at_once(undisturbed: tuple[Job, pa.Table], s3_bucket: str, tmp_path: Path) -> None:
    """Without the lease they wrote 1,580 rows for 1,000 and both reported success."""
    job, table = undisturbed
    out = f"{s3_bucket}/run"
    both = [job.start(out, tmp_path / name) for name in ("first", "second")]
    codes = sorted(process.wait() for process in both)
    # the one that comes too late is turned away, or, where the other is done by then, finds a finished run
    assert codes in ([0, 5], [0, 0]), codes
    check(out, table)


def test_a_driver_is_turned_away_while_another_holds_the_run(
    undisturbed: tuple[Job, pa.Table], s3_bucket: str, tmp_path: Path
) -> None:
    job, _ = undisturbed
    out = f"{s3_bucket}/run"
    with Lease(out):
        assert job.start(out, tmp_path / "log").wait() == 5
    assert f"is held by process {os.getpid()}" in (tmp_path / "log").read_text()
    assert not storage.exists(f"{out}/run.json")
