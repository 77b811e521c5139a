"""Faults of a cluster: a node that is lost, a submitted job whose driver dies.

Each has a head of its own and more raylets on this machine, joined as a cluster's nodes are.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from ray_jobs.audit import audit
from ray_jobs.run_directory import RunDirectory
from tests.cluster.head import ROOT, Head, joined_node, kill_tree, started_head
from tests.faults.kill_and_resume import MODEL, committed
from tests.faults.processes import descendants, title
from tests.faults.scene import DEADLINE_S, POLL_S, Case, Scene, Told


@contextlib.contextmanager
def _two_nodes(scene: Scene) -> Iterator[tuple[Head, list[subprocess.Popen[bytes]]]]:
    """A head that holds no work, as a cluster's head should not, and two nodes with two CPUs each."""
    folder = scene.head_folder("node")
    with contextlib.ExitStack() as stack:
        head = stack.enter_context(started_head(folder, "--num-cpus=0", OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT)))
        nodes: list[subprocess.Popen[bytes]] = []
        for number in (1, 2):  # one after the other: two raylets that start at once take the same socket
            log = folder / f"node-{number}.log"
            nodes.append(stack.enter_context(joined_node(head, log)))
            deadline = time.monotonic() + DEADLINE_S
            while not any("raylet_socket_name" in text for text in _workers(nodes[-1])):
                assert nodes[-1].poll() is None and time.monotonic() < deadline, log.read_text()
                time.sleep(POLL_S)
        yield head, nodes


def _workers(node: subprocess.Popen[bytes]) -> list[str]:
    """What a node's processes are called, its raylet among them."""
    return [title(pid) for pid in descendants(node.pid)]


def _node(scene: Scene) -> Told:
    """A node that holds a captioner is lost: its raylet and all its workers are killed."""
    out = scene.out("cluster", "node")
    with _two_nodes(scene) as (head, nodes):
        scene.environments["cluster"] = {**head.env, "RAY_ADDRESS": head.address}
        job = scene.job("cluster", "--num-captioners", "2", engine="tests.faults.torch_engines:PatientTorch")
        undisturbed_s = scene.undisturbed_s("cluster", job)
        is_begun = committed(out)
        lost: list[subprocess.Popen[bytes]] = []

        def lose(process: subprocess.Popen[bytes], start: int) -> None:
            for node in nodes if not lost and is_begun() else ():
                if any("DescribeRegions" in text for text in _workers(node)):
                    lost.append(node)
                    return kill_tree(node)

        seconds = scene.to_the_end(job, out, env=scene.environments["cluster"], during=lose)
    assert lost, "no node was lost: the job ended before"
    return Told(
        what="one of two nodes lost: kill -9 of its raylet and workers, after a commit", out=out, seconds=seconds,
        undisturbed_s=undisturbed_s,
    )  # fmt: skip


def _submitted(scene: Scene) -> Told:
    """The driver of a submitted job is killed on its head; the job is submitted again."""
    out, calm = scene.out("head", "submitted"), f"{scene.root('head')}/undisturbed"
    shards = scene.job("head").shards
    words = [
        "python", "-m", "ray_jobs.caption", shards, "--model", MODEL, "--engine", "torch", "--prompt", "dam-default",
        "--max-new-tokens", "16", "--images-per-file", "10", "--images-per-batch", "4", "--out",
    ]  # fmt: skip
    submit = ("job", "submit", "--working-dir", ".", "--runtime-env", "runtime_env.yaml")
    with started_head(scene.head_folder("submitted"), OMP_NUM_THREADS="1") as head:
        if not scene.is_noted("head"):
            begun = time.monotonic()
            first = head.ray(*submit, "--", *words, calm)
            assert first.returncode == 0, first.stdout[-3000:]
            scene.note("head", calm, time.monotonic() - begun)
        begun, is_begun = time.monotonic(), committed(out)
        assert head.ray(*submit, "--no-wait", "--submission-id", "killed", "--", *words, out).returncode == 0
        while not (is_begun() and (drivers := _drivers(out))):
            assert time.monotonic() < begun + DEADLINE_S, head.ray("job", "logs", "killed").stdout[-3000:]
            time.sleep(POLL_S)
        os.kill(drivers[0], signal.SIGKILL)
        while "FAILED" not in head.ray("job", "status", "killed").stdout.upper():
            assert time.monotonic() < begun + DEADLINE_S
        assert not audit(RunDirectory(out)).published
        again = head.ray(*submit, "--", *words, out)
        assert again.returncode == 0, again.stdout[-3000:]
        seconds = time.monotonic() - begun
    return Told(
        what="kill -9 of a submitted job's driver on its head; submitted again", out=out, seconds=seconds,
        undisturbed_s=scene.undisturbed_s("head"),
    )  # fmt: skip


def _drivers(out: str) -> list[int]:
    """The Python processes that run the job which writes to `out`."""
    pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    return [pid for pid in pids if (text := title(pid)).startswith("python -m ray_jobs.caption") and out in text]


CASES = (
    Case(name="node", run=_node),
    Case(name="submitted", run=_submitted),
)
