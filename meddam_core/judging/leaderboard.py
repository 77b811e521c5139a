"""Several judged systems side by side: scores with intervals, ranks that the data can bear, and what lies behind them.

    board = make_leaderboard([System(name="DAM-3B, meddam-v1", judged=rows), System(name="blank", role="blank", ...)])

Notes:
- Only questions that every model was asked are counted, and only datasets that all of them were judged on. Controls may
  stand on a sample of the regions.
- Systems are ranked by the strict variant. A rank is a range: a system is placed below another one only if the paired
  difference holds at the 5 % level after Holm's correction for the number of pairs.
- The normalised score is 0 at the majority caption and 1 at truth-made captions; its interval is the score's own, moved
  and scaled: it takes these two controls as given.
- One judge a leaderboard: figures of two judges are not comparable.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from meddam_core.judging.scores import (
    Judged,
    Polarity,
    Sheet,
    Stratum,
    compare,
    make_sheet,
    normalised,
    scorer,
)
from meddam_core.judging.statistics import Comparison, Floats, Interval, percentiles, resampled

Role = Literal["model", "blank", "shuffled", "majority", "truth"]
CONTROLS: tuple[Role, ...] = ("blank", "shuffled", "majority", "truth")
CONTROL_MEANING: dict[Role, str] = {
    "blank": "Empty captions: what a score gives away for saying nothing.",
    "shuffled": "Truth-made captions dealt out at random within dataset and finding: right for the kind, not for the "
    "region.",
    "majority": "The most frequent values of each dataset and finding, one caption for all: guessing by base rates.",
    "truth": "Captions made from the labels themselves: the most that these questions and this judge can give.",
}
Variant = Literal["strict", "paper"]
VARIANTS: tuple[Variant, ...] = ("strict", "paper")
SIGNIFICANT = 0.05
NUM_RESAMPLES = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class System:
    """What is compared: a model with its prompt and views, or a control."""

    name: str
    judged: Sequence[Judged]
    role: Role = "model"
    facts: Mapping[str, str] = field(default_factory=dict)
    """What a reader should know about it: engine, prompt, views, run."""
    own_shuffled: Sequence[Judged] = ()
    """Verdicts on the system's own captions, dealt out at random within dataset and finding; () where not judged."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """One variant's scores over the same questions; shares, not percent."""

    positive: Interval
    negative: Interval
    average: Interval


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """The score of one attribute and polarity in a dataset."""

    dataset: str
    attribute: str
    polarity: Polarity
    share: Interval
    num_questions: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """Everything that is shown of a system."""

    name: str
    role: Role
    facts: Mapping[str, str]
    scores: dict[Variant, Figures]
    by_dataset: dict[Variant, dict[str, Figures]]
    by_attribute: dict[Variant, list[Cell]]
    normalised: Interval | None = None
    """Of the strict variant; None without controls."""
    rank: tuple[int, int] | None = None
    """Best and worst place that the comparisons allow; None for controls."""
    own_shuffled: Interval | None = None
    """The strict score of its own captions on other regions of their kind: what is left is not about the region."""
    own_unshuffled: Interval | None = None
    """The strict score of its captions in their places, on the same questions as `own_shuffled`."""
    num_questions: int = 0
    num_regions: int = 0
    unscored: dict[str, int] = field(default_factory=dict)
    num_hedged: int = 0

    @property
    def unscored_rate(self) -> float:
        """Share of its questions that could not be judged."""
        return sum(self.unscored.values()) / self.num_questions if self.num_questions else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two systems compared on the questions that both were judged on, by the strict variant."""

    first: str
    second: str
    comparison: Comparison
    """Of the first from the second: above 0 where the first is better."""
    p_corrected: float
    """Holm's correction for all pairs of the leaderboard."""

    @property
    def significant(self) -> bool:
        """Whether the difference holds at the 5 % level after correction."""
        return self.p_corrected < SIGNIFICANT and not math.isnan(self.comparison.difference.value)


@dataclass(frozen=True, slots=True, kw_only=True)
class Leaderboard:
    """What the report, the CSV and the YAML are made of."""

    judge: str
    datasets: tuple[str, ...]
    models: tuple[Standing, ...]
    """By the strict average, best first."""
    controls: tuple[Standing, ...]
    pairs: tuple[Pair, ...]
    left_out: tuple[str, ...] = ()
    """What was not counted, as sentences."""
    num_questions: int = 0
    num_regions: int = 0
    num_clusters: int = 0
    """Patients, or images where the patient is unknown."""

    def control(self, role: Role) -> Standing | None:
        """The control of a kind; None where it was not judged."""
        return next((c for c in self.controls if c.role == role), None)


def make_leaderboard(systems: Sequence[System], *, seed: int = 0, num: int = NUM_RESAMPLES) -> Leaderboard:
    """Scores, ranks and comparisons of judged systems.

    Raises ValueError for no model, names that occur twice, more than one judge, or nothing in common.
    """
    judge = _check(systems)
    systems, left_out = _common(systems)
    standings = [_standing(s, seed, num) for s in systems]
    controls = [s for s in standings if s.role != "model"]
    models = sorted((s for s in standings if s.role == "model"), key=lambda s: -_sortable(s))
    pairs = _pairs({s.name: s.judged for s in systems}, [m.name for m in models], seed, num)
    ranges = _ranks([m.name for m in models], pairs)
    anchors = {c.role: c.scores["strict"].average.value for c in controls}
    first = next(s for s in systems if s.role == "model")
    return Leaderboard(
        judge=judge,
        datasets=tuple(sorted({j.question.dataset for s in systems for j in s.judged})),
        models=tuple(_placed(m, anchors, ranges[m.name]) for m in models),
        controls=tuple(sorted((_placed(c, anchors, None) for c in controls), key=lambda c: CONTROLS.index(c.role))),
        pairs=tuple(pairs),
        left_out=tuple(left_out),
        num_questions=len({_question(j) for j in first.judged if j.question.polarity != "recognition"}),
        num_regions=len({(j.question.dataset, j.question.region_id) for j in first.judged}),
        num_clusters=len({(j.question.dataset, j.cluster) for j in first.judged}),
    )


def _check(systems: Sequence[System]) -> str:
    if not any(s.role == "model" for s in systems):
        raise ValueError("a leaderboard needs at least one judged model")
    names = [s.name for s in systems]
    if twice := sorted({n for n in names if names.count(n) > 1}):
        raise ValueError(f"two systems have the same name: {', '.join(twice)}; give each run another one")
    judges = {j.verdict.judge for s in systems for j in s.judged}
    if len(judges) > 1:
        raise ValueError(f"verdicts of {len(judges)} judges are not comparable: {', '.join(sorted(judges))}")
    if not judges:
        raise ValueError("the systems have no verdict")
    return judges.pop()


def _question(row: Judged) -> tuple[str, str]:
    return row.question.dataset, row.question.question_id


def _common(systems: Sequence[System]) -> tuple[list[System], list[str]]:
    """The systems with only what every model was asked and judged on, and what that left out.

    Controls may have been judged on fewer regions; one that lacks a whole dataset is left out.
    """
    models = [s for s in systems if s.role == "model"]
    asked = [{_question(j) for j in s.judged} for s in models]
    scored = [_scored_datasets(s.judged) for s in models]
    shared, datasets = set.intersection(*asked), set.intersection(*scored)
    shared = {q for q in shared if q[0] in datasets}
    if not shared:
        raise ValueError("the systems have no judged question in common: were they judged with the same questions?")
    said = []
    every = set.union(*scored)
    if every - datasets:
        said.append(f"Datasets that not every system was judged on: {', '.join(sorted(every - datasets))}.")
    for system, questions in zip(models, asked, strict=True):
        extra = sum(q[0] in datasets and q not in shared for q in questions)
        if extra:
            said.append(f"{system.name}: {extra:,} questions that not every system was asked.")
    kept = []
    for system in systems:
        cut = replace(system, judged=_within(system.judged, shared), own_shuffled=_within(system.own_shuffled, shared))
        if _scored_datasets(cut.judged) >= datasets:
            kept.append(cut)
        else:
            said.append(f"The control {system.name}: it was not judged on every dataset.")
    return kept, said


def _scored_datasets(judged: Sequence[Judged]) -> set[str]:
    return {j.question.dataset for j in judged if j.verdict.outcome != "unscored"}


def _within(judged: Sequence[Judged], questions: set[tuple[str, str]]) -> list[Judged]:
    return [j for j in judged if _question(j) in questions]


# ---------------------------------------------------------------------------------------------------------------------
# One system


def _standing(system: System, seed: int, num: int) -> Standing:
    scores: dict[Variant, Figures] = {}
    by_dataset: dict[Variant, dict[str, Figures]] = {}
    by_attribute: dict[Variant, list[Cell]] = {}
    sheets = {v: make_sheet(system.judged, strict=v == "strict") for v in VARIANTS}
    for variant, sheet in sheets.items():
        draws = _Draws(sheet, seed, num)
        scores[variant] = draws.figures(sheet.strata)
        by_dataset[variant] = {d: draws.figures([s for s in sheet.strata if s.dataset == d]) for d in sheet.datasets}
        by_attribute[variant] = draws.cells()
    strict = sheets["strict"]
    dealt = {_question(j) for j in system.own_shuffled}
    return Standing(
        name=system.name, role=system.role, facts=system.facts, scores=scores, by_dataset=by_dataset,
        by_attribute=by_attribute, num_questions=strict.num_questions, unscored=strict.unscored,
        num_hedged=strict.num_hedged,
        own_shuffled=_strict_average(system.own_shuffled, seed, num),
        own_unshuffled=_strict_average(_within(system.judged, dealt), seed, num),
        num_regions=len({(j.question.dataset, j.question.region_id) for j in system.judged}),
    )  # fmt: skip


def _strict_average(judged: Sequence[Judged], seed: int, num: int) -> Interval | None:
    sheet = make_sheet(judged, strict=True)
    return _Draws(sheet, seed, num).interval(sheet.strata, None) if sheet.strata else None


class _Draws:
    """Resamples of a sheet, drawn once for all its scores."""

    def __init__(self, sheet: Sheet, seed: int, num: int) -> None:
        self.sheet = sheet
        self.place = {s: i for i, s in enumerate(sheet.strata)}
        self.totals = (sheet.right_CS.sum(0), sheet.asked_CS.sum(0))
        groups = sheet.groups
        self.draws: tuple[Floats, Floats] | None = (
            resampled(sheet.right_CS, sheet.asked_CS, groups, num=num, seed=seed) if len(groups) > 1 else None
        )

    def interval(self, strata: Sequence[Stratum], polarity: Polarity | None) -> Interval:
        """The score of some of the strata."""
        at = [self.place[s] for s in strata]
        score = scorer(strata, polarity)
        value = float(score(self.totals[0][at], self.totals[1][at]))
        if self.draws is None:
            return Interval(value, float("nan"), float("nan"))
        return percentiles(value, score(self.draws[0][:, at], self.draws[1][:, at]))

    def figures(self, strata: Sequence[Stratum]) -> Figures:
        """All three scores of some of the strata."""
        return Figures(
            positive=self.interval(strata, "positive"),
            negative=self.interval(strata, "negative"),
            average=self.interval(strata, None),
        )

    def cells(self) -> list[Cell]:
        """A score for each dataset, attribute and polarity."""
        keys = sorted({(s.dataset, s.attribute, s.polarity) for s in self.sheet.strata})
        found = []
        for dataset, attribute, polarity in keys:
            own = [
                s for s in self.sheet.strata if (s.dataset, s.attribute, s.polarity) == (dataset, attribute, polarity)
            ]
            count = sum(self.totals[1][self.place[s]] for s in own)
            found.append(
                Cell(
                    dataset=dataset, attribute=attribute, polarity=polarity,
                    share=self.interval(own, polarity), num_questions=int(count),
                )
            )  # fmt: skip
        return found


def _sortable(standing: Standing) -> float:
    value = standing.scores["strict"].average.value
    return -1.0 if math.isnan(value) else value


def _placed(standing: Standing, anchors: Mapping[Role, float], rank: tuple[int, int] | None) -> Standing:
    """The standing with its rank, and normalised where there are controls to go by."""
    scaled = None
    if "majority" in anchors and "truth" in anchors and anchors["truth"] > anchors["majority"]:
        own = standing.scores["strict"].average
        ends = [normalised(v, anchors["majority"], anchors["truth"]) for v in (own.value, own.low, own.high)]
        scaled = Interval(*ends)
    return replace(standing, normalised=scaled, rank=rank)


# ---------------------------------------------------------------------------------------------------------------------
# Pairs and ranks


def _pairs(judged: Mapping[str, Sequence[Judged]], names: Sequence[str], seed: int, num: int) -> list[Pair]:
    """Every two models, the one with the higher score first."""
    found = [
        (a, b, compare(judged[b], judged[a], strict=True, seed=seed, num=num))
        for a, b in itertools.combinations(names, 2)
    ]
    corrected = holm([c.p_value for _, _, c in found])
    return [Pair(first=a, second=b, comparison=c, p_corrected=p) for (a, b, c), p in zip(found, corrected, strict=True)]


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number, step by step (Holm 1979); at most 1, in the order given."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    corrected, highest = [0.0] * len(p_values), 0.0
    for place, i in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - place) * p_values[i]))
        corrected[i] = highest
    return corrected


def _ranks(names: Sequence[str], pairs: Sequence[Pair]) -> dict[str, tuple[int, int]]:
    better = dict.fromkeys(names, 0)
    worse = dict.fromkeys(names, 0)
    for pair in pairs:
        if pair.significant:
            ahead = pair.comparison.difference.value > 0
            winner, loser = (pair.first, pair.second) if ahead else (pair.second, pair.first)
            better[loser] += 1
            worse[winner] += 1
    return {n: (1 + better[n], len(names) - worse[n]) for n in names}
