"""The Slurm script on this machine: Slurm's commands and Apptainer are stand-ins, Ray, token and job are real."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from ray_jobs.audit import audit
from ray_jobs.run_directory import RunDirectory
from tests.cluster.head import BIN, ROOT
from tests.faults.processes import kill, title
from tests.ray_jobs.made_shards import make_shards

STAND_INS = {
    # one node, this one; what `srun` is told to run, runs
    "scontrol": 'case "$1" in show) echo thishost;; requeue) echo requeued $2 >>"$CALLS";; esac',
    "srun": 'echo srun "$@" >>"$CALLS"; while [ "${1#--}" != "$1" ]; do shift; done; exec "$@"',
    "apptainer": 'echo apptainer "$@" >>"$CALLS"; shift; while [ "${1#--}" != "$1" ]; do '
    'case "$1" in --bind) shift;; esac; shift; done; shift; exec "$@"',
    "hostname": "echo 127.0.0.1",
}


@pytest.mark.slow
def test_a_run_under_slurm(tmp_path: Path) -> None:
    stand_ins = tmp_path / "bin"
    stand_ins.mkdir()
    for name, body in STAND_INS.items():
        (stand_ins / name).write_text(f"#!/bin/bash\n{body}\n")
        (stand_ins / name).chmod(0o755)
    shards, out, calls = make_shards(str(tmp_path / "set"), 1, 6), tmp_path / "run", tmp_path / "calls"
    short = Path(f"/tmp/msl{os.getpid()}")  # a socket's path has 107 characters at most
    env = os.environ | {
        "PATH": f"{stand_ins}:{BIN}:{os.environ['PATH']}", "CALLS": str(calls), "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NODELIST": "thishost", "SLURM_CPUS_PER_TASK": "2", "SLURM_TMPDIR": str(short),
        "PYTHONPATH": str(ROOT),
        "MEDDAM_TOKEN_DIR": str(tmp_path), "SLURM_GPUS_ON_NODE": "0", "IMAGE": "meddam.sif",
    }  # fmt: skip
    model = ROOT / "tests/data/oracle/dam_tiny/checkpoint"
    command = ["bash", str(ROOT / "cluster/slurm/caption.sbatch"), shards, "--out", str(out), "--model", str(model),
               "--engine", "benchmarks.waiting_engine:WaitingEngine"]  # fmt: skip
    process = subprocess.Popen(command, env=env, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        text = process.communicate(timeout=240)[0].decode()
    finally:
        running = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
        for pid in [pid for pid in running if str(short) in title(pid)]:
            kill(pid)  # what the script left of its own Ray
    assert process.returncode == 0, text[-4000:]
    assert audit(RunDirectory(str(out))).clean
    said = calls.read_text()
    assert "apptainer exec --nv --cleanenv" in said and "ray start --head" in said
    assert "ray stop" not in said, "it would end every Ray of the user on the node"
    assert not list(tmp_path.glob(".meddam-token-*")), "the token goes with the job"
