"""Progress that outlives the driver's terminal: progress.json in the run directory, for `meddam status` from anywhere.

    with ProgressFile(directory, attempt) as shown:
        shown.phase("captioning", num_images=..., num_regions=...)
        shown.update(totals)                       # from the progress thread, every few seconds

Invariants:
- nothing depends on it: it is written past the run's own files, and a bucket that refuses it for a moment costs a line
  in the log, no more;
- it holds counts and reason codes, never rows.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Literal

from ray_jobs.monitor import Totals
from ray_jobs.progress import speed_figures
from ray_jobs.run_directory import RunDirectory
from ray_jobs.summary import Summary

logger = logging.getLogger(__name__)

PROGRESS = "progress.json"
EVERY_S = 10.0
Phase = Literal["starting", "captioning", "publishing", "complete", "stopped", "incomplete", "interrupted", "failed"]
AT_WORK = ("starting", "captioning", "publishing")


class ProgressFile:
    """What a driver says about its work. A driver that ends badly says that too, if it still can.

    Args:
        directory: the run.
        attempt: of the driver's work.
    """

    def __init__(self, directory: RunDirectory, attempt: int) -> None:
        self._directory = directory
        self._lock = threading.Lock()
        self._written_s = float("-inf")
        self._said: dict[str, Any] = {
            "job": "caption", "attempt": attempt, "begun_at": _now(), "phase": "starting", "every_s": EVERY_S,
            "driver": f"process {os.getpid()} on {socket.gethostname()}",
        }  # fmt: skip

    def __enter__(self) -> ProgressFile:
        self._write()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            phase: Phase = "interrupted" if issubclass(kind, KeyboardInterrupt) else "failed"
            self._say(phase=phase, why=kind.__name__)

    def phase(self, phase: Phase, **facts: Any) -> None:
        """A further phase; facts are kept until others replace them."""
        self._say(phase=phase, **facts)

    def update(self, totals: Totals) -> None:
        """The monitor's totals, written if the last time is long enough ago."""
        if time.monotonic() - self._written_s >= EVERY_S:
            self._say(
                num_images_done=totals.num_images, num_regions_done=totals.num_regions, num_failed=totals.num_failed,
                by_reason=dict(totals.by_reason), worker_deaths=totals.num_deaths, **speed_figures(totals),
            )  # fmt: skip

    def finish(self, summary: Summary, totals: Totals) -> None:
        """How the session ended."""
        self._written_s = float("-inf")
        self.update(totals)
        self._say(phase=summary.state, why=summary.why, exit_code=summary.exit_code)

    def _say(self, **facts: Any) -> None:
        with self._lock:
            self._said |= facts
            self._write()

    def _write(self) -> None:
        self._written_s = time.monotonic()
        try:
            self._directory.write_json(self._said | {"updated_at": _now()}, PROGRESS)
        except OSError as error:
            logger.warning("progress.json was not written (%s); the run goes on", type(error).__name__)


def _now() -> str:
    return datetime.now(UTC).isoformat(sep=" ", timespec="seconds")
