"""Splits that leak nothing, dealt at ingest: `meddam ingest SOURCE --splits train=0.8,test=0.2`.

Between cutting the source into parts and turning them into shards, a Ray task a part reads each picture once to see
what it looks like (and whose it is, where only its header says so); the driver gathers five numbers an item, groups and
deals (meddam_core.datasets.splits), and the shards' tasks look their items' splits up.

Invariants:
- pixels are read by workers, never by the driver; the driver holds 56 bytes an item;
- the result is kept in `_work/splits.npy` until the ingest is complete: a resume deals nothing again.
"""

from __future__ import annotations

import io
import multiprocessing
import uuid
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from meddam_core import storage
from meddam_core.datasets.base import Source, SourceItem
from meddam_core.datasets.rows import RowRules
from meddam_core.datasets.splits import Features, deal, group_items, look_of, number_of, parse_shares
from meddam_core.records import RowError
from ray_jobs.ingest_parts import MAX_DEATHS, Splits, kept_together, read_groups, read_part

if TYPE_CHECKING:
    from ray_jobs.ingest_config import Config

Look = tuple[int, tuple[int, int, int, int], int, int]
"""Short and long hash, and the numbers of patient and study that the header names."""
_NOTHING: Look = (0, (0, 0, 0, 0), 0, 0)


def deal_splits(cfg: Config, source: Source, rules: RowRules, num_parts: int) -> Splits:
    """The splits of all items, dealt or found dealt already. Needs Ray."""
    assert cfg.splits is not None
    shares = parse_shares(cfg.splits)
    splits = Splits(uri=storage.join(cfg.out, "_work", "splits.npy"), names=tuple(shares))
    if not storage.exists(splits.uri):
        parts = _looked_at(LookAtPart(out=cfg.out, source=source, rules=rules), num_parts)
        features = Features.joined(parts)
        dealt = deal(group_items(features), features, shares, cfg.seed)
        rows = np.zeros((num_parts, cfg.images_per_shard), np.uint8)
        rows.ravel()[: len(dealt)] = dealt
        sink = io.BytesIO()
        np.save(sink, rows)
        storage.write_bytes(splits.uri, sink.getvalue())
    return splits


def _looked_at(part: LookAtPart, num_parts: int) -> list[Features]:
    import ray

    found: dict[int, Features] = {}
    for row in ray.data.range(num_parts, override_num_blocks=num_parts).map(part).iter_rows():
        names, patients, studies, short, long = (np.frombuffer(row[n], np.uint64) for n in Features.__slots__)
        found[int(row["id"])] = Features(names, patients, studies, short, long.reshape(-1, 4))
    return [found[number] for number in range(num_parts)]


@dataclass(frozen=True, slots=True, kw_only=True)
class LookAtPart:
    """What the items of a part look like; a Ray task for each part."""

    out: str
    source: Source
    rules: RowRules

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """{"id": part} -> its Features as bytes."""
        part = int(row["id"])
        attempts = storage.join(self.out, "_work", "looks", f"part-{part:06d}")
        careful = len(storage.list_objects(attempts + "/")) >= MAX_DEATHS
        storage.write_bytes(storage.join(attempts, uuid.uuid4().hex), b"")
        items = [item for _, item in read_part(self.out, part)]
        looks = list(self._in_children(items) if careful else map(self.look, items))
        for attempt in storage.list_objects(attempts + "/"):
            storage.delete(attempt.uri)
        patients, studies = read_groups(self.out, part)
        told = np.array([look[2:] for look in looks], np.uint64).reshape(-1, 2)
        names = [number_of(f"{self.rules.dataset}:{item.key}") for item in items]
        return {
            "id": part,
            "names": np.array(names, np.uint64).tobytes(),
            "patients": np.where(patients == 0, told[:, 0], patients).astype(np.uint64).tobytes(),
            "studies": np.where(studies == 0, told[:, 1], studies).astype(np.uint64).tobytes(),
            "short": np.array([look[0] for look in looks], np.uint64).tobytes(),
            "long": np.array([look[1] for look in looks], np.uint64).tobytes(),
        }

    def look(self, item: SourceItem) -> Look:
        """One item; what cannot be read looks like nothing, and becomes a reject later."""
        if any(problem.region is None for problem in item.problems):
            return _NOTHING
        try:
            decoded, _ = self.source.load(item, self.rules.limits)
        except RowError:
            return _NOTHING
        short, long = look_of(decoded.stored, decoded.photometric == "MONOCHROME1")
        salt, who = self.rules.image_secret, decoded.identity
        return short, long, kept_together(salt, who.patient_id), kept_together(salt, who.study_uid)

    def _in_children(self, items: list[SourceItem]) -> Iterator[Look]:
        """Each item in a process that may die over it."""
        pool: ProcessPoolExecutor | None = None
        for item in items:
            pool = pool or ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
            try:
                yield pool.submit(self.look, item).result()
            except BrokenProcessPool:
                pool = None
                yield _NOTHING
        if pool is not None:
            pool.shutdown()
