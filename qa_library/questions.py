"""A question as a row: what is asked about a region's caption, the options, and which of them are right.

Notes:
- The text and the options are the same for a true and a false statement: nothing tells a judge what is expected.
- `expected` are the options that are right as the paper counts; `strict_expected` those that are right in the strict
  variant, where moreover the recognition question of the region must be right.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa

SCHEMA_VERSION = 1
Polarity = Literal["recognition", "positive", "negative"]
QuestionKind = Literal["recognition", "presence", "choice", "measure"]
Source = Literal["recognition", "truth", "confuser", "elsewhere", "wrong_value", "opposite_side", "absent"]
"""Where a question comes from: the region's own truth, or one of the kinds of plausible negatives."""

STATED = "stated"
OTHERWISE = "otherwise"
NOT_MENTIONED = "not_mentioned"
YES = "yes"
NO = "no"


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One answer that a judge may choose."""

    id: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One question about the caption of one region."""

    question_id: str
    region_id: int
    dataset: str
    template_id: str
    """Template set, attribute and version: "vindr_cxr/finding@1"."""
    attribute: str
    value: str
    """The value asked about; for an exclusive choice the true one."""
    kind: QuestionKind
    polarity: Polarity
    source: Source
    text: str
    options: tuple[Option, ...]
    expected: tuple[str, ...]
    strict_expected: tuple[str, ...]
    why: str
    """What makes the expectation true."""
    truth: float | None = None
    """For a measure: the length in mm."""

    @property
    def template_set(self) -> str:
        """The id of the template set."""
        return self.template_id.split("/", 1)[0]

    @property
    def option_ids(self) -> list[str]:
        """The options in their order."""
        return [option.id for option in self.options]


_TEXTS = pa.list_(pa.string())
QUESTION_SCHEMA = pa.schema(
    [
        pa.field("question_id", pa.string(), nullable=False),
        pa.field("region_id", pa.int64(), nullable=False),
        *(
            pa.field(n, pa.string())
            for n in ("dataset", "template_id", "attribute", "value", "kind", "polarity", "source")
        ),
        pa.field("text", pa.string()),
        pa.field("options", pa.list_(pa.struct([pa.field("id", pa.string()), pa.field("text", pa.string())]))),
        pa.field("expected", _TEXTS),
        pa.field("strict_expected", _TEXTS),
        pa.field("why", pa.string()),
        pa.field("truth", pa.float64()),
    ],
    metadata={b"meddam.schema": b"Question", b"meddam.schema_version": str(SCHEMA_VERSION).encode()},
)


def to_table(questions: Iterable[Question]) -> pa.Table:
    """Questions as an Arrow table of QUESTION_SCHEMA."""
    return pa.Table.from_pylist([dataclasses.asdict(q) for q in questions], schema=QUESTION_SCHEMA)


def from_table(table: pa.Table) -> list[Question]:
    """The questions of an Arrow table. Raises ValueError when columns are missing or unknown."""
    if set(table.column_names) != set(QUESTION_SCHEMA.names):
        differing = sorted(set(table.column_names) ^ set(QUESTION_SCHEMA.names))
        raise ValueError(f"this is no question table of version {SCHEMA_VERSION}: the columns {differing} differ")
    return [from_row(row) for row in table.to_pylist()]


def from_row(row: dict[str, Any]) -> Question:
    """One question from a row of the table."""
    options = tuple(Option(**o) for o in row["options"])
    fields = {**row, "options": options}
    fields |= {name: tuple(row[name]) for name in ("expected", "strict_expected")}
    return Question(**fields)


def to_json(questions: Sequence[Question]) -> str:
    """One JSON object a line, ids as strings."""
    return "".join(json.dumps({**dataclasses.asdict(q), "region_id": str(q.region_id)}) + "\n" for q in questions)
