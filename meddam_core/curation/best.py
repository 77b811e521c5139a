"""The best of several captions of one region and prompt, and the yield of a threshold.

best_of(candidates)            # the one to keep: most verdicts right, then most agreement, then most confident
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from meddam_core.curation.candidate import Candidate, agreements


def with_agreement(samples: Sequence[Candidate]) -> list[Candidate]:
    """All samples of one region and prompt, each with its agreement with the others."""
    found = agreements([c.caption.text or "" for c in samples])
    return [replace(c, agreement=a) for c, a in zip(samples, found, strict=True)]


def best_of(samples: Sequence[Candidate]) -> Candidate:
    """The best of at least one; of equals the first."""

    def merit(candidate: Candidate) -> tuple[float, float, float]:
        logprob = candidate.caption.mean_logprob
        return (
            _or(candidate.verdict_share, -1.0), _or(candidate.agreement, -1.0), -99.0 if logprob is None else logprob
        )  # fmt: skip

    return max(samples, key=merit)


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


@dataclass(frozen=True, slots=True)
class YieldPoint:
    """What a threshold leaves."""

    threshold: float
    kept: int
    right: float | None
    """Share of label questions that what is left answers rightly; None where no truth is known."""


MEASURES: dict[str, Callable[[Candidate], float | None]] = {
    "mean log-probability": lambda c: c.caption.mean_logprob,
    "agreement of samples": lambda c: c.agreement,
    "share of right verdicts": lambda c: c.verdict_share,
}


def yield_curve(measured: Sequence[tuple[float, int, int]], num_points: int = 20) -> list[YieldPoint]:
    """For thresholds from none to strict how many captions are left, and how right they are.

    Args:
        measured: (measure, questions right, questions asked) of each caption, asked 0 where no truth is known.
        num_points: thresholds, at equal shares of the captions.
    """
    if not measured:
        return []
    ordered = sorted(measured, key=lambda m: -m[0])
    points = []
    for i in range(1, num_points + 1):
        count = max(1, round(len(ordered) * i / num_points))
        chosen = ordered[:count]
        asked = sum(m[2] for m in chosen)
        points.append(YieldPoint(chosen[-1][0], count, sum(m[1] for m in chosen) / asked if asked else None))
    return points
