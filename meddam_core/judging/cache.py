"""Verdicts by the hash of what they depend on, so that no question about the same words is paid for twice.

    cache = VerdictCache("s3://bucket/verdicts")
    known = cache.get([key_of(judge.id, q, caption) for ...])
    cache.put({key: verdict, ...})                 # on the store before it returns

Layout, whole new objects only: nothing is appended to, replaced or locked, so S3 and NFS serve alike.
    parts/WRITER-000001.parquet       a batch of verdicts
    manifests/WRITER-000001.json      the names of all of this writer's parts up to here, with row counts and hashes

Notes:
- A part counts once a manifest names it. A part without one, or of another hash, was not finished: it is passed over.
- Any number of writers may write at once: each object has a name of its own. What others add is seen after `refresh`.
- A writer puts its small parts together now and then: a whole new part, a new manifest, and only then the old ones go.
- Only decided verdicts are kept: never a refusal, an unparsable reply or a failed call. (`keep_unscored` is for a run's
  own ledger.)
- Keys are hashes: the cache holds no caption and no question. Memory: about 36 bytes a verdict.
"""

from __future__ import annotations

import hashlib
import io
import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from meddam_core import storage
from meddam_core.judging.protocol import Outcome, Unscored, Verdict, unscored
from qa_library.questions import Question

KEY_BYTES = 16
MERGE_PARTS = 32
"""Parts of like size that are put together."""
FOLD_AT = 65_536
"""Own verdicts that are kept in a dict, before they join the sorted arrays."""
_NO_CHOICE = "!"
"""Before the reason of an unscored verdict, in the place of a choice."""
FORMAT = 1
SCHEMA = pa.schema(
    [
        pa.field("key", pa.binary(KEY_BYTES), nullable=False),
        pa.field("choice", pa.string(), nullable=False),
        pa.field("hedged", pa.bool_(), nullable=False),
        pa.field("judge", pa.string(), nullable=False),
        pa.field("num_prompt_tokens", pa.int32()),
        pa.field("num_reply_tokens", pa.int32()),
    ]
)


def key_of(judge: str, question: Question, caption: str) -> bytes:
    """Hash of all that a verdict depends on: the judge, the question with its options in their order, the caption.

    Not of the region, the expectation or the question's id: the same words get the same verdict anywhere.
    """
    options = [[o.id, o.text] for o in question.options]
    what = [FORMAT, judge, question.template_id, question.attribute, question.value, question.kind, question.truth]
    content = json.dumps([*what, question.text, options, caption], ensure_ascii=True)
    return hashlib.sha256(content.encode()).digest()[:KEY_BYTES]


class VerdictCache:
    """A folder of verdicts. One object a process; not thread-safe."""

    def __init__(self, uri: str, writer: str | None = None, *, keep_unscored: bool = False) -> None:
        self.uri = uri
        self.keep_unscored = keep_unscored
        if not (writer or "w").isalnum():
            raise ValueError(f"the writer's name {writer!r} may hold letters and digits only")
        self.writer = f"{writer or 'w'}{uuid.uuid4().hex[:10]}"  # one that comes back must not write over its own files
        self.num_passed_over = 0
        """Manifests and parts that could not be used."""
        self._keys: NDArray[np.bytes_] = np.empty(0, dtype=f"S{KEY_BYTES * 2}")
        self._values: NDArray[np.uint32] = np.empty(0, dtype=np.uint32)
        self._terms: list[tuple[str, bool]] = []
        self._term_index: dict[tuple[str, bool], int] = {}
        self._own: dict[bytes, int] = {}
        self._parts: list[dict[str, str | int]] = []
        self._number = 0
        self._oldest = 1
        self._read: set[str] = set()
        self.refresh()

    def __len__(self) -> int:
        return len(self._keys) + len(self._own)

    def refresh(self) -> None:
        """Takes in what other writers have added."""
        for _ in range(3):  # a part that is gone was put together with others, as a newer manifest says
            if self._refresh():
                return
        self.num_passed_over += 1

    def _refresh(self) -> bool:
        """One look at the manifests; False when a part that one names is gone."""
        complete = True
        latest: dict[str, tuple[str, str]] = {}
        for info in storage.list_files(storage.join(self.uri, "manifests"), suffix=".json"):
            writer, _, number = info.base_name.removesuffix(".json").rpartition("-")
            latest[writer] = max(latest.get(writer, ("", "")), (number, info.base_name))
        new: list[pa.Table] = []
        for writer, (number, _) in sorted(latest.items()):
            for part in self._manifest(writer, int(number)):
                name = str(part["name"])
                if name not in self._read:
                    content = self._part(name)
                    complete &= content is not None
                    if content is not None:
                        self._read.add(name)
                        new += self._table(content, str(part["sha256"]))
        if new:
            self._merge(pa.concat_tables(new))
        return complete

    def get(self, keys: Sequence[bytes], questions: Sequence[Question], judge: str) -> list[Verdict | None]:
        """Known verdicts, None where there is none; `questions` and `judge` are those of the keys."""
        return [self._verdict(key, q, judge) for key, q in zip(keys, questions, strict=True)]

    def put(self, verdicts: Mapping[bytes, Verdict]) -> int:
        """Keeps the decided ones among the verdicts; they are stored when this returns. Returns how many were new."""
        wanted = {k: v for k, v in verdicts.items() if v.choice is not None or self.keep_unscored}
        fresh = {k: v for k, v in wanted.items() if self._find(k) is None}
        if not fresh:
            return 0
        self._write(pa.Table.from_pylist([_row(k, v) for k, v in fresh.items()], schema=SCHEMA), self._parts, 0)
        for key, verdict in fresh.items():
            self._own[key] = self._term(_choice(verdict), verdict.hedged)
        if len(self._own) >= FOLD_AT:
            self._fold(np.asarray([k.hex() for k in self._own]), np.asarray(list(self._own.values())))
            self._own = {}
        self._put_together()
        return len(fresh)

    def _write(self, table: pa.Table, beside: Sequence[dict[str, str | int]], level: int) -> None:
        """One new part and the manifest that names it with those `beside` it."""
        self._number += 1
        sink = io.BytesIO()
        pq.write_table(table, sink, compression="zstd")
        content = sink.getvalue()
        name = f"{self.writer}-{self._number:06d}.parquet"
        storage.write_bytes(storage.join(self.uri, "parts", name), content)
        part: dict[str, str | int] = {"name": name, "rows": table.num_rows, "level": level}
        part["sha256"] = hashlib.sha256(content).hexdigest()
        manifest = {"format": FORMAT, "writer": self.writer, "parts": [*beside, part]}
        storage.write_bytes(self._manifest_uri(self.writer, self._number), json.dumps(manifest).encode())
        self._parts = [*beside, part]
        self._read.add(name)

    def _put_together(self) -> None:
        """Makes one part of the newest ones of a level when they are many, so that objects stay few."""
        while len(self._parts) >= MERGE_PARTS:
            tail = self._parts[-MERGE_PARTS:]
            if len({p["level"] for p in tail}) > 1:
                return
            contents = [self._part(str(p["name"])) for p in tail]
            if any(c is None for c in contents):
                return
            tables = [
                t for c, p in zip(contents, tail, strict=True) for t in self._table(c or b"", str(p["sha256"]), True)
            ]
            self._write(pa.concat_tables(tables), self._parts[:-MERGE_PARTS], int(tail[0]["level"]) + 1)
            for part in tail:
                storage.delete(storage.join(self.uri, "parts", str(part["name"])))
            for number in range(self._oldest, self._number - 1):  # the newest two stay
                storage.delete(self._manifest_uri(self.writer, number))
            self._oldest = self._number - 1

    def _manifest_uri(self, writer: str, number: int) -> str:
        return storage.join(self.uri, "manifests", f"{writer}-{number:06d}.json")

    # -- reading -------------------------------------------------------------------------------------------------------

    def _manifest(self, writer: str, number: int) -> list[dict[str, str | int]]:
        """The parts that a writer's newest readable manifest names."""
        for n in range(number, 0, -1):
            try:
                raw = storage.read_bytes(self._manifest_uri(writer, n))
                content = json.loads(raw)
                if content["format"] != FORMAT:
                    raise ValueError("another format")
                return list(content["parts"])
            except (ValueError, KeyError, FileNotFoundError):  # half-written where a store shows such things
                self.num_passed_over += 1
        return []

    def _part(self, name: str) -> bytes | None:
        try:
            return storage.read_bytes(storage.join(self.uri, "parts", name))
        except FileNotFoundError:
            return None

    def _table(self, content: bytes, sha256: str, whole: bool = False) -> list[pa.Table]:
        if hashlib.sha256(content).hexdigest() != sha256:
            self.num_passed_over += 1
            return []
        return [pq.read_table(io.BytesIO(content), columns=None if whole else ["key", "choice", "hedged"])]

    def _merge(self, table: pa.Table) -> None:
        """Adds rows to the sorted keys; the first of equal keys stays."""
        keys = np.asarray([k.hex() for k in table.column("key").to_pylist()], dtype=self._keys.dtype)
        pairs = zip(table.column("choice").to_pylist(), table.column("hedged").to_pylist(), strict=True)
        self._fold(keys, np.asarray([self._term(choice, hedged) for choice, hedged in pairs]))

    def _fold(self, keys: NDArray[Any], values: NDArray[Any]) -> None:
        keys = np.concatenate([self._keys, keys.astype(self._keys.dtype)])
        values = np.concatenate([self._values, values.astype(np.uint32)])
        self._keys, first = np.unique(keys, return_index=True)
        self._values = values[first]

    def _term(self, choice: str, hedged: bool) -> int:
        term = (choice, hedged)
        if term not in self._term_index:
            self._term_index[term] = len(self._terms)
            self._terms.append(term)
        return self._term_index[term]

    def _find(self, key: bytes) -> int | None:
        if key in self._own:
            return self._own[key]
        wanted = key.hex().encode()
        at = int(np.searchsorted(self._keys, wanted))
        if at < len(self._keys) and self._keys[at] == wanted:
            return int(self._values[at])
        return None

    def _verdict(self, key: bytes, question: Question, judge: str) -> Verdict | None:
        found = self._find(key)
        if found is None:
            return None
        choice, hedged = self._terms[found]
        if choice.startswith(_NO_CHOICE):
            return replace(unscored(question, Unscored(choice[len(_NO_CHOICE) :]), judge), cached=True)
        outcome: Outcome = "correct" if choice in question.expected else "wrong"
        return Verdict(
            question_id=question.question_id, judge=judge, outcome=outcome, choice=choice, hedged=hedged, cached=True
        )


def as_cached(verdict: Verdict, question: Question) -> Verdict:
    """A verdict on the same words for another question row (another region's)."""
    outcome: Outcome = (
        "unscored" if verdict.choice is None else "correct" if verdict.choice in question.expected else "wrong"
    )
    return replace(verdict, question_id=question.question_id, outcome=outcome, cached=True)


def _choice(verdict: Verdict) -> str:
    return f"{_NO_CHOICE}{verdict.reason}" if verdict.choice is None else verdict.choice


def _row(key: bytes, verdict: Verdict) -> dict[str, object]:
    return {
        "key": key,
        "choice": _choice(verdict),
        "hedged": verdict.hedged,
        "judge": verdict.judge,
        "num_prompt_tokens": verdict.num_prompt_tokens,
        "num_reply_tokens": verdict.num_reply_tokens,
    }
