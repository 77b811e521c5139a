"""The Slurm script on this machine: Slurm's commands and Apptainer are stand-ins, Ray, token and job are real."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from ray_jobs.audit import audit
from ray_jobs.run_directory import RunDirectory
from tests.cluster.head import BIN, ROOT
from tests.cluster.manifests import check_command
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


COMMANDS = {
    # what would run in the container: `ray start` stays, the driver ends as it is told to
    "ray": 'env >"$CALLS.$1"; echo ray "$@" >>"$CALLS"; case "$*" in *--block*) exec sleep 60;; esac',
    "python": 'echo python "$@" >>"$CALLS"; until grep -q "^ray start" "$CALLS"; do :; done; exit "${ENDS_WITH:-0}"',
}


def submitted(tmp_path: Path, **settings: str) -> tuple[int, str]:
    """(exit code, calls) of the script where nothing is real; what it has set stands in files beside the calls."""
    stand_ins = tmp_path / "bin"
    stand_ins.mkdir(exist_ok=True)
    for name, body in (STAND_INS | COMMANDS).items():
        (stand_ins / name).write_text(f"#!/bin/bash\n{body}\n")
        (stand_ins / name).chmod(0o755)
    calls = tmp_path / "calls"
    calls.unlink(missing_ok=True)
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "SLURM_", "RAY_", "CUDA_"))}
    env = kept | {
        "PATH": f"{stand_ins}:/usr/bin:/bin", "CALLS": str(calls), "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "thishost", "SLURM_CPUS_PER_TASK": "48", "SLURM_GPUS_ON_NODE": "4",
        "MEDDAM_TOKEN_DIR": str(tmp_path),
    } | settings  # fmt: skip
    done = subprocess.run(
        ["bash", str(ROOT / "cluster/slurm/caption.sbatch"), "/data/set"], env=env, cwd=tmp_path, timeout=60,
        capture_output=True, check=False,
    )  # fmt: skip
    return done.returncode, calls.read_text()


def test_each_step_has_its_cores_its_gpus_and_what_the_container_needs(tmp_path: Path) -> None:
    passed = {"AWS_SESSION_TOKEN": "t", "AWS_ENDPOINT_URL_S3": "https://store", "AWS_DEFAULT_REGION": "r",
              "MEDDAM_RAY_LOGS": "1", "MEDDAM_SECRET": "s", "OPENAI_API_KEY": "k"}  # fmt: skip
    code, said = submitted(
        tmp_path, SLURM_TMPDIR="/scratch/7", AWS_CA_BUNDLE="/etc/ca.pem", CUDA_VISIBLE_DEVICES="2,3", **passed
    )
    assert code == 0
    assert f"--bind /data,/scratch/7,{tmp_path},/etc/ca.pem meddam.sif ray start --head" in said
    assert said.count("apptainer exec") == said.count(" --bind "), "each in the container"
    started = (tmp_path / "calls.start").read_text()
    for name, value in (passed | {"CUDA_VISIBLE_DEVICES": "2,3"}).items():
        assert f"APPTAINERENV_{name}={value}\n" in started
    assert "SRUN_CPUS_PER_TASK=48\n" in started and "--num-cpus=48" in said
    assert "python -m ray_jobs.caption /data/set --wait-for-gpus 4" in said


@pytest.mark.parametrize(
    ("job", "command"),
    [("doctor", "ray_jobs.doctor /data/set --wait-for-gpus 4"), ("retry", "ray_jobs.retry /data/set"),
     ("judge", "ray_jobs.judge /data/set")],
)  # fmt: skip
def test_every_command_can_be_the_job(tmp_path: Path, job: str, command: str) -> None:
    code, said = submitted(tmp_path, JOB=job)
    assert code == 0 and f"python -m {command}\n" in said, "and only those that know it are told to wait for GPUs"


def test_the_documentations_jobs_are_commands() -> None:
    page = (ROOT / "docs/cluster.md").read_text()
    typed = re.findall(r"^(?:JOB=(\w+) )?sbatch .*caption\.sbatch (.*)$", page, re.MULTILINE)
    assert {job or "caption" for job, _ in typed} >= {"caption", "doctor", "retry"}
    for job, words in typed:
        check_command([job or "caption", *shlex.split(words)])


def test_an_audit_that_misses_something_is_not_repeated(tmp_path: Path) -> None:
    code, said = submitted(tmp_path, JOB="audit", ENDS_WITH="4")
    assert code == 4 and "requeued" not in said


@pytest.mark.parametrize(
    ("code", "restarts", "requeued"),
    [(0, "0", False), (1, "0", True), (4, "2", True), (137, "2", True), (137, "3", False), (2, "0", False)],
)
def test_a_lost_driver_comes_back_three_times(tmp_path: Path, code: int, restarts: str, requeued: bool) -> None:
    ended, said = submitted(tmp_path, ENDS_WITH=str(code), SLURM_RESTART_COUNT=restarts)
    assert ended == code and ("requeued 7" in said) == requeued


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
