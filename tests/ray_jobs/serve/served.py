"""`meddam serve` as a process of its own, with its own Ray, for tests and the fault command."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import yaml

from tests.ray_jobs.serve.conftest import MODEL

START_LIMIT_S = 500
END_LIMIT_S = 60


class Served:
    """Starts the command and waits for its address; `settings` are those of its configuration file."""

    def __init__(self, folder: Path, **settings: object) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._log = folder / "serve.log"
        config = folder / "serve.yaml"
        config.write_text(
            yaml.safe_dump({"model": MODEL, "port": self.port, "num_threads": 1, "num_cpus": 2, **settings})
        )
        command = [sys.executable, "-m", "ray_jobs.cli", "serve", "--config", str(config)]
        with self._log.open("w") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        deadline = time.monotonic() + START_LIMIT_S
        while "serving on" not in self.log():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.end()
                raise AssertionError(f"the server did not start:\n{self.log()[-3000:]}")
            time.sleep(0.1)

    def log(self) -> str:
        """What the command has printed."""
        return self._log.read_text()

    def replicas(self) -> list[int]:
        """Process ids of the replicas of this server: the parents of engines. Ray rewrites its own processes' names."""
        return [int(_stat(engine)[1]) for engine in self.engines()]

    def engines(self) -> list[int]:
        """Process ids of the replicas' engines."""
        return [pid for pid, name in _descendants(self.process.pid) if "meddam_core.engines.apart" in name]

    def end(self) -> int:
        """Ctrl-C, and the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(END_LIMIT_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
        return self.process.wait()


def free_port() -> int:
    """A port of loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _descendants(root: int) -> list[tuple[int, str]]:
    """(pid, command line) of every process below `root`."""
    parents: dict[int, int] = {}
    names: dict[int, str] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int(_stat(int(entry.name))[1])
                names[int(entry.name)] = (entry / "cmdline").read_text().replace("\0", " ").strip()
            except OSError:
                continue  # it ended meanwhile
    found = []
    for pid, name in names.items():
        above = pid
        while above in parents and above != root:
            above = parents[above]
        if above == root and pid != root:
            found.append((pid, name))
    return found


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat after the name: state, parent, ..."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
