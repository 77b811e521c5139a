"""A seeded, bounded sample of captions, drawn while a run's files stream by.

Each caption has a number that depends on the seed and its identity alone, and the smallest numbers are kept: so the
sample is the same however the captions lie in files, and one pass with bounded memory is enough.
"""

from __future__ import annotations

import hashlib
from itertools import chain, zip_longest

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from meddam_core.records import Caption, Status, from_row

_Stratum = tuple[str, str]
_WITH_TEXT = (Status.OK.value, Status.TRUNCATED.value)


class CaptionSample:
    """Captions to show, even over (dataset, modality), and failed ones to list.

    Args:
        num_shown: captions with text.
        num_failed: captions without.
        seed: another seed, another sample.
    """

    def __init__(self, num_shown: int, num_failed: int, seed: int = 0) -> None:
        self.num_shown = num_shown
        self.num_failed = num_failed
        self._salt = np.uint64(int.from_bytes(hashlib.blake2b(f"{seed}".encode(), digest_size=8).digest(), "big"))
        self._shown: dict[_Stratum, list[tuple[int, Caption]]] = {}
        self._failed: dict[_Stratum, list[tuple[int, Caption]]] = {}

    def add(self, captions: pa.Table) -> None:
        """Considers a table of the Caption schema."""
        with_text = np.isin(np.array(captions["status"].to_pylist(), dtype=object), _WITH_TEXT)
        numbers = self._numbers(captions)
        strata = np.array([f"{d}\0{m}" for d, m in _columns(captions, "dataset", "modality")], dtype=object)
        for stratum in sorted(set(strata)):
            dataset, modality = stratum.split("\0")
            here = strata == stratum
            _keep(self._shown.setdefault((dataset, modality), []), captions, numbers, here & with_text, self.num_shown)
            _keep(
                self._failed.setdefault((dataset, modality), []), captions, numbers, here & ~with_text, self.num_failed
            )

    def shown(self) -> list[Caption]:
        """At most `num_shown` captions with text, one of each (dataset, modality) in turn."""
        return _in_turn(self._shown, self.num_shown)

    def failures(self) -> list[Caption]:
        """At most `num_failed` captions without text, likewise."""
        return _in_turn(self._failed, self.num_failed)

    def _numbers(self, captions: pa.Table) -> NDArray[np.uint64]:
        """A well-mixed number for each caption: the finaliser of splitmix64 over its identity and the seed."""
        ids = captions["prompt_id"].to_pylist()
        hashes = {p: int.from_bytes(hashlib.blake2b(p.encode(), digest_size=8).digest(), "big") for p in set(ids)}
        x: NDArray[np.uint64] = captions["region_id"].to_numpy().astype(np.uint64)
        x = x * np.uint64(1 << 16) + captions["sample"].to_numpy().astype(np.uint64)
        x = x ^ np.array([hashes[p] for p in ids], dtype=np.uint64) ^ self._salt
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed: NDArray[np.uint64] = x ^ (x >> np.uint64(31))
        return mixed


def _keep(
    kept: list[tuple[int, Caption]],
    captions: pa.Table,
    numbers: NDArray[np.uint64],
    among: NDArray[np.bool_],
    limit: int,
) -> None:
    """Adds the rows of `among` with the smallest numbers to `kept`, which stays sorted and at most `limit` long."""
    rows = np.flatnonzero(among)
    if len(kept) == limit and kept:
        rows = rows[numbers[rows] < kept[-1][0]]
    rows = rows[np.argsort(numbers[rows], kind="stable")][:limit]
    found = captions.take(pa.array(rows)).to_pylist() if len(rows) else []
    kept += [(int(numbers[i]), from_row(Caption, row)) for i, row in zip(rows, found, strict=True)]
    kept.sort(key=lambda pair: pair[0])
    del kept[limit:]


def _in_turn(kept: dict[_Stratum, list[tuple[int, Caption]]], limit: int) -> list[Caption]:
    columns = [[caption for _, caption in kept[stratum]] for stratum in sorted(kept)]
    return [caption for caption in chain.from_iterable(zip_longest(*columns)) if caption is not None][:limit]


def _columns(captions: pa.Table, *names: str) -> list[tuple[str, ...]]:
    return list(zip(*(captions[name].to_pylist() for name in names), strict=True))
