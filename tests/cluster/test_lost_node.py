"""A node of a real cluster of two is lost while captions are made: the run ends well, and nothing is missing."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from ray_jobs.audit import audit
from ray_jobs.run_directory import RunDirectory
from ray_jobs.status import Config as StatusConfig
from ray_jobs.status import run as status
from tests.cluster.head import ROOT, joined_node, kill_tree, started_head
from tests.faults.kill_and_resume import captions
from tests.faults.processes import descendants, title
from tests.ray_jobs.made_shards import make_shards

MODEL = str(ROOT / "tests/data/oracle/dam_tiny/checkpoint")


@pytest.mark.slow
def test_a_lost_node_costs_time_and_nothing_else(tmp_path: Path) -> None:
    shards, out = make_shards(str(tmp_path / "set"), 6, 60), str(tmp_path / "run")
    with (
        started_head(tmp_path, OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT)) as head,
        joined_node(head, tmp_path / "node.log") as node,
    ):
        command = [
            sys.executable, "-m", "ray_jobs.caption", shards, "--out", out, "--model", MODEL, "--engine",
            "tests.faults.engines:SlowEngine", "--num-captioners", "2", "--images-per-file", "20",
        ]  # fmt: skip
        deadline = time.monotonic() + 100
        while "raylet" not in " ".join(title(pid) for pid in descendants(node.pid)):
            assert node.poll() is None and time.monotonic() < deadline, (tmp_path / "node.log").read_text()
            time.sleep(0.2)
        log = (tmp_path / "log").open("wb")
        job = subprocess.Popen(command, cwd=ROOT, env=head.env | {"RAY_ADDRESS": head.address}, stdout=log, stderr=log)
        try:
            while not (Path(out) / "inputs.parquet").exists() or not status(StatusConfig(run=out)).num_images_done:
                assert job.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
                time.sleep(0.2)
            kill_tree(node)
            assert job.wait(timeout=200) == 0, (tmp_path / "log").read_text()
        finally:
            job.kill()
            job.wait()
    found = audit(RunDirectory(out))
    assert found.clean and found.num_published == found.num_expected == len(captions(out))
