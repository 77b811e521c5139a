"""A wall clock that is set, in mid-run, for the processes of one run and nobody else: Ray's, ours, all of them.

    with jumping_clock(folder) as clock:
        subprocess.Popen(command, env=os.environ | clock.environment)
        clock.set(-3600)                                   # an hour behind, from now on

A small library (clock.c) is loaded before libc; monotonic clocks are left alone, as in life.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.faults.processes import descendants

SOURCE = Path(__file__).with_name("clock.c")
BYTES = 8


@dataclass(frozen=True, slots=True)
class Clock:
    """The clock of some processes."""

    environment: dict[str, str]
    """What makes a process follow it."""
    shared: mmap.mmap

    def set(self, seconds: int) -> None:
        """So far ahead of the true time, or behind it."""
        self.shared[:BYTES] = seconds.to_bytes(BYTES, "little", signed=True)

    def followers(self, root: int) -> list[int]:
        """The processes at and below `root` that have the library loaded."""
        return [pid for pid in (root, *descendants(root)) if _follows(pid)]


@contextlib.contextmanager
def jumping_clock(folder: Path) -> Iterator[Clock]:
    """A clock that shows the true time until it is set. Needs a C compiler; raises CalledProcessError."""
    library, offset = folder / "clock.so", folder / "clock.offset"
    command = ["cc", "-shared", "-fPIC", "-O2", "-Wall", "-Werror", "-o", str(library), str(SOURCE), "-ldl"]
    subprocess.run(command, check=True)
    offset.write_bytes(bytes(BYTES))
    with offset.open("r+b") as file, mmap.mmap(file.fileno(), BYTES) as shared:
        preload = ":".join(filter(None, [os.environ.get("LD_PRELOAD"), str(library)]))
        yield Clock({"LD_PRELOAD": preload, "MEDDAM_FAULTS_CLOCK": str(offset)}, shared)


def _follows(pid: int) -> bool:
    try:
        return "clock.so" in Path(f"/proc/{pid}/maps").read_text()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return False
