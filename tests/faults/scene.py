"""What the cases of the fault suite share: one data set, the captions of a run that nobody disturbed, and its time."""

from __future__ import annotations

import random
import subprocess
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from meddam_core.records import image_id
from tests.faults.engines import POISON
from tests.faults.kill_and_resume import BUCKET, Job, captions
from tests.faults.processes import Victim, kill, victims
from tests.ray_jobs.made_shards import SIDE_PX, make_shards

POISONED_IMAGE = image_id(1, 4)
"""Uniformly grey: harmless to all engines but those that break on it."""
DEADLINE_S = 900.0
POLL_S = 0.05
"""A look costs a walk through /proc or a listing on S3, which the jobs beside it pay for."""
WELL_DISTURBED = (-9, 1, 2, 4, 137)
"""Exit codes of a job that a fault may end; it must then resume. 0 must be right, 3 and 5 are wrong."""


class Skipped(Exception):
    """This machine cannot stage the fault; the text says why."""


@dataclass(slots=True, kw_only=True)
class Told:
    """How a case went."""

    what: str
    out: str
    """The run directory, for the audit."""
    seconds: float
    """From the first start of the job to its good end."""
    undisturbed_s: float
    failed: dict[int, str] = field(default_factory=dict)
    """Images that must have failed, and why; all others must not."""


@dataclass(slots=True, kw_only=True)
class Scene:
    """The data, its undisturbed runs by place (disk, s3, films, cluster, head), and the round that is on.

    The data is the same in all rounds, and so are the undisturbed runs, each made when a case first asks for it. Cases
    may run at once, each in a thread of its own.
    """

    folder: Path
    s3_endpoint: str
    seed: int = 0
    num_images: int = 30
    round: int = 0
    environments: dict[str, dict[str, str]] = field(default_factory=dict)
    """What a job of a place needs in its environment."""
    _shards: dict[str, str] = field(default_factory=dict)
    _spans_s: dict[str, float] = field(default_factory=dict)
    _tables: dict[str, pa.Table] = field(default_factory=dict)
    _making: defaultdict[str, threading.RLock] = field(default_factory=lambda: defaultdict(threading.RLock))
    """By place: who first asks for its data or its undisturbed run makes them, others wait."""

    def random(self, name: str) -> random.Random:
        """What a case draws from in this round."""
        return random.Random(f"{self.seed} {self.round} {name}")

    def root(self, place: str) -> str:
        """Where a place's data and runs lie."""
        return f"{BUCKET}/{self.folder.name}" if place == "s3" else str(self.folder / place)

    def out(self, place: str, name: str) -> str:
        """The run directory of a case in this round."""
        return f"{self.root(place)}/{name}-{self.round}"

    def head_folder(self, name: str) -> Path:
        """Where a case's own Ray head keeps its token and its log."""
        folder = self.folder / f"{name}-head"
        folder.mkdir(exist_ok=True)
        return folder

    def job(self, place: str, *options: str, engine: str = "torch") -> Job:
        """The job over the place's shards, which are made at the first call."""
        with self._making[place]:
            if place not in self._shards:
                self._shards[place] = make_shards(f"{self.root(place)}/set", 2, self.num_images, pixels=_pixels)
        return Job(self._shards[place], ["--engine", engine, *options])

    def undisturbed_s(self, place: str, job: Job | None = None) -> float:
        """Seconds that the place's job takes when it is left alone; found out at the first call."""
        with self._making[place]:
            if place not in self._spans_s:
                out = f"{self.root(place)}/undisturbed"
                self.note(place, out, self.to_the_end(job or self.job(place), out, env=self.environments.get(place)))
        return self._spans_s[place]

    def note(self, place: str, out: str, seconds: float) -> None:
        """An undisturbed run of the place, made in whatever way."""
        self._spans_s[place], self._tables[place] = seconds, captions(out)

    def is_noted(self, place: str) -> bool:
        """Whether the place's undisturbed run has been made."""
        return place in self._spans_s

    def undisturbed(self, out: str) -> pa.Table:
        """The captions of the undisturbed run in the place where `out` lies."""
        return next(table for place, table in self._tables.items() if out.startswith(self.root(place) + "/"))

    def to_the_end(
        self, job: Job, out: str, *, env: Mapping[str, str] | None = None, max_starts: int = 1,
        during: Callable[[subprocess.Popen[bytes], int], None] = lambda process, start: None,
    ) -> float:  # fmt: skip
        """Seconds until the job has ended well, started up to `max_starts` times.

        `during(process, start)` is called again and again while a start runs. Raises AssertionError with the job's log.
        """
        log = self.log(out)
        begun = time.monotonic()
        for start in range(max_starts):
            process = job.start(out, log, env)
            try:
                while process.poll() is None:
                    assert time.monotonic() - begun < DEADLINE_S, f"not done in time\n{log.read_text()[-3000:]}"
                    during(process, start)
                    time.sleep(POLL_S)
            finally:
                process.kill()
                process.wait()
            if process.returncode == 0:
                return time.monotonic() - begun
            assert process.returncode in WELL_DISTURBED, f"exit {process.returncode}\n{log.read_text()[-3000:]}"
        raise AssertionError(f"no good end in {max_starts} starts\n{log.read_text()[-3000:]}")

    def log(self, out: str) -> Path:
        """Where the job's output goes."""
        return self.folder / (out.rpartition("/")[2] + ".log")


@dataclass(slots=True)
class Killer:
    """A `during` that kills one process of a kind as soon as a moment has come."""

    victim: Victim
    moment: Callable[[], bool]
    at_work: bool = False
    killed: int = 0

    def __call__(self, process: subprocess.Popen[bytes], start: int) -> None:
        if not self.killed and self.moment() and (found := victims(process.pid, self.victim, self.at_work)):
            kill(found[0])
            self.killed = found[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A fault."""

    name: str
    run: Callable[[Scene], Told]
    short: bool = False
    """Part of the short form."""


def _pixels(image: int) -> NDArray[np.uint8]:
    if image == POISONED_IMAGE:
        return np.full((SIDE_PX, SIDE_PX, 3), POISON, np.uint8)
    tile = np.random.default_rng(image).integers(0, 255, (SIDE_PX // 8, SIDE_PX // 8, 3), np.uint8)
    return np.kron(tile, np.ones((8, 8, 1), np.uint8))
