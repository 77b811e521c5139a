"""`ray job submit --working-dir . --runtime-env runtime_env.yaml -- python -m ray_jobs...`, with a token."""

from __future__ import annotations

import json
import time
import urllib.request
from pathlib import Path

import pytest

from ray_jobs.audit import audit
from ray_jobs.run_directory import RunDirectory
from ray_jobs.status import Config as StatusConfig
from ray_jobs.status import run as status
from tests.cluster.head import ROOT, SUBMIT, Head
from tests.ray_jobs.made_shards import make_shards

MODEL = str(ROOT / "tests/data/oracle/dam_tiny/checkpoint")
SECRET_WORDS = "crimson ellipsoid"


def test_a_caption_job_is_submitted_with_a_token_and_not_without(head: Head, tmp_path: Path) -> None:
    assert head.get("/api/jobs/", None) == 401 and head.get("/api/jobs/", "wrong") == 403
    shards, out = make_shards(str(tmp_path / "set"), 1, 6), str(tmp_path / "run")
    prompt = tmp_path / "prompt.txt"
    prompt.write_text(f"<image>\nDescribe the {SECRET_WORDS}.")
    job = ("python", "-m", "ray_jobs.caption", shards, "--out", out, "--model", MODEL, "--max-new-tokens", "4",
           "--prompt", str(prompt), "--engine", "benchmarks.waiting_engine:WaitingEngine")  # fmt: skip
    refused = head.ray(*SUBMIT, "--", *job, token=False)
    assert refused.returncode != 0 and not Path(out).exists()
    done = head.ray(*SUBMIT, "--", *job)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert "complete: 6 images" in done.stdout
    assert audit(RunDirectory(out)).clean and status(StatusConfig(run=out)).state == "complete"
    assert SECRET_WORDS not in done.stdout + done.stderr, "a log holds no prompts"


@pytest.mark.slow
def test_exit_codes_cancel_and_resume_of_jobs(head: Head, tmp_path: Path) -> None:
    looked = head.ray(*SUBMIT, "--", "python", "-m", "ray_jobs.doctor", "--model", MODEL)
    assert looked.returncode == 0, looked.stdout[-4000:]
    assert f"GB free at {head.logs.parents[1]}" in looked.stdout, "where this head spills to"
    assert "the same on 1 node" in looked.stdout and "RAY_AUTH_MODE=token" in looked.stdout
    wrong = head.ray(*SUBMIT, "--", "python", "-m", "ray_jobs.caption", str(tmp_path), "--out", "x", "--model", MODEL)
    assert wrong.returncode != 0 and "there are no image shards" in wrong.stdout + wrong.stderr
    assert "exit code 2" in wrong.stdout + wrong.stderr
    shards, out = make_shards(str(tmp_path / "set"), 4, 80), str(tmp_path / "run")
    job = ("python", "-m", "ray_jobs.caption", shards, "--out", out, "--model", MODEL, "--max-new-tokens", "16",
           "--images-per-file", "100", "--engine", "tests.faults.engines:SlowEngine")  # fmt: skip
    assert head.ray(*SUBMIT, "--no-wait", "--submission-id", "cancelled", "--", *job).returncode == 0
    deadline = time.monotonic() + 120
    while not (Path(out) / "inputs.parquet").exists() or not status(StatusConfig(run=out)).num_images_done:
        assert time.monotonic() < deadline, head.ray("job", "logs", "cancelled").stdout[-2000:]
        time.sleep(0.2)
    while "ray_meddam_regions_total" not in (exported := urllib.request.urlopen(head.metrics_url).read().decode()):
        assert time.monotonic() < deadline
        time.sleep(0.5)
    assert "ray_meddam_captioners" in exported and str(tmp_path) not in exported
    assert head.ray("job", "stop", "cancelled").returncode == 0
    said = json.loads((Path(out) / "progress.json").read_text())
    assert said["phase"] == "interrupted" and status(StatusConfig(run=out)).exit_code == 4
    assert "was stopped" in head.ray("job", "status", "cancelled").stdout
    again = head.ray(*SUBMIT, "--", *job)
    assert again.returncode == 0 and audit(RunDirectory(out)).clean
