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
- Only decided verdicts are kept: never a refusal, an unparsable reply or a failed call.
- Keys are hashes: the cache holds no caption and no question. Memory: about 36 bytes a verdict.
"""

from __future__ import annotations

import hashlib
import io
import json
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from meddam_core import storage
from meddam_core.judging.protocol import Outcome, Verdict
from qa_library.questions import Question

KEY_BYTES = 16
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

    def __init__(self, uri: str, writer: str | None = None) -> None:
        self.uri = uri
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
        self._read: set[str] = set()
        self.refresh()

    def __len__(self) -> int:
        return len(self._keys) + len(self._own)

    def refresh(self) -> None:
        """Takes in what other writers have added."""
        latest: dict[str, tuple[str, str]] = {}
        for info in storage.list_files(storage.join(self.uri, "manifests"), suffix=".json"):
            writer, _, number = info.base_name.removesuffix(".json").rpartition("-")
            latest[writer] = max(latest.get(writer, ("", "")), (number, info.base_name))
        new: list[pa.Table] = []
        for writer, (number, _) in sorted(latest.items()):
            for part in self._manifest(writer, int(number)):
                name = str(part["name"])
                if name not in self._read:
                    self._read.add(name)
                    new += self._part(name, str(part["sha256"]))
        if new:
            self._merge(pa.concat_tables(new))

    def get(self, keys: Sequence[bytes], questions: Sequence[Question], judge: str) -> list[Verdict | None]:
        """Known verdicts, None where there is none; `questions` and `judge` are those of the keys."""
        return [self._verdict(key, q, judge) for key, q in zip(keys, questions, strict=True)]

    def put(self, verdicts: Mapping[bytes, Verdict]) -> int:
        """Keeps the decided ones among the verdicts; they are stored when this returns. Returns how many were new."""
        fresh = {k: v for k, v in verdicts.items() if v.choice is not None and self._find(k) is None}
        if not fresh:
            return 0
        number = len(self._parts) + 1
        content = _encode(fresh)
        name = f"{self.writer}-{number:06d}.parquet"
        storage.write_bytes(storage.join(self.uri, "parts", name), content)
        part: dict[str, str | int] = {"name": name, "rows": len(fresh), "sha256": hashlib.sha256(content).hexdigest()}
        manifest = {"format": FORMAT, "writer": self.writer, "parts": [*self._parts, part]}
        storage.write_bytes(
            storage.join(self.uri, "manifests", f"{self.writer}-{number:06d}.json"), json.dumps(manifest).encode()
        )
        self._parts.append(part)
        self._read.add(name)
        for key, verdict in fresh.items():
            self._own[key] = self._term(str(verdict.choice), verdict.hedged)
        return len(fresh)

    # -- reading -------------------------------------------------------------------------------------------------------

    def _manifest(self, writer: str, number: int) -> list[dict[str, str | int]]:
        """The parts that a writer's newest readable manifest names."""
        for n in range(number, 0, -1):
            try:
                raw = storage.read_bytes(storage.join(self.uri, "manifests", f"{writer}-{n:06d}.json"))
                content = json.loads(raw)
                if content["format"] != FORMAT:
                    raise ValueError("another format")
                return list(content["parts"])
            except (ValueError, KeyError, FileNotFoundError):  # half-written where a store shows such things
                self.num_passed_over += 1
        return []

    def _part(self, name: str, sha256: str) -> list[pa.Table]:
        try:
            raw = storage.read_bytes(storage.join(self.uri, "parts", name))
        except FileNotFoundError:
            raw = b""
        if hashlib.sha256(raw).hexdigest() != sha256:
            self.num_passed_over += 1
            return []
        return [pq.read_table(io.BytesIO(raw), columns=["key", "choice", "hedged"])]

    def _merge(self, table: pa.Table) -> None:
        """Adds rows to the sorted keys; the first of equal keys stays."""
        keys = np.asarray([k.hex() for k in table.column("key").to_pylist()], dtype=self._keys.dtype)
        pairs = zip(table.column("choice").to_pylist(), table.column("hedged").to_pylist(), strict=True)
        values = np.asarray([self._term(choice, hedged) for choice, hedged in pairs], dtype=np.uint32)
        keys, values = np.concatenate([self._keys, keys]), np.concatenate([self._values, values])
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


def _encode(verdicts: Mapping[bytes, Verdict]) -> bytes:
    rows: Iterable[dict[str, object]] = (
        {
            "key": key,
            "choice": v.choice,
            "hedged": v.hedged,
            "judge": v.judge,
            "num_prompt_tokens": v.num_prompt_tokens,
            "num_reply_tokens": v.num_reply_tokens,
        }
        for key, v in verdicts.items()
    )
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(list(rows), schema=SCHEMA), sink, compression="zstd")
    return sink.getvalue()
