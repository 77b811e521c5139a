"""How a judging ended: what was judged, what it cost, and the scores with their controls and assumptions.

Scores are tallied a verdict file a task: the driver holds right answers and answers by patient and stratum only.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from meddam_core.judging.llm_score import BASIS, FACTORS
from meddam_core.judging.scores import ASSUMPTIONS, Sheet, Stratum, by_stratum, normalised, with_interval
from meddam_core.judging.statistics import Interval, agreement, krippendorff_alpha
from ray_jobs.judge_config import RETEST
from ray_jobs.judge_plan import Plan, Slice
from ray_jobs.judge_tally import RATED, VARIANTS, Tally, tally
from ray_jobs.judging_directory import RUN_SET
from ray_jobs.run_directory import SUMMARY
from ray_jobs.summary import EXIT_INCOMPLETE, EXIT_STOPPED


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
    retest: dict[str, float] = {}
    """How often a model gave the same verdict when it was asked again: share, interval, alpha, unscored."""
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
        if self.retest:
            text.append(f"asked again, the judge agrees with itself on {100 * self.retest['same']:.1f} % of "
                        f"{self.retest['num_questions']:,} questions")  # fmt: skip
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
    done = {uri for of in (RUN_SET, *plan.cfg.extra_sets) for uri in plan.judging.verdict_files(of)}
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
        tallies = tally(plan, slices)
        own = tallies[RUN_SET]
        rated = plan.cfg.judge == "llm-score"
        figures: dict[str, Any] = (
            {"llm_score": _llm_score(own.sheets[RATED]), "basis": BASIS} if rated else
            {"scores": _scores(tallies), "by_attribute": _by_attribute(own), "agreement": _agreement(own.votes),
             "retest": _retest(plan) if plan.cfg.retest else {}}
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
# Figures


def _scores(tallies: dict[str, Tally]) -> dict[str, dict[str, SetScore]]:
    found: dict[str, dict[str, SetScore]] = {}
    for variant in VARIANTS:
        sheets = {of: t.sheets[variant] for of, t in tallies.items() if of != RETEST}
        sets = {of: _set_score(sheet) for of, sheet in sheets.items() if sheet.strata}
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


def _retest(plan: Plan) -> dict[str, float]:
    """Verdicts of the two times, on the captions that were judged twice."""

    def chosen(of: str) -> Iterator[tuple[tuple[int, str, str], str | None]]:
        for row in plan.judging.rows(of):
            for verdict in row.verdicts:
                yield (row.region_id, row.caption_key, verdict.question_id), verdict.choice

    second = dict(chosen(RETEST))
    first = {key: choice for key, choice in chosen(RUN_SET) if key in second}
    keys = sorted(first)
    if not any(first[k] is not None and second[k] is not None for k in keys):
        return {}
    found = agreement([first[k] for k in keys], [second[k] for k in keys])
    return {
        "num_questions": found.num_items, "same": found.same.value, "same_low": found.same.low,
        "same_high": found.same.high, "num_unscored": found.num_unscored,
        **({} if math.isnan(found.alpha) else {"alpha": found.alpha}),
    }  # fmt: skip


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
