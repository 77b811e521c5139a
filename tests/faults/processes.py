"""Finding, killing and weighing the processes of a caption job, and of that job only: the driver's own descendants."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from types import TracebackType
from typing import Literal

Victim = Literal["driver", "captioner", "extractor"]

_TITLES = {"captioner": "DescribeRegions", "extractor": "ExtractRegions"}


def descendants(root: int) -> list[int]:
    """Process ids below `root`, from /proc."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except (FileNotFoundError, ProcessLookupError):
                continue  # it ended while we looked
            children.setdefault(parent, []).append(int(entry.name))
    found, queue = [], [root]
    while queue:
        below = children.get(queue.pop(), [])
        found += below
        queue += below
    return found


def title(pid: int) -> str:
    """A process's command line; Ray writes an actor's name and method there."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return ""


def victims(driver: int, victim: Victim, at_work: bool = False) -> list[int]:
    """The processes of one kind that a driver has running; with `at_work` only actors that have rows in hand."""
    if victim == "driver":
        return [driver]
    titles = {pid: title(pid) for pid in descendants(driver)}
    return [pid for pid, text in titles.items() if _TITLES[victim] in text and (not at_work or ".submit" in text)]


def kill(pid: int) -> None:
    """kill -9, of a process that may have ended already."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


class PeakMemory:
    """The most memory that a process and all below it had at one time, in PSS, which counts a shared page once.

        with PeakMemory(pid) as memory: ...
        print(memory.peak_mib)

    It looks every `every_s` from a thread: a peak between two looks is missed.
    """

    def __init__(self, root: int, every_s: float = 1.0) -> None:
        self.peak_mib = 0.0
        self._root, self._every_s = root, every_s
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="memory", daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(self._every_s):
            kib = sum(_pss_kib(pid) for pid in (self._root, *descendants(self._root)))
            self.peak_mib = max(self.peak_mib, kib / 1024)


def _pss_kib(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0)
