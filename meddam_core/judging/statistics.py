"""Intervals, tests and agreement: what makes a score a measurement.

Notes:
- Regions of one patient or image are not independent, so everything resamples clusters, within datasets.
- A score is a mean of means over strata (values within attributes within datasets); each resample computes it afresh.
- Nothing here knows what a caption is: inputs are arrays.

Legend: C clusters, S strata, B resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Score = Callable[[Floats, Floats], Floats]
"""Sums and counts, both (..., S), to scores (...)."""
CHUNK = 64
"""Resamples computed at once, so that memory stays small."""


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate with its bounds."""

    value: float
    low: float
    high: float


def bootstrap(
    sums_CS: Floats,
    counts_CS: Floats,
    score: Score,
    groups_C: Sequence[int],
    *,
    num: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """The score with a percentile interval from resampled clusters; clusters are drawn within their group (dataset)."""
    value = float(score(sums_CS.sum(0), counts_CS.sum(0)))
    if len(groups_C) < 2:
        return Interval(value, float("nan"), float("nan"))
    return percentiles(value, score(*resampled(sums_CS, counts_CS, groups_C, num=num, seed=seed)), level)


def resampled(
    sums_CS: Floats, counts_CS: Floats, groups_C: Sequence[int], *, num: int = 2000, seed: int = 0
) -> tuple[Floats, Floats]:
    """Sums and counts of `num` resamples, each (B, S): drawn once, for any number of scores of the same strata."""
    pairs = [(w @ sums_CS, w @ counts_CS) for w in _weights(groups_C, num, np.random.default_rng(seed))]
    return np.concatenate([sums for sums, _ in pairs]), np.concatenate([counts for _, counts in pairs])


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two systems on the same questions."""

    difference: Interval
    """Of the second from the first, in the units of the score."""
    p_value: float
    """Two-sided, by swapping the two systems' answers cluster by cluster."""


def paired(
    first: tuple[Floats, Floats],
    second: tuple[Floats, Floats],
    score: Score,
    groups_C: Sequence[int],
    *,
    num: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> Comparison:
    """Compares two systems; each is (sums_CS, counts_CS) over the same clusters and strata.

    The interval comes from resampling clusters, the p-value from a permutation test. Raises ValueError for shapes that
    differ.
    """
    if first[0].shape != second[0].shape:
        raise ValueError("the two systems were not scored on the same clusters and strata")
    rng = np.random.default_rng(seed)

    def difference(a: Floats, b: Floats, c: Floats, d: Floats) -> Floats:
        return np.asarray(score(c, d) - score(a, b))

    value = float(difference(*(x.sum(0) for x in (*first, *second))))
    boot = [difference(*(w @ x for x in (*first, *second))) for w in _weights(groups_C, num, rng)]
    extreme = 0
    totals = [x.sum(0) for x in (*first, *second)]
    steps = [second[i] - first[i] for i in (0, 1)]
    for start in range(0, num, CHUNK):
        swap = rng.integers(0, 2, size=(min(CHUNK, num - start), len(groups_C))).astype(np.float64)
        moved = [swap @ step for step in steps]
        null = difference(totals[0] + moved[0], totals[1] + moved[1], totals[2] - moved[0], totals[3] - moved[1])
        extreme += int(np.sum(np.abs(null) >= abs(value) - 1e-12))
    return Comparison(percentiles(value, np.concatenate(boot), level), (extreme + 1) / (num + 1))


def wilson(right: int, total: int, level: float = 0.95) -> Interval:
    """A rate with Wilson's interval; for independent trials only. Raises ValueError for none."""
    if total < 1:
        raise ValueError("a rate needs at least one trial")
    z = float(np.sqrt(2) * _erfinv(level))
    rate = right / total
    centre = (rate + z * z / (2 * total)) / (1 + z * z / total)
    half = z * float(np.sqrt(rate * (1 - rate) / total + z * z / (4 * total * total))) / (1 + z * z / total)
    return Interval(rate, max(0.0, centre - half) if right else 0.0, min(1.0, centre + half) if right < total else 1.0)


def krippendorff_alpha(
    ratings: Sequence[Sequence[object | None]], level: Literal["nominal", "interval"] = "nominal"
) -> float:
    """Agreement of raters beyond chance: 1 perfect, 0 as by chance; nan when there is nothing to disagree about.

    `ratings` holds one row a rater, one column an item; None is missing. Items with one rating are left out.
    Source: Krippendorff, Content Analysis (2004), section 11.3.
    """
    columns = [[r for r in column if r is not None] for column in zip(*ratings, strict=True)]
    columns = [c for c in columns if len(c) > 1]
    values = sorted({r for c in columns for r in c}, key=repr)
    if not columns or len(values) < 2:
        return float("nan")
    index = {v: i for i, v in enumerate(values)}
    coincidences = np.zeros((len(values), len(values)))
    for column in columns:
        counts = np.bincount([index[r] for r in column], minlength=len(values)).astype(np.float64)
        coincidences += (np.outer(counts, counts) - np.diag(counts)) / (len(column) - 1)
    if level == "nominal":
        distance = 1.0 - np.eye(len(values))
    else:
        numbers = np.asarray([float(v) for v in values])
        distance = (numbers[:, None] - numbers[None, :]) ** 2
    totals = coincidences.sum(0)
    expected = (np.outer(totals, totals) - np.diag(totals)) / (totals.sum() - 1)
    return float(1 - (coincidences * distance).sum() / (expected * distance).sum())


@dataclass(frozen=True, slots=True)
class Agreement:
    """How two sets of verdicts on the same questions agree: two judges, or one judge asked twice."""

    num_items: int
    same: Interval
    """Share of equal verdicts among those that both gave."""
    alpha: float
    num_unscored: int
    """Items where at least one gave none."""


def agreement(first: Sequence[object | None], second: Sequence[object | None]) -> Agreement:
    """Two judges, or test and retest of one. Raises ValueError when no item has two verdicts."""
    both = [(a, b) for a, b in zip(first, second, strict=True) if a is not None and b is not None]
    if not both:
        raise ValueError("no item has two verdicts")
    same = wilson(sum(a == b for a, b in both), len(both))
    return Agreement(len(both), same, krippendorff_alpha([first, second]), len(first) - len(both))


def _weights(groups_C: Sequence[int], num: int, rng: np.random.Generator) -> Iterator[Floats]:
    """How often each cluster is drawn, (CHUNK, C) at a time."""
    groups = np.asarray(groups_C)
    members = [np.flatnonzero(groups == g) for g in np.unique(groups)]
    for start in range(0, num, CHUNK):
        size = min(CHUNK, num - start)
        weights = np.zeros((size, len(groups)))
        for at in members:
            weights[:, at] = rng.multinomial(len(at), np.full(len(at), 1 / len(at)), size=size)
        yield weights


def percentiles(value: float, draws: Floats, level: float = 0.95) -> Interval:
    """An estimate with the percentile interval of its resamples; resamples that have no score (nan) are left out."""
    draws = draws[~np.isnan(draws)]
    if not draws.size:
        return Interval(value, float("nan"), float("nan"))
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(low), float(high))


def _erfinv(x: float) -> float:
    from scipy.special import erfinv

    return float(erfinv(x))
