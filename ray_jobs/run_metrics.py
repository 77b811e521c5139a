"""A caption run's counters for Prometheus, exported by Ray on each node's metrics port under `ray_meddam_...`.

cluster/grafana/captions.json shows them. Counts and reason codes only: no ids, no paths.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

COUNTERS = {
    "meddam_images_total": "Images that came to their end, well or not.",
    "meddam_regions_total": "Regions described.",
    "meddam_tokens_total": "New tokens of captions.",
    "meddam_failed_images_total": "Images without a single caption.",
    "meddam_busy_seconds_total": "Seconds that captioners had work, over all of them.",
}
BY_REASON = "meddam_reasons_total"
GAUGES = {
    "meddam_captioners": "Captioners that have loaded their model.",
    "meddam_worker_deaths": "Worker processes that died at work in this session.",
    "meddam_quarantined_images": "Images given up because they ended their process.",
}


class RunMetrics:
    """Made within a Ray process."""

    def __init__(self) -> None:
        from ray.util.metrics import Counter, Gauge

        self._counters = {name: Counter(name, description=text) for name, text in COUNTERS.items()}
        self._reasons = Counter(BY_REASON, description="Captions without text, by reason.", tag_keys=("reason",))
        self._gauges = {name: Gauge(name, description=text) for name, text in GAUGES.items()}

    def add(
        self, batch: Mapping[str, Any], busy_s: float, num_captioners: int, num_deaths: int, num_quarantined: int
    ) -> None:
        """A captioner's report, and where the run stands after it."""
        values = {
            "meddam_images_total": batch["num_images"], "meddam_regions_total": batch["num_regions"],
            "meddam_tokens_total": batch["num_tokens"], "meddam_failed_images_total": batch["num_failed"],
            "meddam_busy_seconds_total": busy_s,
        }  # fmt: skip
        for name, value in values.items():
            if value > 0:  # Ray refuses to add nothing
                self._counters[name].inc(value)
        for reason, count in batch["by_reason"].items():
            self._reasons.inc(count, tags={"reason": reason})
        self._gauges["meddam_captioners"].set(num_captioners)
        self._gauges["meddam_worker_deaths"].set(num_deaths)
        self._gauges["meddam_quarantined_images"].set(num_quarantined)
