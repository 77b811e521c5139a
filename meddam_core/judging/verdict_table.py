"""The verdict table: one row a caption, the verdicts on its questions nested, as `meddam judge` writes it.

    RUN/judging/NAME/verdicts/set=run/captions-000000/rows-0000000.parquet

Notes:
- One-to-one over captions: every published caption has exactly one row, also where it failed or has no question.
- Text stays in the captions table; a verdict names what was asked by its question_id.
- A verdict without a choice has a reason; it is neither right nor wrong.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from meddam_core.judging.protocol import Outcome, Unscored, Verdict
from meddam_core.judging.scores import Judged
from qa_library.questions import Question

SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Vote:
    """What one member of a panel chose."""

    judge: str
    choice: str | None
    reason: Unscored | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgedCaption:
    """One row: a caption's identity, what it is weighed by, and its verdicts."""

    region_id: int
    prompt_id: str
    sample: int
    image_id: int
    dataset: str
    cluster: str
    """Patient key, or the image key where the patient is unknown: what resamples draw."""
    status: str
    """The caption's: ok, truncated, failed."""
    num_questions: int
    """0 where the region has no question in the table."""
    verdicts: list[Verdict] = field(default_factory=list)
    votes: list[list[Vote]] = field(default_factory=list)
    """For a panel: its members' votes, in the order of the verdicts; [] for a single judge."""

    @property
    def caption_key(self) -> str:
        """Which of the region's captions this is."""
        return f"{self.prompt_id}/{self.sample}"


_VOTE = pa.struct([("judge", pa.string()), ("choice", pa.string()), ("reason", pa.string())])
_VERDICT = pa.struct(
    [
        ("question_id", pa.string()),
        ("outcome", pa.string()),
        ("choice", pa.string()),
        ("reason", pa.string()),
        ("hedged", pa.bool_()),
        ("cached", pa.bool_()),
        ("num_prompt_tokens", pa.int32()),
        ("num_reply_tokens", pa.int32()),
        ("votes", pa.list_(_VOTE)),
    ]
)
VERDICT_SCHEMA = pa.schema(
    [
        pa.field("region_id", pa.int64(), nullable=False),
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("sample", pa.int32(), nullable=False),
        pa.field("image_id", pa.int64(), nullable=False),
        pa.field("dataset", pa.string()),
        pa.field("cluster", pa.string()),
        pa.field("status", pa.string()),
        pa.field("num_questions", pa.int32()),
        pa.field("verdicts", pa.list_(_VERDICT)),
    ],
    metadata={b"meddam.schema": b"JudgedCaption", b"meddam.schema_version": str(SCHEMA_VERSION).encode()},
)


def to_table(rows: Iterable[JudgedCaption]) -> pa.Table:
    """Rows as an Arrow table of VERDICT_SCHEMA."""
    return pa.Table.from_pylist([_plain(r) for r in rows], schema=VERDICT_SCHEMA)


def from_table(table: pa.Table, judge: str) -> Iterator[JudgedCaption]:
    """The rows of an Arrow table; `judge` is the id of the judge that made them.

    Raises ValueError for other columns.
    """
    if table.schema.names != VERDICT_SCHEMA.names:
        raise ValueError(f"this is no verdict table of version {SCHEMA_VERSION}: its columns are {table.schema.names}")
    for row in table.to_pylist():
        verdicts = row.pop("verdicts") or []
        votes = [[_vote(v) for v in verdict.pop("votes") or []] for verdict in verdicts]
        found = [_verdict(v, judge) for v in verdicts]
        yield JudgedCaption(**row, verdicts=found, votes=votes if any(votes) else [])


def with_questions(rows: Iterable[JudgedCaption], questions: Mapping[str, Question]) -> Iterator[Judged]:
    """Verdicts with their questions, as scores take them. Raises ValueError for a question that is not in the table."""
    for row in rows:
        for verdict in row.verdicts:
            question = questions.get(verdict.question_id)
            if question is None:
                raise ValueError("the verdicts were made with another question table than this one")
            yield Judged(question, verdict, row.cluster, row.caption_key)


def _plain(row: JudgedCaption) -> dict[str, Any]:
    votes = row.votes or [[] for _ in row.verdicts]
    values = {f.name: getattr(row, f.name) for f in dataclasses.fields(row) if f.name not in ("verdicts", "votes")}
    names = [n for n in _VERDICT.names if n != "votes"]
    verdicts = [
        {**{n: getattr(v, n) for n in names}, "votes": [dataclasses.asdict(x) for x in some]}
        for v, some in zip(row.verdicts, votes, strict=True)
    ]
    return {**values, "verdicts": verdicts}


def _verdict(row: dict[str, Any], judge: str) -> Verdict:
    outcome: Outcome = row.pop("outcome")
    reason = row.pop("reason")
    return Verdict(judge=judge, outcome=outcome, reason=None if reason is None else Unscored(reason), **row)


def _vote(row: dict[str, Any]) -> Vote:
    reason = row["reason"]
    return Vote(judge=row["judge"], choice=row["choice"], reason=None if reason is None else Unscored(reason))
