"""What the actors of one run tell its driver, in one small actor: progress, faults, and whether to stop.

- Meter: images, regions, tokens, seconds the captioners were busy.
- Circuit breaker: a canary batch first, then a share of failed rows; so that a broken model or driver does not fail
  ten million rows and exit with 0. An engine that must stop opens it too, before its rows fail for an outage.
- Ledger of deaths: Ray retries a row that kills its process without end (54 deaths in a minute). Work that was begun
  and never ended is remembered; after two deaths a block is worked through row by row, and a row that twice dies alone
  is quarantined: it becomes a failed row, and the job goes on.

`RunMonitor` is plain Python; `start_monitor` makes it an actor.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from meddam_core.records import Reason
from ray_jobs.run_metrics import RunMetrics
from ray_jobs.session import beside_the_driver

Stage = Literal["extract", "describe"]

MAX_BATCH_DEATHS = 2
"""Deaths after which the rows of a block are tried one at a time."""
MAX_LONE_DEATHS = 2
"""Deaths of a row on its own after which it is given up; one may be the node's fault."""


class RunStopped(RuntimeError):
    """Raised in an actor to end the run: the circuit breaker is open, or an engine must stop."""


class Orders(NamedTuple):
    """What to do with the rows just begun."""

    one_by_one: bool
    quarantined: list[int]
    """Image ids to fail without touching them."""


@dataclass(slots=True)
class Totals:
    """Sums over a run so far."""

    num_images: int = 0
    num_failed: int = 0
    """Images without a single caption."""
    num_skipped: int = 0
    """Images with nothing to do: they say nothing about the model's health."""
    num_regions: int = 0
    num_tokens: int = 0
    by_reason: Counter[str] = field(default_factory=Counter)
    busy_s: dict[str, float] = field(default_factory=dict)
    """Seconds each captioner had work, by captioner."""
    first_report_s: float | None = None
    last_report_s: float | None = None
    """By the monotonic clock of the monitor's node, which no other node shares."""
    working_s: float = 0.0
    """From the first report to now."""
    stop: str | None = None
    """Why the breaker opened; None while it is closed."""
    num_deaths: int = 0
    quarantined: list[int] = field(default_factory=list)


class RunMonitor:
    """See the module's text. One thread calls it at a time (a Ray actor's default).

    Args:
        max_failed_share: of the images, above which the run stops.
        canary_images: the first so many images; when all of them fail the run stops at once.
        min_images: the share counts only from so many images on.
    """

    def __init__(self, max_failed_share: float = 0.2, canary_images: int = 8, min_images: int = 100) -> None:
        self._max_failed_share = max_failed_share
        self._canary_images = canary_images
        self._min_images = min_images
        self._totals = Totals()
        self._open: Counter[tuple[Stage, int]] = Counter()
        self._alone: Counter[tuple[Stage, int]] = Counter()
        self._quarantined: set[tuple[Stage, int]] = set()

    def begin(self, stage: Stage, images: Sequence[int], alone: bool = False) -> Orders:
        """Notes that work on `images` starts, and says how to go about it."""
        book = self._alone if alone else self._open
        deaths = [book[stage, i] for i in images]
        self._totals.num_deaths += max(deaths, default=0) > 0
        if alone:
            self._quarantined.update((stage, i) for i in images if self._alone[stage, i] >= MAX_LONE_DEATHS)
        self._totals.quarantined = sorted({i for _, i in self._quarantined})
        given_up = [i for i in images if (stage, i) in self._quarantined]
        book.update((stage, i) for i in images if i not in given_up)
        return Orders(one_by_one=not alone and max(deaths, default=0) >= MAX_BATCH_DEATHS, quarantined=given_up)

    def end(self, stage: Stage, images: Iterable[int]) -> None:
        """Notes that work on `images` came to its end, well or badly, in a living process."""
        for i in images:
            self._open.pop((stage, i), None)
            self._alone.pop((stage, i), None)

    def report(
        self, captioner: str, *, num_images: int, num_failed: int, num_skipped: int = 0, num_regions: int,
        num_tokens: int, by_reason: dict[str, int], busy_s: float, first: bool,
    ) -> str | None:  # fmt: skip
        """Adds a batch to the totals. Returns why the run must stop, or None. `first` starts a captioner's clock."""
        t = self._totals
        now = time.monotonic()
        if first and captioner not in t.busy_s:
            t.busy_s[captioner] = 0.0
            t.first_report_s = now if t.first_report_s is None else t.first_report_s
        t.num_images += num_images
        t.num_failed += num_failed
        t.num_skipped += num_skipped
        t.num_regions += num_regions
        t.num_tokens += num_tokens
        t.by_reason.update(by_reason)
        t.busy_s[captioner] = busy_s
        t.last_report_s = now
        t.stop = t.stop or self._verdict()
        return t.stop

    def stop(self, why: str) -> str:
        """Opens the breaker for a reason that no row shows. Returns why the run stops: the first reason stays."""
        self._totals.stop = self._totals.stop or why
        return self._totals.stop

    def totals(self) -> Totals:
        """A view of the run so far."""
        t = self._totals
        t.working_s = 0.0 if t.first_report_s is None else time.monotonic() - t.first_report_s
        return t

    def _verdict(self) -> str | None:
        failed = self._totals.num_failed
        num = self._totals.num_images - self._totals.num_skipped
        worst = [(r, n) for r, n in self._totals.by_reason.most_common() if r != Reason.NO_REGIONS]
        reasons = ", ".join(f"{n} {r}" for r, n in worst[:3])
        if failed == num and num >= self._canary_images:
            return f"all of the first {num} images failed ({reasons})"
        if num >= self._min_images and failed > self._max_failed_share * num:
            return f"{failed} of {num} images failed ({reasons}), more than the {self._max_failed_share:.0%} allowed"
        return None


class _MeasuredMonitor(RunMonitor):
    """The monitor with its totals as Prometheus metrics: Ray puts `ray_` before their names and exports them."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._metrics = RunMetrics()

    def report(self, captioner: str, **batch: Any) -> str | None:
        busy_before_s = self._totals.busy_s.get(captioner, 0.0)
        stop = super().report(captioner, **batch)
        t = self._totals
        gauges = (len(t.busy_s), t.num_deaths, len(t.quarantined))
        self._metrics.add(batch, max(0.0, t.busy_s[captioner] - busy_before_s), *gauges)
        return stop


def start_monitor(max_failed_share: float, canary_images: int, min_images: int) -> Any:
    """The monitor as a Ray actor that lives as long as the driver, on its node, and takes no CPU."""
    import ray

    return (
        ray.remote(_MeasuredMonitor)
        .options(num_cpus=0, max_restarts=-1, max_task_retries=-1, scheduling_strategy=beside_the_driver())
        .remote(max_failed_share, canary_images, min_images)
    )
