"""`meddam status`: what a run directory says of its run, while it is made, when its driver is gone, and at the end."""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from meddam_core.storage import BucketError
from ray_jobs import caption, progress_file
from ray_jobs.monitor import Totals
from ray_jobs.progress_file import PROGRESS, ProgressFile
from ray_jobs.run_directory import RUN, SUMMARY, RunDirectory
from ray_jobs.session import TooFewGpus, wait_for_gpus
from ray_jobs.status import Config, run
from tests.faults.kill_and_resume import MODEL
from tests.ray_jobs.made_shards import make_shards
from tests.ray_jobs.test_report import publish


@pytest.fixture
def directory(tmp_path: Path) -> RunDirectory:
    """A published run."""
    made = RunDirectory(str(tmp_path / "run"))
    publish(made, make_shards(str(tmp_path / "set"), 1, 20))
    summary = made.read_json(SUMMARY) or {}
    counts = {"num_images": 20, "num_captions": 33, "by_reason": {"corrupt": 3}, "why": None}
    made.write_json(summary | counts, SUMMARY)
    return made


def said(directory: RunDirectory, **facts: Any) -> dict[str, Any]:
    """What progress.json holds, with some of it changed."""
    found = (directory.read_json(PROGRESS) or {}) | facts
    directory.write_json(found, PROGRESS)
    return found


def test_a_published_run(directory: RunDirectory) -> None:
    found = run(Config(run=directory.uri))
    assert (found.state, found.exit_code, found.num_captions) == ("complete", 0, 33)
    assert "33 captions published" in "\n".join(found.lines())


def test_a_run_at_work_whose_driver_then_falls_silent(directory: RunDirectory) -> None:
    Path(directory.at(SUMMARY)).unlink()
    with ProgressFile(directory, 1) as shown:
        assert run(Config(run=directory.uri)).state == "working"
        shown.phase("captioning", num_images_before=5, num_regions_left=30)
        totals = Totals(num_images=6, num_regions=10, num_failed=1, first_report_s=0.0, last_report_s=2.0)
        totals.by_reason["corrupt"] = 1
        shown.update(totals)
        assert run(Config(run=directory.uri)).num_images_done == 5, "not written at every batch"
        shown._written_s = float("-inf")
        shown.update(totals)
        found = run(Config(run=directory.uri))
        assert (found.state, found.num_images_done, found.regions_per_s, found.seconds_left) == (
            "working",
            11,
            5.0,
            4.0,
        )
        assert found.by_reason == {"corrupt": 1} and found.exit_code == 4
        text = "\n".join(found.lines())
        assert "11 of 20 images (55.0%)" in text and "5.0 regions/s, 4 s left" in text
        written = Path(directory.at(PROGRESS)).stat().st_mtime
        os.utime(directory.at(PROGRESS), (written - 300, written - 300))
        found = run(Config(run=directory.uri))
        assert found.state == "silent" and "last sign of life 5 min" in "\n".join(found.lines())
        assert "run the same `meddam caption` again" in found.lines()[-1]


def test_a_published_run_stays_published_when_a_later_driver_falls_silent(directory: RunDirectory) -> None:
    attempt = (directory.read_json(SUMMARY) or {})["attempt"]
    for later, again in ((0, ""), (1, "a retry was begun and is silent for 5 min 00 s: run `meddam retry` again")):
        with ProgressFile(directory, attempt + later) as shown:
            shown.phase("publishing")
            assert run(Config(run=directory.uri)).state == "working", "it has said so a moment ago"
            written = Path(directory.at(PROGRESS)).stat().st_mtime
            os.utime(directory.at(PROGRESS), (written - 300, written - 300))
            found = run(Config(run=directory.uri))
        assert (found.state, found.exit_code, found.num_captions) == ("complete", 0, 33)
        assert again in (found.why or "") and bool(found.why) == bool(again)
    said(directory, phase="interrupted")
    assert "a retry was begun and is interrupted" in "\n".join(run(Config(run=directory.uri)).lines())


@pytest.mark.s3
@pytest.mark.parametrize("skew", [timedelta(hours=1), timedelta(hours=-1)], ids=["ahead", "behind"])
@pytest.mark.parametrize("place", ["disk", "s3"])
def test_a_driver_whose_clock_is_off_is_not_taken_for_silent(
    tmp_path: Path, s3_bucket: str, monkeypatch: pytest.MonkeyPatch, place: str, skew: timedelta
) -> None:
    monkeypatch.setattr(progress_file, "_now", lambda: (datetime.now(UTC) + skew).isoformat())
    made = RunDirectory(f"{s3_bucket}/run" if place == "s3" else str(tmp_path))
    with ProgressFile(made, 1):
        found = run(Config(run=made.uri))
    assert found.state == "working"
    assert found.seconds_since_sign_of_life is not None and found.seconds_since_sign_of_life < 60


@pytest.mark.parametrize(("error", "state"), [(KeyboardInterrupt(), "interrupted"), (RuntimeError("x"), "failed")])
def test_a_driver_that_ends_badly_says_so(directory: RunDirectory, error: BaseException, state: str) -> None:
    Path(directory.at(SUMMARY)).unlink()
    with pytest.raises(type(error)), ProgressFile(directory, 1):
        raise error
    found = run(Config(run=directory.uri))
    assert (found.state, found.why) == (state, type(error).__name__)


@pytest.mark.parametrize("kind", [OSError, BucketError])
def test_a_store_that_refuses_progress_does_not_end_the_run(
    kind: type[Exception], directory: RunDirectory, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(*_: Any) -> None:
        raise kind("the secret path of a patient")

    monkeypatch.setattr(directory, "write_json", refused)
    with ProgressFile(directory, 1) as shown:
        shown.phase("captioning")
    assert "the run goes on" in caplog.text and "secret path" not in caplog.text


def test_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a run directory"):
        run(Config(run=str(tmp_path)))


def test_a_real_run_leaves_its_progress_and_waits_for_gpus_that_do_not_come(ray_session: None, tmp_path: Path) -> None:
    shards = make_shards(str(tmp_path / "set"), 1, 6)
    cfg = caption.Config(
        shards=(shards,), out=str(tmp_path / "run"), model=MODEL, max_new_tokens=4,
        engine="benchmarks.waiting_engine:WaitingEngine",
    )  # fmt: skip
    assert caption.run(cfg).exit_code == 0
    left = json.loads((tmp_path / "run" / PROGRESS).read_text())
    assert (left["phase"], left["exit_code"], left["num_images_done"]) == ("complete", 0, 6)
    assert run(Config(run=cfg.out)).state == "complete"
    assert "wait_for_gpus" in json.loads((tmp_path / "run" / RUN).read_text())["config"]
    with pytest.raises(TooFewGpus, match=r"has 0 of 2 GPUs after 0 minutes"):
        wait_for_gpus(2, timeout_s=0.0)
