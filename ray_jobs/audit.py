"""Inputs against outputs: is every caption there, exactly once?

    meddam audit s3://bucket/runs/one --json

Works on ids alone, as sorted arrays: about 30 bytes a caption in memory, whatever the images weigh.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from meddam_core import storage
from meddam_core.records import REGION_BITS, Status
from meddam_core.shards import shard_facts
from ray_jobs.module_command import run_as
from ray_jobs.run_directory import RUN, InputShard, RunDirectory

NUM_EXAMPLES = 20
FILES_AT_ONCE = 64
"""Caption files whose columns may wait in memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Audit:
    """What a run holds against what it should hold. Captions are counted as region x prompt x sample."""

    published: bool
    num_images: int
    num_regions: int
    num_expected: int
    num_published: int
    num_missing: int
    num_duplicated: int
    num_unexpected: int
    num_images_without_regions: int
    """In the shards; a recipe's detector may have found some in them, which are audited from then on."""
    by_status: dict[str, int] = field(default_factory=dict)
    by_reason: dict[str, int] = field(default_factory=dict)
    missing_regions: list[str] = field(default_factory=list)
    """Ids of the first few regions that lack a caption."""

    @property
    def clean(self) -> bool:
        """Nothing missing, nothing twice, nothing that was not asked for."""
        return not (self.num_missing or self.num_duplicated or self.num_unexpected)

    def to_json(self) -> dict[str, Any]:
        """As `meddam audit --json` prints it."""
        return {"clean": self.clean, **asdict(self)}


def audit(run: RunDirectory, captions: list[str] | None = None) -> Audit:
    """Audits a run's published captions, or the given caption files before they are published.

    A run that is not published yet has every caption missing. Raises ValueError where `run` is no run directory.
    """
    shards = run.inputs()
    described = run.read_json(RUN)
    if described is None:
        raise ValueError(f"{run.uri} has no {RUN}: it is not a run directory, or its first driver died before writing")
    copies = len(described["fingerprint"]["prompts"]) * int(described["fingerprint"]["num_samples"])
    expected, without = _expected(shards)
    files = run.published() if captions is None else captions
    regions, keys, status, reason = _captions(files or [])
    unique = _distinct(regions, keys)
    detected = np.unique(regions[_is_in(regions >> REGION_BITS, without)])  # found by a detector in the run itself
    expected = np.union1d(expected, detected)
    asked = _is_in(regions, expected)
    num_asked_unique = int(_is_in(unique, expected).sum())
    found, times = np.unique(unique, return_counts=True)
    complete = found[times >= copies]
    missing = expected[~_is_in(expected, complete)]
    return Audit(
        published=files is not None, num_images=sum(s.num_images for s in shards), num_regions=len(expected),
        num_expected=len(expected) * copies, num_published=len(regions),
        num_missing=len(expected) * copies - num_asked_unique, num_duplicated=len(regions) - len(unique),
        num_unexpected=int((~asked).sum()), num_images_without_regions=len(without), by_status=dict(status),
        by_reason=dict(reason), missing_regions=[str(r) for r in missing[:NUM_EXAMPLES]],
    )  # fmt: skip


def images_in(files: list[str]) -> Iterator[tuple[str, NDArray[np.int64]]]:
    """(URI, image ids) of part files, reading no other column."""
    with ThreadPoolExecutor(16) as pool:
        yield from zip(files, pool.map(lambda f: _column(f, "image_id"), files), strict=True)


def failed_in(files: list[str]) -> Iterator[NDArray[np.int32]]:
    """(rows,) for each part file: how many captions of each image failed; reads their status only."""
    with ThreadPoolExecutor(16) as pool:
        yield from pool.map(_num_failed, files)


def _num_failed(uri: str) -> NDArray[np.int32]:
    fs, path = storage.open_uri(uri)
    with fs.open_input_file(path) as stream:
        table = pq.ParquetFile(stream).read(columns=["captions.list.element.status"], use_threads=False)
    captions = table["captions"].combine_chunks()
    failed = np.asarray(pc.equal(captions.flatten().field("status"), Status.FAILED.value))
    of_row = np.asarray(pc.list_parent_indices(captions))[failed]
    return np.bincount(of_row, minlength=len(captions)).astype(np.int32)


def _expected(shards: list[InputShard]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(region ids that must have captions, ids of images without regions), both sorted."""
    with ThreadPoolExecutor(16) as pool:
        facts = list(pool.map(lambda s: shard_facts(s.uri), shards))
    none = np.empty(0, np.int64)  # of a run whose every image was withdrawn
    regions = np.concatenate([none, *(f.region_ids for f in facts)])
    without = np.concatenate([none, *(f.image_ids[f.num_regions == 0] for f in facts)])
    return np.sort(regions), np.sort(without)


def _captions(files: list[str]) -> tuple[NDArray[np.int64], NDArray[np.int64], Counter[str], Counter[str]]:
    """Region ids, a number for (prompt, sample), and counts by status and reason, of all caption files."""
    regions, keys = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    prompts: dict[str, int] = {}
    statuses: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    with ThreadPoolExecutor(8) as pool:
        groups = (files[i : i + FILES_AT_ONCE] for i in range(0, len(files), FILES_AT_ONCE))
        for table in (table for group in groups for table in pool.map(_caption_columns, group)):
            regions.append(np.asarray(table["region_id"].to_numpy(), np.int64))
            coded = pc.dictionary_encode(table["prompt_id"].combine_chunks())
            codes = [prompts.setdefault(p, len(prompts)) for p in coded.dictionary.to_pylist()]
            names = np.asarray(codes, np.int64)[np.asarray(coded.indices)]
            keys.append(names << 32 | np.asarray(table["sample"].to_numpy(), np.int64))
            for name, counter in (("status", statuses), ("reason", reasons)):
                counts = pc.value_counts(table[name].drop_null()).to_pylist()
                counter.update({entry["values"]: entry["counts"] for entry in counts})
    return np.concatenate(regions), np.concatenate(keys), statuses, reasons


def _caption_columns(uri: str) -> pa.Table:
    fs, path = storage.open_uri(uri)
    columns = ["region_id", "prompt_id", "sample", "status", "reason"]
    with fs.open_input_file(path) as stream:
        return pq.ParquetFile(stream).read(columns=columns, use_threads=False)


def _distinct(regions: NDArray[np.int64], keys: NDArray[np.int64]) -> NDArray[np.int64]:
    """The region of each distinct (region, key) pair, sorted."""
    order = np.lexsort((keys, regions))
    regions, keys = regions[order], keys[order]
    again = (regions[1:] == regions[:-1]) & (keys[1:] == keys[:-1])
    return regions[np.concatenate([np.ones(min(len(regions), 1), np.bool_), ~again])]


def _column(uri: str, name: str) -> NDArray[np.int64]:
    fs, path = storage.open_uri(uri)
    return np.asarray(pq.read_table(path, columns=[name], filesystem=fs, partitioning=None)[name].to_numpy(), np.int64)


def _is_in(values: NDArray[np.int64], ordered: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which of `values` occur in the sorted array `ordered`."""
    if not len(ordered):
        return np.zeros(len(values), np.bool_)
    at = np.minimum(np.searchsorted(ordered, values), len(ordered) - 1)
    return np.asarray(ordered[at] == values)


if __name__ == "__main__":  # the same options as `meddam audit`
    run_as("audit")
