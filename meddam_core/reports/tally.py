"""Counts over a run's published captions, in bounded memory whatever the run's size.

    tally = CaptionTally()
    for path in caption_files:
        tally.add(pq.read_table(path, columns=list(TALLY_COLUMNS)))

Invariant: every figure of a report is a sum over rows that were added here; nothing is estimated.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

TALLY_COLUMNS = (
    "region_id", "image_id", "status", "reason", "num_tokens", "mean_logprob", "dataset", "modality", "licence",
    "recipe",
)  # fmt: skip
LOGPROB_BIN = 0.05
"""Width of a bin of the mean log-probability histogram, in nats."""


@dataclass(slots=True)
class CaptionTally:
    """Counters of everything a run report shows. Keys are plain values; sizes are bounded by what can occur."""

    num_captions: int = 0
    num_regions: int = 0
    num_images: int = 0
    status: Counter[str] = field(default_factory=Counter)
    """Captions by status."""
    reasons: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Captions by (status, reason), where there is a reason."""
    tokens: Counter[int] = field(default_factory=Counter)
    """Captions by number of new tokens; only those with text (ok, truncated)."""
    logprob_bins: Counter[int] = field(default_factory=Counter)
    """Captions by floor(mean_logprob / LOGPROB_BIN)."""
    regions_per_image: Counter[int] = field(default_factory=Counter)
    """Images by number of their regions."""
    groups: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    """Captions by (dataset, modality, status)."""
    licences: Counter[str] = field(default_factory=Counter)
    recipes: Counter[str] = field(default_factory=Counter)

    def add(self, captions: pa.Table) -> None:
        """Counts a table of the Caption schema that holds all captions of its images, as a published file does."""
        statuses = captions["status"].to_pylist()
        self.num_captions += len(statuses)
        self.status.update(statuses)
        pairs = zip(statuses, captions["reason"].to_pylist(), strict=True)
        self.reasons.update((s, r) for s, r in pairs if r is not None)
        self.groups.update(
            zip(captions["dataset"].to_pylist(), captions["modality"].to_pylist(), statuses, strict=True)
        )
        self.licences.update(captions["licence"].to_pylist())
        self.recipes.update(captions["recipe"].to_pylist())
        self._add_numbers(captions, np.isin(np.array(statuses, dtype=object), ("ok", "truncated")))
        self._add_images(captions)

    def _add_numbers(self, captions: pa.Table, has_text: NDArray[np.bool_]) -> None:
        self.tokens.update(_counted(captions["num_tokens"].to_numpy()[has_text]))
        logprobs = captions["mean_logprob"].to_numpy().astype(np.float64)
        self.logprob_bins.update(_counted(np.floor(logprobs[has_text & np.isfinite(logprobs)] / LOGPROB_BIN)))

    def _add_images(self, captions: pa.Table) -> None:
        pairs = np.stack([captions["image_id"].to_numpy(), captions["region_id"].to_numpy()], axis=1)
        _, per_image = np.unique(np.unique(pairs, axis=0)[:, 0], return_counts=True)
        self.num_images += len(per_image)
        self.num_regions += int(per_image.sum())
        self.regions_per_image.update(_counted(per_image))

    @property
    def num_tokens(self) -> int:
        """New tokens over all captions with text."""
        return sum(n * count for n, count in self.tokens.items())


def _counted(values: NDArray[Any]) -> Counter[int]:
    numbers, counts = np.unique(values.astype(np.int64), return_counts=True)
    return Counter(dict(zip(numbers.tolist(), counts.tolist(), strict=True)))
