"""Work parts of an ingest: a stream of items cut into files on the driver, each turned into one shard by one task.

    OUT/_work/part-000012.parquet           items by ordinal, in JSON; what identifies a patient is hashed already
    OUT/_work/attempts/part-000012/*        tasks that began and did not end: after two, the part is worked on carefully
    OUT/shards/shard-000012.parquet         the images, ids 12 << 24 | row; part 12 unless --first-shard shifts them
    OUT/rejected/rejected-000012.parquet    what became no row, and why; absent where there is nothing

Invariants:
- a part holds a fixed number of items, so the driver's memory and a task's do not grow with the dataset;
- a task's output is a function of its part and the plan: done twice it is the same, and a shard that is there with the
  plan's fingerprint is not done again;
- the shard is written last: where it stands, the part is finished, and its counts are in the shard's own metadata.
"""

from __future__ import annotations

import dataclasses
import io
import json
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from meddam_core import storage
from meddam_core.datasets.base import Source, SourceItem
from meddam_core.datasets.careful import Outcome, rows_in_children
from meddam_core.datasets.npy_rows import NpyRows
from meddam_core.datasets.rows import REJECTED_SCHEMA, Rejected, RowRules, rows_of
from meddam_core.datasets.splits import number_of
from meddam_core.imaging.deidentify import keyed_hash
from meddam_core.records import Image, from_row
from meddam_core.shards import shard_metadata, write_shard

FINGERPRINT = "meddam.ingest_fingerprint"
COUNTS = "meddam.ingest_counts"
MAX_DEATHS = 2
"""Tasks of a part that may vanish before its items are worked on in child processes."""

_PART_SCHEMA = pa.schema(
    [
        ("ordinal", pa.int64()),
        ("item", pa.string()),
        ("data", pa.large_binary()),
        ("patient", pa.uint64()),  # keyed numbers, for dealing splits where no secret lets the hashes stay
        ("study", pa.uint64()),
    ]
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PartCounts:
    """What became of a part."""

    part: int
    num_items: int
    num_images: int
    num_regions: int
    rejected_images: dict[str, int]
    rejected_regions: dict[str, int]
    splits: dict[str, int]
    modalities: dict[str, int]
    recipes: dict[str, int]


def write_parts(out: str, items: Iterable[SourceItem], items_per_part: int, secret: bytes | None, salt: bytes) -> int:
    """Cuts the stream into part files; returns how many. Patient and study ids are hashed before they are written.

    `salt` keys the numbers by which items of one patient are kept in one split; without a secret it is thrown away.
    """
    number = 0
    for number, group in enumerate(_grouped(items, items_per_part), start=1):
        first = (number - 1) * items_per_part
        rows = [
            {
                "ordinal": first + i,
                "item": json.dumps(_plain(_hashed(item, secret))),
                "data": item.data,
                "patient": kept_together(salt, item.patient_id, item.patient_key),
                "study": kept_together(salt, item.study_id, item.study_key),
            }
            for i, item in enumerate(group)
        ]
        sink = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows, schema=_PART_SCHEMA), sink)
        storage.write_bytes(part_uri(out, number - 1), sink.getvalue())
    return number


def read_part(out: str, part: int) -> Iterator[tuple[int, SourceItem]]:
    """(ordinal, item) of a part, in order."""
    table = pq.read_table(io.BytesIO(storage.read_bytes(part_uri(out, part))))
    for row in table.to_pylist():
        yield row["ordinal"], from_row(SourceItem, {**json.loads(row["item"]), "data": row["data"]})


def read_groups(out: str, part: int) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """The keyed numbers of the patients and studies of a part's items; 0 where unknown."""
    columns = ["patient", "study"]
    table = pq.read_table(io.BytesIO(storage.read_bytes(part_uri(out, part))), columns=columns)
    patients, studies = (np.asarray(table[name].to_numpy(), np.uint64) for name in columns)
    return patients, studies


def kept_together(salt: bytes, identifier: str | None, key: str | None = None) -> int:
    """A number that stands for a patient or study; 0 where there is none."""
    if identifier:
        return number_of(keyed_hash(salt, f"split:{identifier}"))
    return number_of(key) if key else 0


def part_uri(out: str, part: int) -> str:
    """Where a part's items are."""
    return storage.join(out, "_work", f"part-{part:06d}.parquet")


def shard_uri(out: str, shard: int) -> str:
    """Where the images of a shard go."""
    return storage.join(out, "shards", f"shard-{shard:06d}.parquet")


@dataclass(frozen=True, slots=True, kw_only=True)
class Splits:
    """The split that each item was dealt (ray_jobs.ingest_splits)."""

    uri: str
    """A .npy array of uint8, a row a part."""
    names: tuple[str, ...]

    def given(self, part: int, items: Iterator[tuple[int, SourceItem]]) -> Iterator[tuple[int, SourceItem]]:
        """The items of a part, each with its split."""
        row = NpyRows(self.uri).read(part)
        for at, (ordinal, item) in enumerate(items):
            yield ordinal, replace(item, split=self.names[int(row[at])])


@dataclass(frozen=True, slots=True, kw_only=True)
class IngestPart:
    """Turns a part into a shard; a Ray task for each part."""

    out: str
    source: Source
    rules: RowRules
    fingerprint: str
    splits: Splits | None = None
    """Where items were dealt splits of their own."""
    first_shard: int = 0
    """Number of the first part's shard, from which its images' ids follow."""

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """{"id": part} -> {"counts": JSON of PartCounts}."""
        part = int(row["id"])
        uri = shard_uri(self.out, self.first_shard + part)
        found = shard_metadata(uri)
        if found is not None and found.get(FINGERPRINT) == self.fingerprint:
            return {"counts": found[COUNTS]}
        attempts = storage.join(self.out, "_work", "attempts", f"part-{part:06d}")
        deaths = [o.uri for o in storage.list_objects(attempts + "/")]
        storage.write_bytes(storage.join(attempts, uuid.uuid4().hex), b"")
        counts = self._work(part, uri, careful=len(deaths) >= MAX_DEATHS)
        for attempt in storage.list_objects(attempts + "/"):
            storage.delete(attempt.uri)
        return {"counts": counts}

    def _work(self, part: int, uri: str, careful: bool) -> str:
        """Writes the shard, an item at a time; its rejects just before it appears. Returns the counts as JSON."""
        tally = _Tally(part)
        items = read_part(self.out, part)
        if self.splits is not None:
            items = self.splits.given(part, items)
        shard = self.first_shard + part
        outcomes = rows_in_children(self.source, items, self.rules, shard) if careful else self._outcomes(shard, items)

        def metadata() -> dict[str, str]:
            self._write_rejected(part, tally.rejected)
            return {FINGERPRINT: self.fingerprint, COUNTS: tally.json()}

        write_shard(uri, tally.images(outcomes), metadata)
        return tally.json()

    def _outcomes(self, shard: int, items: Iterator[tuple[int, SourceItem]]) -> Iterator[Outcome]:
        row = 0
        for ordinal, item in items:
            outcome = rows_of(self.source, item, ordinal=ordinal, rules=self.rules, shard=shard, first_row=row)
            row += len(outcome[0])
            yield outcome

    def _write_rejected(self, part: int, rejected: list[Rejected]) -> None:
        uri = storage.join(self.out, "rejected", f"rejected-{part:06d}.parquet")
        if not rejected:
            storage.delete(uri)
            return
        table = pa.Table.from_pylist([dataclasses.asdict(r) for r in rejected], schema=REJECTED_SCHEMA)
        sink = io.BytesIO()
        pq.write_table(table, sink)
        storage.write_bytes(uri, sink.getvalue())


class _Tally:
    """Counts what goes by, and keeps the rejects of one part."""

    def __init__(self, part: int) -> None:
        self.part = part
        self.rejected: list[Rejected] = []
        self._items = self._images = self._regions = 0
        self._splits: Counter[str] = Counter()
        self._modalities: Counter[str] = Counter()
        self._recipes: Counter[str] = Counter()

    def images(self, outcomes: Iterable[Outcome]) -> Iterator[Image]:
        """The rows of the outcomes, counted."""
        for images, rejected in outcomes:
            self._items += 1
            self.rejected += rejected
            for image in images:
                self._images += 1
                self._regions += len(image.regions)
                self._splits[image.split] += 1
                self._modalities[image.modality] += 1
                self._recipes[image.recipe] += 1
                yield image

    def json(self) -> str:
        """The counts as they are stored."""
        whole = Counter(str(r.reason) for r in self.rejected if r.region is None)
        single = Counter(str(r.reason) for r in self.rejected if r.region is not None)
        counts = PartCounts(
            part=self.part, num_items=self._items, num_images=self._images, num_regions=self._regions,
            rejected_images=dict(whole), rejected_regions=dict(single), splits=dict(self._splits),
            modalities=dict(self._modalities), recipes=dict(self._recipes),
        )  # fmt: skip
        return json.dumps(dataclasses.asdict(counts), sort_keys=True)


def _hashed(item: SourceItem, secret: bytes | None) -> SourceItem:
    """The item with keys in place of patient and study ids: the files of `_work` hold none."""
    return replace(
        item,
        data=None,
        patient_id=None,
        study_id=None,
        patient_key=keyed_hash(secret, f"patient:{item.patient_id}") if secret and item.patient_id else None,
        study_key=keyed_hash(secret, f"study:{item.study_id}") if secret and item.study_id else None,
    )


def _plain(item: SourceItem) -> dict[str, Any]:
    return {name: value for name, value in dataclasses.asdict(item).items() if name != "data"}


def _grouped(items: Iterable[SourceItem], size: int) -> Iterator[list[SourceItem]]:
    group: list[SourceItem] = []
    for item in items:
        group.append(item)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group
