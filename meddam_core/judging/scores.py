"""MedDLC-score: from verdicts to the paper's figures, to the strict variant, and to what lies behind them.

    sheet = make_sheet(judged, strict=True)
    with_interval(sheet).average                   # Interval(value, low, high)

Notes:
- Paper (sections 2.3, 2.5, appendix B): accuracy on positive and on negative questions, their mean, averaged over
  datasets. ASSUMPTIONS lists what it leaves open and how we read it; the list stands beside every figure.
- Strict: nothing is right unless the caption recognises the region; where all regions are of one class, or the question
  is an exclusive choice, a negative counts only if the caption speaks about that attribute. An empty caption scores 0.
- Weights: values within attributes, attributes within datasets, datasets equally ("balanced"), or every question of a
  dataset equally ("questions").
- What could not be judged is left out, and counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from meddam_core.judging.protocol import Verdict
from meddam_core.judging.statistics import Comparison, Floats, Interval, Score, bootstrap, paired
from qa_library.questions import Question

Weighting = Literal["balanced", "questions"]
Polarity = Literal["positive", "negative"]
POLARITIES: tuple[Polarity, Polarity] = ("positive", "negative")

ASSUMPTIONS = (
    "An omission earns nothing on a positive question. (The paper does not say.)",
    "On a negative question an omission is right in the paper's variant, and in the strict one only if the caption "
    "recognises the region and, where all regions are of one class or the attribute is exclusive, speaks about that "
    "attribute. (The paper does not gate.)",
    "A denied finding (no pneumothorax) is no hallucination.",
    "A finding stated as possible counts as stated, in both polarities.",
    "MedDLC-score is the mean of positive and negative accuracy, each averaged over datasets with equal weight. (The "
    "paper says averaged over datasets; not whether questions or regions are pooled within one.)",
    "Recognition questions gate the strict variant and are no part of positive or negative accuracy.",
    "The judge is named beside the figure. (The paper names GPT-4o for LLM-score and none for MedDLC-score.)",
    "What the judge could not decide is left out and counted as unscored. (The paper does not say.)",
    "Undecided ground truth is not asked. (The paper does not say.)",
)


@dataclass(frozen=True, slots=True)
class Judged:
    """A verdict with its question, and the patient or image that it belongs to."""

    question: Question
    verdict: Verdict
    cluster: str
    """Patient key, or the image key where the patient is unknown."""
    caption: str = "0"
    """Which of the region's captions: prompt id and sample."""


@dataclass(frozen=True, slots=True)
class Stratum:
    """Questions that are averaged first."""

    dataset: str
    polarity: Polarity
    attribute: str = ""
    value: str = ""


@dataclass(frozen=True, eq=False)
class Sheet:
    """Right answers and answers, by cluster and stratum."""

    strata: list[Stratum]
    clusters: list[tuple[str, str]]
    """(dataset, cluster)."""
    right_CS: Floats
    asked_CS: Floats
    unscored: dict[str, int] = field(default_factory=dict)
    """Counts of what could not be judged, by reason."""
    num_questions: int = 0
    """Positive and negative questions, unscored ones included."""
    num_hedged: int = 0

    @property
    def datasets(self) -> list[str]:
        """Datasets with at least one judged question."""
        return sorted({s.dataset for s in self.strata})

    @property
    def unscored_rate(self) -> float:
        """Share of the questions that could not be judged."""
        return sum(self.unscored.values()) / self.num_questions if self.num_questions else 0.0

    @property
    def groups(self) -> list[int]:
        """The dataset of each cluster, as numbers."""
        number = {d: i for i, d in enumerate(sorted({d for d, _ in self.clusters}))}
        return [number[d] for d, _ in self.clusters]


@dataclass(frozen=True, slots=True)
class MedDlcScore:
    """The score of one system, with intervals; shares, not percent."""

    positive: Interval
    negative: Interval
    average: Interval
    num_questions: int
    unscored: dict[str, int]
    datasets: tuple[str, ...]


def make_sheet(
    judged: Iterable[Judged],
    *,
    strict: bool = False,
    weighting: Weighting = "balanced",
    datasets: Sequence[str] | None = None,
) -> Sheet:
    """Tallies verdicts; only of `datasets` where given. A region's questions may come in any order."""
    rows = [j for j in judged if datasets is None or j.question.dataset in datasets]
    recognised = {_gate_key(j): j.verdict for j in rows if j.question.polarity == "recognition"}
    unscored: dict[str, int] = {}
    cells: dict[tuple[tuple[str, str], Stratum], list[float]] = {}
    asked = hedged = 0
    for row in rows:
        question, verdict = row.question, row.verdict
        if question.polarity == "recognition":
            continue
        asked += 1
        hedged += verdict.hedged
        gate = recognised.get(_gate_key(row)) if strict else None
        missing = next((v for v in (verdict, gate) if v is not None and v.outcome == "unscored"), None)
        if missing is not None:
            reason = str(missing.reason)
            unscored[reason] = unscored.get(reason, 0) + 1
            continue
        right = _right(question, verdict, gate, strict)
        cell = cells.setdefault(((question.dataset, row.cluster), _stratum(question, weighting)), [0.0, 0.0])
        cell[0] += right
        cell[1] += 1
    return _sheet(cells, unscored, asked, hedged)


def _gate_key(row: Judged) -> tuple[str, int, str]:
    """Which recognition question gates a row: region ids are unique within a dataset only."""
    return row.question.dataset, row.question.region_id, row.caption


def _right(question: Question, verdict: Verdict, gate: Verdict | None, strict: bool) -> bool:
    if not strict:
        return verdict.choice in question.expected
    return gate is not None and gate.outcome == "correct" and verdict.choice in question.strict_expected


def _stratum(question: Question, weighting: Weighting) -> Stratum:
    polarity: Polarity = "positive" if question.polarity == "positive" else "negative"
    if weighting == "questions":
        return Stratum(question.dataset, polarity)
    return Stratum(question.dataset, polarity, f"{question.template_set}/{question.attribute}", question.value)


def _sheet(
    cells: Mapping[tuple[tuple[str, str], Stratum], list[float]], unscored: dict[str, int], asked: int, hedged: int
) -> Sheet:
    clusters = sorted({c for c, _ in cells})
    strata = sorted({s for _, s in cells}, key=lambda s: (s.dataset, s.polarity, s.attribute, s.value))
    rows, columns = ({x: i for i, x in enumerate(xs)} for xs in (clusters, strata))
    right, total = np.zeros((len(clusters), len(strata))), np.zeros((len(clusters), len(strata)))
    for (cluster, stratum), (hits, count) in cells.items():
        right[rows[cluster], columns[stratum]] = hits
        total[rows[cluster], columns[stratum]] = count
    return Sheet(strata, clusters, right, total, unscored, asked, hedged)


# ---------------------------------------------------------------------------------------------------------------------
# Means of means


def scorer(strata: Sequence[Stratum], polarity: Polarity | None = None) -> Score:
    """The function from sums and counts by stratum to the score of one polarity, or to the mean of both."""
    if polarity is None:
        positive, negative = scorer(strata, "positive"), scorer(strata, "negative")
        return lambda right, asked: (positive(right, asked) + negative(right, asked)) / 2
    chosen = [i for i, s in enumerate(strata) if s.polarity == polarity]
    attributes = [(strata[i].dataset, strata[i].attribute) for i in chosen]
    names = sorted(set(attributes))
    datasets = [d for d, _ in names]

    def score(right: Floats, asked: Floats) -> Floats:
        with np.errstate(invalid="ignore"):
            values = right[..., chosen] / np.where(asked[..., chosen] > 0, asked[..., chosen], np.nan)
        by_dataset = _grouped(_grouped(values, attributes, names), datasets, sorted(set(datasets)))
        return _means(by_dataset)

    return score


def _grouped(values: Floats, keys: Sequence[object], names: Sequence[object]) -> Floats:
    """Means over the last axis within groups, (..., groups); nan where a group has nothing."""
    member = np.asarray([[float(key == name) for name in names] for key in keys]).reshape(len(keys), len(names))
    there = ~np.isnan(values)
    count = there.astype(np.float64) @ member
    total = np.where(there, values, 0.0) @ member
    return np.asarray(np.where(count > 0, total / np.maximum(count, 1), np.nan))


def _means(values: Floats) -> Floats:
    """Mean over the last axis of what is there; nan where nothing is."""
    there = ~np.isnan(values)
    count = there.sum(-1)
    total = np.where(there, values, 0.0).sum(-1)
    return np.asarray(np.where(count > 0, total / np.maximum(count, 1), np.nan))


def point(sheet: Sheet, polarity: Polarity | None = None) -> float:
    """The score without an interval; nan when a polarity has no judged question."""
    return float(scorer(sheet.strata, polarity)(sheet.right_CS.sum(0), sheet.asked_CS.sum(0)))


def with_interval(sheet: Sheet, *, num: int = 2000, level: float = 0.95, seed: int = 0) -> MedDlcScore:
    """The score with intervals by bootstrap over clusters, drawn within datasets."""

    def interval(polarity: Polarity | None) -> Interval:
        score = scorer(sheet.strata, polarity)
        return bootstrap(sheet.right_CS, sheet.asked_CS, score, sheet.groups, num=num, level=level, seed=seed)

    return MedDlcScore(
        interval("positive"),
        interval("negative"),
        interval(None),
        sheet.num_questions,
        sheet.unscored,
        tuple(sheet.datasets),
    )


def by_stratum(sheet: Sheet) -> list[tuple[Stratum, float, int]]:
    """Share right and number of judged questions of each stratum, for tables."""
    right, asked = sheet.right_CS.sum(0), sheet.asked_CS.sum(0)
    return [(s, float(right[i] / asked[i]), int(asked[i])) for i, s in enumerate(sheet.strata)]


def common_datasets(models: Mapping[str, Sequence[Judged]]) -> list[str]:
    """Datasets on which every model was judged; only these may be compared."""
    sets = [{j.question.dataset for j in judged if j.verdict.outcome != "unscored"} for judged in models.values()]
    return sorted(set.intersection(*sets)) if sets else []


def compare(
    first: Sequence[Judged],
    second: Sequence[Judged],
    *,
    strict: bool = False,
    weighting: Weighting = "balanced",
    seed: int = 0,
    num: int = 2000,
) -> Comparison:
    """Two systems on the questions that both were judged on; several captions of a region are averaged.

    Raises ValueError when the two have no judged question in common.
    """
    judged = [{_question_key(j) for j in rows if j.verdict.choice is not None} for rows in (first, second)]
    shared = judged[0] & judged[1]
    if not shared:
        raise ValueError("the two systems have no judged question in common")
    kept = [[j for j in rows if _question_key(j) in shared] for rows in (first, second)]
    sheets = [make_sheet(rows, strict=strict, weighting=weighting) for rows in kept]
    clusters = sorted({c for s in sheets for c in s.clusters})
    strata = sorted({s for x in sheets for s in x.strata}, key=lambda s: (s.dataset, s.polarity, s.attribute, s.value))
    arrays = [_aligned(s, clusters, strata) for s in sheets]
    number = {d: i for i, d in enumerate(sorted({d for d, _ in clusters}))}
    return paired(arrays[0], arrays[1], scorer(strata), [number[d] for d, _ in clusters], num=num, seed=seed)


def _question_key(row: Judged) -> tuple[str, str]:
    return row.question.dataset, row.question.question_id


def _aligned(sheet: Sheet, clusters: list[tuple[str, str]], strata: list[Stratum]) -> tuple[Floats, Floats]:
    rows, columns = ({x: i for i, x in enumerate(xs)} for xs in (clusters, strata))
    at = np.ix_([rows[c] for c in sheet.clusters], [columns[s] for s in sheet.strata])
    right, asked = np.zeros((len(clusters), len(strata))), np.zeros((len(clusters), len(strata)))
    right[at], asked[at] = sheet.right_CS, sheet.asked_CS
    return right, asked


def normalised(score: float, majority: float, truth: float) -> float:
    """Where a score lies between the majority caption (0) and truth-made captions (1); nan if these are equal."""
    return (score - majority) / (truth - majority) if truth != majority else float("nan")
