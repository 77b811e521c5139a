"""What is counted of verdict files: right answers and answers by patient and stratum, outcomes, votes.

A file a task; tallies add up, so that the driver never holds a verdict.
"""

from __future__ import annotations

import dataclasses
import io
import pickle
from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from meddam_core import storage
from meddam_core.judging.scores import Sheet, Stratum, make_sheet
from meddam_core.judging.verdict_table import JudgedCaption, from_table, with_questions
from ray_jobs.judge_plan import Plan, Slice
from ray_jobs.question_files import QuestionFiles

VARIANTS = ("paper", "strict")
RATED = "rated"
MAX_VOTES = 20_000
"""Questions from which a panel's agreement is computed."""


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


def tally(plan: Plan, slices: list[Slice]) -> dict[str, Tally]:
    """The tally of each set. Needs Ray."""
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
