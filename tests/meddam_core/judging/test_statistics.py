"""Intervals, tests and agreement against known values."""

from __future__ import annotations

import math

import numpy as np
import pytest

from meddam_core.judging.statistics import agreement, bootstrap, krippendorff_alpha, paired, wilson


def mean(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    return np.asarray(sums.sum(-1) / counts.sum(-1))


def coins(num: int, rate: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    right = (np.random.default_rng(seed).random((num, 1)) < rate).astype(float)
    return right, np.ones_like(right)


def test_the_interval_of_independent_trials_is_that_of_the_binomial() -> None:
    right, asked = coins(400, 0.7, 0)
    interval = bootstrap(right, asked, mean, [0] * 400, num=4000)
    half = 1.96 * math.sqrt(interval.value * (1 - interval.value) / 400)
    assert interval.low == pytest.approx(interval.value - half, abs=0.006)
    assert interval.high == pytest.approx(interval.value + half, abs=0.006)


def test_answers_of_one_patient_do_not_make_the_interval_narrower() -> None:
    right, asked = coins(100, 0.7, 1)
    one = bootstrap(right, asked, mean, [0] * 100)
    copies = bootstrap(right * 20, asked * 20, mean, [0] * 100)
    assert (copies.low, copies.high) == (one.low, one.high)


def test_coverage_of_the_interval() -> None:
    inside = 0
    for seed in range(120):
        right, asked = coins(80, 0.6, seed)
        interval = bootstrap(right, asked, mean, [0] * 80, num=400, seed=seed)
        inside += interval.low <= 0.6 <= interval.high
    assert 105 <= inside <= 120


def test_one_cluster_has_no_interval() -> None:
    interval = bootstrap(np.ones((1, 1)), np.ones((1, 1)), mean, [0])
    assert interval.value == 1
    assert math.isnan(interval.low)


def test_paired_comparison_sees_what_unpaired_intervals_hide() -> None:
    base, asked = coins(300, 0.5, 2)
    better = np.minimum(1, base + (np.arange(300)[:, None] % 15 == 0))
    result = paired((base, asked), (better, asked), mean, [0] * 300)
    assert result.p_value < 0.01
    assert result.difference.low > 0
    wide = bootstrap(base, asked, mean, [0] * 300)
    assert wide.high - wide.low > 0.1 > result.difference.high
    same = paired((base, asked), (base, asked), mean, [0] * 300)
    assert (same.p_value, same.difference.value) == (1.0, 0.0)


def test_p_values_are_uniform_under_the_null() -> None:
    small = 0
    for seed in range(100):
        a, asked = coins(60, 0.5, 2 * seed)
        b, _ = coins(60, 0.5, 2 * seed + 1)
        small += paired((a, asked), (b, asked), mean, [0] * 60, num=200, seed=seed).p_value <= 0.1
    assert 2 <= small <= 20


def test_systems_of_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="same clusters"):
        paired(coins(3, 0.5, 0), coins(4, 0.5, 0), mean, [0, 0, 0])


def test_wilson_against_published_values() -> None:
    interval = wilson(81, 263)  # Newcombe 1998, table I
    assert (round(interval.low, 4), round(interval.high, 4)) == (0.2553, 0.3662)
    assert wilson(0, 20).low == 0
    with pytest.raises(ValueError, match="one trial"):
        wilson(0, 0)


def test_alpha_against_krippendorffs_example() -> None:
    """Krippendorff 2011, Computing Krippendorff's Alpha-Reliability, example C: 4 observers, 12 units, missing data."""
    n = None
    ratings = [
        [1, 2, 3, 3, 2, 1, 4, 1, 2, n, n, n],
        [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, n, 3],
        [n, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, n],
        [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, n],
    ]
    assert krippendorff_alpha(ratings) == pytest.approx(0.743, abs=5e-4)
    assert krippendorff_alpha(ratings, level="interval") == pytest.approx(0.849, abs=5e-4)


def test_alpha_at_its_ends() -> None:
    assert krippendorff_alpha([["a", "b"] * 50, ["a", "b"] * 50]) == 1.0
    rng = np.random.default_rng(0)
    chance = krippendorff_alpha([list(rng.integers(0, 3, 3000)), list(rng.integers(0, 3, 3000))])
    assert abs(chance) < 0.05
    assert math.isnan(krippendorff_alpha([["a", "a"], ["a", "a"]]))


def test_test_retest() -> None:
    result = agreement(["a", "b", None, "a"], ["a", "a", "b", "a"])
    assert (result.num_items, result.num_unscored) == (3, 1)
    assert result.same.value == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="two verdicts"):
        agreement([None], ["a"])
