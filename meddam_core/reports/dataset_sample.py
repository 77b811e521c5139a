"""A seeded, bounded sample of regions, drawn for each label while shards stream by.

Each region has a number that depends on the seed and its id alone, and each label keeps its smallest numbers: so the
sample does not depend on how rows lie in files, and one pass with bounded memory is enough. An image without regions
stands for itself, under its own labels.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass
from itertools import chain, zip_longest

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from meddam_core.records import REGION_BITS

MAX_LABELS = 1000
"""Labels that are sampled; further ones are not."""
NOT_SHOWN = ("absent", "undecided")
"""Values that regions are not drawn for; nor are they for numbers, of which each may be another."""
UNLABELLED = "(no label)"


@dataclass(frozen=True, slots=True, order=True)
class Drawn:
    """A region that was drawn."""

    number: int
    image_id: int
    ordinal: int | None
    """Which of the image's regions; None for an image without any."""


class RegionSample:
    """Regions to show, some for each label.

    Args:
        num_shown: regions in all.
        seed: another seed, another sample.
    """

    def __init__(self, num_shown: int, seed: int = 0) -> None:
        self.num_shown = num_shown
        self._salt = np.uint64(int.from_bytes(hashlib.blake2b(f"{seed}".encode(), digest_size=8).digest(), "big"))
        self._drawn: dict[str, list[Drawn]] = {}
        self._seen: Counter[str] = Counter()

    def add(self, rows: pa.Table) -> None:
        """Considers a table with the columns of `dataset_tally.TALLY_COLUMNS`."""
        if not self.num_shown:
            return
        regions = rows["regions"].combine_chunks()
        lengths = np.asarray(pc.fill_null(pc.list_value_length(regions), 0))
        flat = pc.list_flatten(regions)
        if len(flat):
            ids = np.asarray(pc.struct_field(flat, "region_id"))
            self._draw(ids, pc.struct_field(flat, "labels"), with_region=True)
        bare = lengths == 0
        if bare.any():
            ids = rows["image_id"].to_numpy()[bare] << REGION_BITS
            self._draw(ids, rows["labels"].combine_chunks().filter(pa.array(bare)), with_region=False)

    def shown(self) -> list[tuple[Drawn, str]]:
        """At most `num_shown` regions, each once, with the label each was drawn for: one of each label in turn."""
        order = [label for label, _ in sorted(self._seen.items(), key=lambda i: (i[0] == UNLABELLED, -i[1], i[0]))]
        turns = chain.from_iterable(zip_longest(*([(d, label) for d in self._drawn[label]] for label in order)))
        chosen: dict[tuple[int, int | None], tuple[Drawn, str]] = {}
        for turn in turns:
            if turn is not None and len(chosen) < self.num_shown:
                chosen.setdefault((turn[0].image_id, turn[0].ordinal), turn)
        return list(chosen.values())

    def _draw(self, ids: NDArray[np.int64], labels: pa.ListArray, with_region: bool) -> None:
        numbers = self._numbers(ids)
        owner = np.asarray(pc.list_parent_indices(labels))
        flat = pc.list_flatten(labels)
        names = pc.struct_field(flat, "name").to_pylist() if len(flat) else []
        values = pc.struct_field(flat, "value").to_pylist() if len(flat) else []
        members: dict[str, list[int]] = {}
        for at, name, value in zip(owner.tolist(), names, values, strict=True):
            if value not in NOT_SHOWN and not _is_number(value):
                members.setdefault(name if value == "present" else f"{name}: {value}", []).append(at)
        bare = set(range(len(ids))).difference(*members.values())
        if bare:
            members[UNLABELLED] = sorted(bare)
        for label, at in members.items():
            self._keep(label, numbers[at], ids[at], with_region)

    def _keep(self, label: str, numbers: NDArray[np.uint64], ids: NDArray[np.int64], with_region: bool) -> None:
        if label not in self._drawn and len(self._drawn) >= MAX_LABELS:
            return
        kept = self._drawn.setdefault(label, [])
        self._seen[label] += len(ids)
        for i in np.argsort(numbers, kind="stable")[: self.num_shown]:
            image, ordinal = int(ids[i]) >> REGION_BITS, int(ids[i]) & ((1 << REGION_BITS) - 1)
            kept.append(Drawn(int(numbers[i]), image, ordinal if with_region else None))
        kept.sort(key=lambda drawn: drawn.number)
        del kept[self.num_shown :]

    def _numbers(self, ids: NDArray[np.int64]) -> NDArray[np.uint64]:
        """A well-mixed number for each region: the finaliser of splitmix64 over its id and the seed."""
        x: NDArray[np.uint64] = ids.astype(np.uint64) ^ self._salt
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed: NDArray[np.uint64] = x ^ (x >> np.uint64(31))
        return mixed


def _is_number(value: str) -> bool:
    return value.replace(".", "", 1).removeprefix("-").isdigit()
