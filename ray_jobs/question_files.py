"""A question table on S3 or disk, read a few regions at a time.

    table = open_questions("s3://bucket/questions")
    table.of([17, 18])                     # {17: [Question, ...]}; regions without questions are not in it

    Q/questions/NAME.parquet               questions of one shard, in the order of region ids
    Q/summary.json                         how they were made, and what was not asked; written last

A single .parquet file of the same columns will do as well. Row groups hold about a thousand regions, and the index here
knows their ranges, so that memory holds the questions of the regions at hand and no others.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from meddam_core import storage
from qa_library.questions import QUESTION_SCHEMA, Question, from_table, to_table

SUMMARY = "summary.json"
GROUP_QUESTIONS = 8192
"""Questions of one row group."""


@dataclass(frozen=True, slots=True)
class _Group:
    """A row group, and the ids of the regions it holds."""

    uri: str
    index: int
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class QuestionFiles:
    """A question table by its index; small enough to send to every worker."""

    uri: str
    digest: str
    """Of the names and tags of its files: part of a judging's fingerprint."""
    groups: tuple[_Group, ...]
    num_questions: int

    def of(self, region_ids: Iterable[int]) -> dict[int, list[Question]]:
        """The questions of these regions, in the table's order."""
        wanted = np.unique(np.fromiter(region_ids, np.int64))
        found: dict[int, list[Question]] = {}
        if not len(wanted):
            return found
        for group in self.groups:
            start, end = np.searchsorted(wanted, [group.first, group.last + 1])
            if start == end:
                continue
            table = _read(group)
            keep = pc.is_in(table["region_id"], value_set=pa.array(wanted[start:end], pa.int64()))
            for question in from_table(table.filter(keep)):
                found.setdefault(question.region_id, []).append(question)
        return found

    def all(self) -> Iterator[Question]:
        """Every question, a row group in memory at a time."""
        for group in self.groups:
            yield from from_table(_read(group))

    def counts(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The regions that have questions, sorted, and how many each: 8 bytes a question while they are read."""
        ids = [np.asarray(_read(g, ["region_id"])["region_id"].to_numpy(), np.int64) for g in self.groups]
        return np.unique(np.concatenate(ids) if ids else np.empty(0, np.int64), return_counts=True)


def open_questions(uri: str) -> QuestionFiles:
    """The index of a question table: footers only. Raises ValueError where there is none, or one of other columns."""
    files = _files(uri)
    with ThreadPoolExecutor(16) as pool:
        indexed = list(pool.map(lambda o: _index(o.uri), files))
    lines = "\n".join(f"{o.uri.rpartition('/')[2]}\t{o.etag}" for o in files)
    groups = tuple(g for some, _ in indexed for g in some)
    num = sum(n for _, n in indexed)
    if not num:
        raise ValueError(f"{uri}: the question table is empty; its {SUMMARY} says what was not asked, and why")
    return QuestionFiles(uri, hashlib.sha256(lines.encode()).hexdigest()[:16], groups, num)


def write_questions(uri: str, questions: Sequence[Question]) -> None:
    """Puts one file of a question table, in the order of region ids."""
    sink = pa.BufferOutputStream()
    table = to_table(sorted(questions, key=lambda q: q.region_id))
    pq.write_table(table, sink, compression="zstd", row_group_size=GROUP_QUESTIONS, write_statistics=["region_id"])
    storage.write_bytes(uri, sink.getvalue().to_pybytes())


def _files(uri: str) -> list[storage.ObjectInfo]:
    folder = uri.rpartition("/")[0] if uri.endswith(".parquet") else storage.join(uri, "questions")
    if not uri.endswith(".parquet") and not storage.exists(storage.join(uri, SUMMARY)):
        raise ValueError(
            f"{uri} holds no finished question table: it has no {SUMMARY}; make one with `meddam qa build SHARDS --out`"
        )
    found = storage.list_objects((folder or ".") + "/", ".parquet")
    if uri.endswith(".parquet"):
        wanted = uri if storage.is_s3(uri) else storage.open_uri(uri)[1]
        found = [o for o in found if o.uri == wanted]
    if not found:
        raise ValueError(f"{uri}: there is no question table here; make one with `meddam qa build SHARDS --out`")
    return found


def _index(uri: str) -> tuple[list[_Group], int]:
    fs, path = storage.open_uri(uri)
    with fs.open_input_file(path) as stream:
        file = pq.ParquetFile(stream)
        if set(file.schema_arrow.names) != set(QUESTION_SCHEMA.names):
            raise ValueError(f"{uri} is no question table: its columns are {', '.join(file.schema_arrow.names)}")
        column = file.schema_arrow.names.index("region_id")
        groups = []
        for i in range(file.metadata.num_row_groups):
            statistics = file.metadata.row_group(i).column(column).statistics
            if statistics is None or not statistics.has_min_max:
                ids = file.read_row_group(i, columns=["region_id"])["region_id"]
                first, last = pc.min(ids).as_py(), pc.max(ids).as_py()
            else:
                first, last = statistics.min, statistics.max
            groups.append(_Group(uri, i, int(first), int(last)))
        return groups, file.metadata.num_rows


def _read(group: _Group, columns: list[str] | None = None) -> pa.Table:
    fs, path = storage.open_uri(group.uri)
    with fs.open_input_file(path) as stream:
        return pq.ParquetFile(stream).read_row_group(group.index, columns=columns)
