"""A Ray head of a test's own, as a cluster's is started: token authentication, dashboard on loopback, own ports.

    with started_head(tmp_path) as head:
        head.ray("job", "submit", "--", "python", "-c", "print(1)")

It is ended by its processes: `ray stop` would end every Ray on the machine.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
START_S = 120.0
SUBMIT = ("job", "submit", "--working-dir", ".", "--runtime-env", "runtime_env.yaml")
AGENTS = ("dashboard-agent-listen", "dashboard-agent-grpc", "metrics-export", "runtime-env-agent")


@dataclass(frozen=True, kw_only=True)
class Head:
    """A head at work."""

    url: str
    metrics_url: str
    address: str
    """Of the cluster itself, for nodes and drivers."""
    env: dict[str, str]
    """Of a client that has the token."""
    checkout: Path
    """A copy of what a job carries: a working directory must not change while it is sent."""
    logs: Path
    """Where Ray keeps the logs of everything on this node, jobs' drivers among them."""

    def ray(self, *words: str, token: bool = True) -> subprocess.CompletedProcess[str]:
        """Runs `ray WORDS` in the checkout."""
        env = self.env if token else {k: v for k, v in self.env.items() if not k.startswith("RAY_AUTH_TOKEN")}
        if not token:
            env["RAY_AUTH_TOKEN_PATH"] = "/nonexistent"
        command = [str(BIN / "ray"), *words]
        return subprocess.run(
            command, cwd=self.checkout, env=env, capture_output=True, text=True, check=False, timeout=300
        )

    def job(self, module: str, *words: str) -> subprocess.CompletedProcess[str]:
        """Submits `python -m MODULE WORDS` with this checkout as its working directory, and waits for its end."""
        return self.ray(*SUBMIT, "--", "python", "-m", module, *words)

    def get(self, path: str, token: str | None) -> int:
        """The status of a GET request to the dashboard's API."""
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        try:
            with urllib.request.urlopen(urllib.request.Request(self.url + path, headers=headers), timeout=30) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code


@contextlib.contextmanager
def joined_node(head: Head, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A second node of the cluster, with two CPUs; ended with the block if it still lives."""
    flags = [f"--{n}-port={p}" for n, p in zip(AGENTS, free_ports(4), strict=True)]
    command = [
        str(BIN / "ray"), "start", "--block", f"--address={head.address}", "--num-cpus=2", *flags,
        "--node-ip-address=127.0.0.1", "--object-store-memory=150000000", "--disable-usage-stats",
    ]  # fmt: skip
    env = {name: value for name, value in head.env.items() if name != "RAY_ADDRESS"}
    with log.open("wb") as stream:
        process = subprocess.Popen(command, env=env, stdout=stream, stderr=stream, start_new_session=True)
        try:
            yield process
        finally:
            kill_tree(process)


def kill_tree(process: subprocess.Popen[bytes]) -> None:
    """kill -9 of a process and all below it."""
    if process.poll() is None:
        for pid in [*children(process.pid), process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()


def free_ports(num: int) -> list[int]:
    """Ports that nobody listens on now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(num)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]


@contextlib.contextmanager
def started_head(folder: Path, *flags: str, **extra: str) -> Iterator[Head]:
    """Starts a head with two CPUs, and ends it; `extra` goes into its environment and its jobs', `flags` to it."""
    token = folder / "token"
    token.write_text("a-token-of-this-test-" + os.urandom(8).hex())
    port, dashboard, client, *agents = free_ports(7)
    agent_ports = [f"--{name}-port={number}" for name, number in zip(AGENTS, agents, strict=True)]
    env = {
        **{k: v for k, v in os.environ.items() if not k.startswith("RAY_ADDRESS")}, **extra,
        "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "PATH": f"{BIN}:{os.environ['PATH']}",
        "RAY_BACKEND_LOG_LEVEL": "error",
    }  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="mrh", dir="/tmp") as scratch:  # a socket's path has 107 characters at most
        command = [
            str(BIN / "ray"), "start", "--head", "--block", "--num-cpus=2", "--node-ip-address=127.0.0.1",
            f"--port={port}", f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1",
            f"--ray-client-server-port={client}", f"--temp-dir={scratch}", "--object-store-memory=150000000",
            "--disable-usage-stats", *agent_ports, *flags,
        ]  # fmt: skip
        log = (folder / "head.log").open("wb")
        process = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True, cwd=folder)
        checkout = Path(scratch) / "checkout"
        for name in ("meddam_core", "qa_library", "ray_jobs"):
            shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "runtime_env.yaml", checkout)
        head = Head(
            metrics_url=f"http://127.0.0.1:{agents[2]}/metrics",
            address=f"127.0.0.1:{port}",
            checkout=checkout,
            logs=Path(scratch) / "session_latest" / "logs",
            url=f"http://127.0.0.1:{dashboard}",
            env=env | {"RAY_ADDRESS": f"http://127.0.0.1:{dashboard}"},
        )
        try:
            _wait(head, process, token.read_text(), folder / "head.log")
            yield head
        finally:
            kill_tree(process)


def children(pid: int) -> list[int]:
    """All processes below `pid`."""
    import psutil

    return [child.pid for child in psutil.Process(pid).children(recursive=True)]


def _wait(head: Head, process: subprocess.Popen[bytes], token: str, log: Path) -> None:
    deadline = time.monotonic() + START_S
    while True:
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        try:
            if head.get("/api/jobs/", token) == 200:
                return
        except OSError:
            pass
        time.sleep(0.2)
