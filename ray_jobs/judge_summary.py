"""How a judging ended: what was judged, what it cost, and the scores with their controls and assumptions.

Scores are tallied a verdict file a task: the driver holds right answers and answers by patient and stratum only.
"""

from __future__ import annotations

import dataclasses
import io
import math
import pickle
import time
from collections import Counter
from collections.abc import Iterable
from typing import Any, Literal

import numpy as np
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict

from meddam_core import storage
from meddam_core.judging.llm_score import BASIS, FACTORS
from meddam_core.judging.scores import ASSUMPTIONS, Sheet, Stratum, by_stratum, make_sheet, normalised, with_interval
from meddam_core.judging.statistics import Interval, krippendorff_alpha
from meddam_core.judging.verdict_table import JudgedCaption, from_table, with_questions
from ray_jobs.judge_plan import Plan, Slice
from ray_jobs.judging_directory import RUN_SET
from ray_jobs.question_files import QuestionFiles
from ray_jobs.run_directory import SUMMARY
from ray_jobs.summary import EXIT_INCOMPLETE, EXIT_STOPPED

VARIANTS = ("paper", "strict")
RATED = "rated"
MAX_VOTES = 20_000
"""Questions from which a panel's agreement is computed."""


class Figure(BaseModel):
    """A share with its 95 % interval; None where nothing was judged."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    value: float | None
    low: float | None
    high: float | None


class SetScore(BaseModel):
    """MedDLC-score of one set of captions: the run's, or a control's."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    positive: Figure
    negative: Figure
    average: Figure
    num_questions: int
    unscored: dict[str, int]
    normalised: float | None = None
    """0 at the majority caption, 1 at captions made from the truth, both judged alike."""


class Summary(BaseModel):
    """What is written to a judging's summary.json, last."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    state: Literal["complete", "stopped", "incomplete"]
    why: str | None = None
    judge: str
    name: str
    questions: dict[str, str]
    generation: int
    num_captions: int
    """Judged captions of the run; each has one row."""
    num_verdicts: int
    by_outcome: dict[str, int] = {}
    unscored: dict[str, int] = {}
    """Verdicts on the run's captions without a choice, by reason."""
    coverage: dict[str, Any]
    scores: dict[str, dict[str, SetScore]] = {}
    """By variant (paper, strict), then by set (run, blank, shuffled, majority, truth)."""
    llm_score: dict[str, Figure] = {}
    """`score` and each factor, 0 to 1, where the judge rates; datasets equally."""
    basis: str | None = None
    """What the rating judge saw."""
    by_attribute: list[dict[str, Any]] = []
    """Strict and paper's shares of the run, by dataset, polarity and attribute."""
    agreement: dict[str, float] = {}
    """Of a panel: Krippendorff's alpha of its members."""
    assumptions: tuple[str, ...] = ASSUMPTIONS
    calls: dict[str, float] = {}
    """Calls, tokens and dollars of this judging, all drivers together."""
    session: dict[str, Any] = {}
    finished_at: str

    @property
    def exit_code(self) -> int:
        """What the process ends with."""
        return {"complete": 0, "stopped": EXIT_STOPPED, "incomplete": EXIT_INCOMPLETE}[self.state]

    def lines(self) -> list[str]:
        """The summary as a person reads it."""
        text = [f"{self.state}: {self.num_verdicts:,} verdicts on {self.num_captions:,} captions, by {self.judge}"]
        if self.why:
            text.append(self.why)
        for variant, sets in self.scores.items():
            text.append(
                f"MedDLC-score, {variant}:  positive            negative            mean              normalised"
            )
            text += [_score_line(of, score) for of, score in sets.items()]
        if self.llm_score:
            text.append(f"LLM-score: {self.basis}")
            text += [f"  {name:<21}  {_percent(figure)}" for name, figure in self.llm_score.items()]
        text += [f"  {n:>9,}  unscored: {reason}" for reason, n in sorted(self.unscored.items(), key=lambda i: -i[1])]
        text += self._coverage_lines()
        if self.agreement:
            text.append(f"agreement of the panel: alpha {self.agreement['alpha']:.3f}")
        if self.calls.get("num_calls"):
            text.append(_calls_line(self.calls))
        if self.scores:
            text.append(f"what these figures assume: the `assumptions` in {SUMMARY}, or docs/scoring.md")
        return text

    def _coverage_lines(self) -> list[str]:
        found = []
        for name, what in (("without_questions", "captioned regions without a question"),
                           ("without_captions", "regions with questions and no caption")):  # fmt: skip
            if num := self.coverage[f"num_{name}"]:
                found.append(f"  {num:>9,}  {what}, such as {', '.join(self.coverage[name][:3])}")
        return found


def finish(
    plan: Plan, slices: list[Slice], stopped: str | None, counts: Counter[str], totals: list[dict[str, Any]],
    seconds: float,
) -> Summary:  # fmt: skip
    """Checks that every verdict file is there, scores them, and writes the summary. Needs Ray."""
    done = {uri for of in (RUN_SET, *plan.cfg.wanted_controls) for uri in plan.judging.verdict_files(of)}
    missing = [s for s in slices if s.out not in done]
    calls = {k: sum(t[k] for t in totals) for k in (totals[0] if totals else {}) if k not in ("outage", "concurrency")}
    common: dict[str, Any] = {
        "judge": plan.judge, "name": plan.judging.name, "generation": plan.generation, "calls": calls,
        "questions": {"uri": plan.questions.uri, "digest": plan.questions.digest},
        "coverage": dataclasses.asdict(plan.coverage), "finished_at": now(),
        "session": {"seconds": round(seconds, 1), **counts},
    }  # fmt: skip
    if missing or stopped is not None:
        left = sum(s.num for s in missing)
        why = f"{stopped or 'verdict files are missing'}: {left:,} captions are left; run the same command again"
        state: Any = "stopped" if stopped else "incomplete"
        summary = Summary(state=state, why=why, num_captions=0, num_verdicts=0, **common)
    else:
        tallies = _tally(plan, slices)
        own = tallies[RUN_SET]
        rated = plan.cfg.judge == "llm-score"
        figures: dict[str, Any] = (
            {"llm_score": _llm_score(own.sheets[RATED]), "basis": BASIS} if rated else
            {"scores": _scores(tallies), "by_attribute": _by_attribute(own), "agreement": _agreement(own.votes)}
        )  # fmt: skip
        summary = Summary(
            state="complete", num_captions=own.num_captions, num_verdicts=sum(own.by_outcome.values()),
            by_outcome=dict(own.by_outcome), unscored=dict(own.unscored), **figures, **common,
        )  # fmt: skip
        if own.num_captions != plan.coverage.num_captions:
            raise RuntimeError(f"{own.num_captions} verdict rows for {plan.coverage.num_captions} captions")
    plan.judging.write_json(summary.model_dump(mode="json"), SUMMARY)
    return summary


def now() -> str:
    """The time, UTC."""
    return time.strftime("%Y-%m-%d %H:%M:%S+00:00", time.gmtime())


# ---------------------------------------------------------------------------------------------------------------------
# Tallies


@dataclasses.dataclass(slots=True)
class Tally:
    """What is counted of one set; tallies of files add up."""

    num_captions: int = 0
    by_outcome: Counter[str] = dataclasses.field(default_factory=Counter)
    unscored: Counter[str] = dataclasses.field(default_factory=Counter)
    sheets: dict[str, Sheet] = dataclasses.field(default_factory=dict)
    votes: list[list[str | None]] = dataclasses.field(default_factory=list)

    def add(self, others: Iterable[Tally]) -> Tally:
        """The sum of tallies."""
        some = [self, *others]
        total = Tally(votes=[v for t in some for v in t.votes][:MAX_VOTES])
        for tally in some:
            total.num_captions += tally.num_captions
            total.by_outcome += tally.by_outcome
            total.unscored += tally.unscored
        names = {v for t in some for v in t.sheets}
        total.sheets = {v: add_sheets([t.sheets[v] for t in some if v in t.sheets]) for v in names}
        return total


def tally_file(uri: str, judge: str, questions: QuestionFiles, rated: bool = False) -> Tally:
    """The tally of one verdict file, or file of ratings."""
    rows = list(from_table(pq.read_table(io.BytesIO(storage.read_bytes(uri))), judge))
    if rated:
        return _tally_ratings(rows)
    by_id = {q.question_id: q for qs in questions.of({r.region_id for r in rows}).values() for q in qs}
    judged = list(with_questions(rows, by_id))
    verdicts = [v for r in rows for v in r.verdicts]
    return Tally(
        num_captions=len(rows), by_outcome=Counter(v.outcome for v in verdicts),
        unscored=Counter(str(v.reason) for v in verdicts if v.reason is not None),
        sheets={v: make_sheet(judged, strict=v == "strict") for v in VARIANTS},
        votes=[[x.choice for x in votes] for r in rows for votes in r.votes][:MAX_VOTES],
    )  # fmt: skip


def _tally_ratings(rows: list[JudgedCaption]) -> Tally:
    """Ratings as shares of 100, by patient and factor; a factor stands where the attribute does."""
    verdicts = [v for r in rows for v in r.verdicts]
    sheets = [
        Sheet(
            [Stratum(r.dataset, "positive", v.question_id.rpartition("/")[2])], [(r.dataset, r.cluster)],
            np.array([[float(v.choice) / 100]]), np.ones((1, 1)),
        )
        for r in rows
        for v in r.verdicts
        if v.choice is not None
    ]  # fmt: skip
    return Tally(
        num_captions=len(rows), by_outcome=Counter(v.outcome for v in verdicts),
        unscored=Counter(str(v.reason) for v in verdicts if v.reason is not None), sheets={RATED: add_sheets(sheets)},
    )  # fmt: skip


def add_sheets(sheets: list[Sheet]) -> Sheet:
    """The sheet of all questions of several; a patient's may be in more than one."""
    clusters = sorted({c for s in sheets for c in s.clusters})
    strata = sorted({x for s in sheets for x in s.strata}, key=lambda s: (s.dataset, s.polarity, s.attribute, s.value))
    rows, columns = {c: i for i, c in enumerate(clusters)}, {s: i for i, s in enumerate(strata)}
    right, asked = np.zeros((len(clusters), len(strata))), np.zeros((len(clusters), len(strata)))
    for sheet in sheets:
        at = np.ix_([rows[c] for c in sheet.clusters], [columns[s] for s in sheet.strata])
        right[at] += sheet.right_CS
        asked[at] += sheet.asked_CS
    return Sheet(
        strata, clusters, right, asked, dict(sum((Counter(s.unscored) for s in sheets), Counter[str]())),
        sum(s.num_questions for s in sheets), sum(s.num_hedged for s in sheets),
    )  # fmt: skip


def _tally(plan: Plan, slices: list[Slice]) -> dict[str, Tally]:
    import ray

    jobs = [{"of": s.of, "uri": s.out} for s in slices]
    questions, judge, rated = plan.questions, plan.judge, plan.cfg.judge == "llm-score"

    def count(row: dict[str, str]) -> dict[str, Any]:
        return {"of": row["of"], "tally": pickle.dumps(tally_file(row["uri"], judge, questions, rated))}

    if len(jobs) <= 4:  # not worth a task each
        found = [count(job) for job in jobs]
    else:
        found = list(ray.data.from_items(jobs).map(count, num_cpus=0.5).iter_rows())
    sets: dict[str, list[Tally]] = {s.of: [] for s in slices}
    for row in found:
        sets[row["of"]].append(pickle.loads(row["tally"]))  # of our own making
    return {of: Tally().add(tallies) for of, tallies in sets.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Figures


def _scores(tallies: dict[str, Tally]) -> dict[str, dict[str, SetScore]]:
    found: dict[str, dict[str, SetScore]] = {}
    for variant in VARIANTS:
        sets = {of: _set_score(t.sheets[variant]) for of, t in tallies.items() if t.sheets[variant].strata}
        ends = [sets[c].average.value for c in ("majority", "truth") if c in sets]
        if len(ends) == 2 and None not in ends:
            sets = {
                of: s.model_copy(update={"normalised": _number(normalised(s.average.value, *ends))})  # type: ignore[arg-type]
                if s.average.value is not None
                else s
                for of, s in sets.items()
            }
        found[variant] = sets
    return found


def _llm_score(sheet: Sheet) -> dict[str, Figure]:
    """The mean of the four factors, and each of them, with intervals over patients or images."""
    found = {"score": _figure(with_interval(sheet).positive)} if sheet.strata else {}
    for factor in FACTORS:
        chosen = [i for i, s in enumerate(sheet.strata) if s.attribute == factor]
        if chosen:
            strata = [sheet.strata[i] for i in chosen]
            part = Sheet(strata, sheet.clusters, sheet.right_CS[:, chosen], sheet.asked_CS[:, chosen])
            found[factor] = _figure(with_interval(part).positive)
    return found


def _set_score(sheet: Sheet) -> SetScore:
    score = with_interval(sheet)
    return SetScore(
        positive=_figure(score.positive), negative=_figure(score.negative), average=_figure(score.average),
        num_questions=score.num_questions, unscored=score.unscored,
    )  # fmt: skip


def _by_attribute(tally: Tally) -> list[dict[str, Any]]:
    """Shares right by dataset, polarity and attribute, values with equal weight."""
    groups: dict[tuple[str, str, str], dict[str, list[tuple[float, int]]]] = {}
    for variant in VARIANTS:
        for stratum, share, num in by_stratum(tally.sheets[variant]):
            groups.setdefault(_attribute(stratum), {}).setdefault(variant, []).append((share, num))
    return [
        {"dataset": dataset, "attribute": attribute, "polarity": polarity,
         **{v: sum(s for s, _ in cells) / len(cells) for v, cells in variants.items()},
         "num_questions": max(sum(n for _, n in cells) for cells in variants.values())}
        for (dataset, attribute, polarity), variants in sorted(groups.items())
    ]  # fmt: skip


def _attribute(stratum: Stratum) -> tuple[str, str, str]:
    return stratum.dataset, stratum.attribute, stratum.polarity


def _agreement(votes: list[list[str | None]]) -> dict[str, float]:
    if not votes:
        return {}
    alpha = krippendorff_alpha(list(zip(*votes, strict=True)))
    return {"alpha": alpha, "num_questions": len(votes)} if not math.isnan(alpha) else {}


def _figure(interval: Interval) -> Figure:
    return Figure(value=_number(interval.value), low=_number(interval.low), high=_number(interval.high))


def _number(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 6)


def _score_line(of: str, score: SetScore) -> str:
    figures = "  ".join(f"{_percent(f):<20}" for f in (score.positive, score.negative, score.average))
    known = "" if score.normalised is None or of in ("majority", "truth") else f"{score.normalised:.2f}"
    return f"  {of:<21}  {figures}  {known}".rstrip()


def _percent(figure: Figure) -> str:
    if figure.value is None:
        return "-"
    around = "" if figure.low is None or figure.high is None else f" [{100 * figure.low:.1f}, {100 * figure.high:.1f}]"
    return f"{100 * figure.value:.1f}{around}"


def _calls_line(calls: dict[str, float]) -> str:
    lost = f", at most {calls['num_lost']:,.0f} of them lost to kills and paid for twice" if calls["num_lost"] else ""
    failed = f", {calls['num_limited']:,.0f} rate-limited, {calls['num_failed']:,.0f} failed"
    return (
        f"{calls['num_calls']:,.0f} calls{failed}{lost}; {calls['num_tokens']:,.0f} tokens, "
        f"{calls['spent_usd']:,.4f} dollars"
    )
