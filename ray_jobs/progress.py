"""Progress of a run on the driver's terminal, or as plain lines in a log, and the speed line at its end.

A terminal gets one line that is written over; anything else gets a line every few seconds, so that a job's log stays
readable. Nothing here decides anything: it only reads the monitor.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from ray_jobs.monitor import Totals

TERMINAL_EVERY_S = 0.5
LOG_EVERY_S = 10.0


@contextmanager
def progress(
    totals: Callable[[], Totals], num_images: int, num_regions: int, out: TextIO | None = None,
    also: Callable[[Totals], None] | None = None,
) -> Iterator[None]:  # fmt: skip
    """Shows progress while the block runs.

    Args:
        totals: reads the monitor; called from a daemon thread.
        num_images, num_regions: what is to be done in this session, not counting what earlier ones did.
        also: told the totals each time they are shown.
    """
    stream = out or sys.stderr
    stop = threading.Event()
    thread = threading.Thread(
        target=_show, args=(totals, num_images, num_regions, stream, stop, also), name="progress", daemon=True
    )
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(timeout=5)


def _show(
    totals: Callable[[], Totals], num_images: int, num_regions: int, stream: TextIO, stop: threading.Event,
    also: Callable[[Totals], None] | None = None,
) -> None:  # fmt: skip
    terminal = stream.isatty()
    started = time.monotonic()
    done = False
    while not done:
        done = stop.wait(TERMINAL_EVERY_S if terminal else LOG_EVERY_S)
        now = totals()
        line = progress_line(now, num_images, num_regions, time.monotonic() - started)
        stream.write(f"\r\033[K{line}" if terminal else f"{line}\n")
        stream.flush()
        if also is not None:
            also(now)
    if terminal:
        stream.write("\n")


def progress_line(totals: Totals, num_images: int, num_regions: int, elapsed_s: float) -> str:
    """Where a run stands, in one line."""
    if totals.first_report_s is None:
        return f"loading the model ({elapsed_s:.0f} s)"
    rate = totals.num_regions / max(totals.working_s, 1e-6)
    share = totals.num_images / num_images if num_images else 1.0
    expected = max(num_regions, totals.num_regions / share if share else 0)  # detected ones are in no shard's count
    left = (expected - totals.num_regions) / rate if rate else 0.0
    parts = [
        f"{share:4.0%} {totals.num_images:,}/{num_images:,} images", f"{totals.num_regions:,} regions",
        f"{rate:.1f} regions/s", f"{duration(left)} left" if rate and share < 1 else "",
        f"{totals.num_failed:,} failed" if totals.num_failed else "",
        f"{totals.num_deaths} worker deaths" if totals.num_deaths else "",
    ]  # fmt: skip
    return " · ".join(p for p in parts if p)


def duration(seconds: float) -> str:
    """Hours, minutes and seconds, the two that matter."""
    whole = int(seconds + 0.5)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def speed_figures(totals: Totals) -> dict[str, float]:
    """Rates and the captioners' busy share, from their start to the last caption; {} where nothing was captioned."""
    if totals.first_report_s is None or totals.last_report_s is None or not totals.num_regions:
        return {}
    wall_s = max(totals.last_report_s - totals.first_report_s, 1e-6)
    busy = sum(totals.busy_s.values()) / (wall_s * max(1, len(totals.busy_s)))
    return {
        "captioning_s": round(wall_s, 3), "regions_per_s": round(totals.num_regions / wall_s, 3),
        "tokens_per_s": round(totals.num_tokens / wall_s, 2), "busy_share": round(min(busy, 1.0), 4),
    }  # fmt: skip


def speed_line(totals: Totals) -> str:
    """The figures as one line."""
    if not (f := speed_figures(totals)):
        return "speed: nothing was captioned in this session"
    return (
        f"speed: {f['regions_per_s']:.2f} regions/s · {f['tokens_per_s']:.1f} tokens/s · "
        f"captioners busy {f['busy_share']:.0%} of {duration(f['captioning_s'])}"
    )
