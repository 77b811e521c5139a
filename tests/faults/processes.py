"""Finding and killing the processes of a caption job, and of that job only: the driver's own descendants."""

from __future__ import annotations

import os
import signal
from pathlib import Path
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
