"""From parts to the published table: one caption a row, each image once, its attempt that failed least.

Part files that follow each other go into one caption file of about FILE_BYTES, by one Ray task; the driver sees ids and
counts, never captions. A generation is a folder of whole files named by its manifest; a publication that died half-way
is not named by any summary, and the next one takes a new number.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from meddam_core import storage
from meddam_core.records import SCHEMA_VERSION, Caption, CaptionedImage, arrow_schema
from meddam_core.shards import appearing_whole
from ray_jobs.audit import failed_in, images_in
from ray_jobs.run_directory import MANIFEST, RunDirectory

FILE_BYTES = 32 << 20
"""Of part files that go into one caption file: tens of thousands of captions. Readers hold one such file at a time."""
ROW_GROUP_ROWS = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """A written, not yet announced, generation of the captions table."""

    number: int
    files: list[str]
    num_tokens: int
    num_superseded: int
    """Part rows left out because another attempt, or another file of the same attempt, holds the image better."""


def publish(run: RunDirectory) -> Generation:
    """Writes a new generation from all part files of the run and names its files in a manifest. Needs Ray."""
    import ray

    parts = run.sized_parts()
    dropped = _superseded([(attempt, uri) for attempt, uri, _ in parts])
    number = run.next_generation()
    folder = run.generation(number)
    jobs = [
        {"parts": uris, "out": storage.join(folder, f"captions-{i:06d}.parquet"),
         "drop": [dropped.get(uri, []) for uri in uris]}
        for i, uris in enumerate(grouped([(uri, size) for _, uri, size in parts], FILE_BYTES))
    ]  # fmt: skip
    done: list[dict[str, Any]] = []
    if jobs:
        ray.data.DataContext.get_current().checkpoint_config = None  # this is no resumable job: it takes a new folder
        published = ray.data.from_items(jobs).map(_publish_parts, num_cpus=0.25)
        done = sorted((row for row in published.iter_rows() if row["num_rows"]), key=lambda row: row["name"])
    files = [{name: row[name] for name in ("name", "num_rows", "parts")} for row in done]
    write_manifest(run, number, files)
    return Generation(
        number=number, files=[storage.join(folder, f["name"]) for f in files],
        num_tokens=sum(row["num_tokens"] for row in done), num_superseded=sum(len(d) for d in dropped.values()),
    )  # fmt: skip


def grouped(files: Sequence[tuple[str, int]], num_bytes: int) -> Iterator[list[str]]:
    """(URI, bytes) that follow each other, in groups of `num_bytes` or little more; one that is larger stands alone."""
    group: list[str] = []
    held = 0
    for uri, size in files:
        if group and held + size > num_bytes:
            yield group
            group, held = [], 0
        group.append(uri)
        held += size
    if group:
        yield group


def write_manifest(run: RunDirectory, number: int, files: Sequence[dict[str, Any]]) -> None:
    """Names the files of a generation: `name` and `num_rows` of each, and what it was made of."""
    manifest = {"schema_version": SCHEMA_VERSION, "files": list(files)}
    run.write_json(manifest, "captions", f"gen={number}", MANIFEST)


def write_captions(uri: str, tables: Iterable[pa.Table]) -> Counter[str]:
    """Writes Caption rows as one file, a row group of about ROW_GROUP_ROWS in memory; none where there is no row.

    Returns how many rows and tokens these are.
    """
    counts: Counter[str] = Counter()
    groups = _row_groups(tables)
    first = next(groups, None)
    if first is None:
        return counts
    with appearing_whole(uri) as path, pq.ParquetWriter(path, arrow_schema(Caption), compression="zstd") as writer:
        for group in itertools.chain([first], groups):
            writer.write_table(group)
            counts.update(rows=group.num_rows, tokens=pc.sum(group["num_tokens"]).as_py() or 0)
    return counts


def _row_groups(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    held: list[pa.Table] = []
    for table in tables:
        held.append(table)
        if sum(t.num_rows for t in held) >= ROW_GROUP_ROWS:
            yield pa.concat_tables(held)
            held = []
    if sum(t.num_rows for t in held):
        yield pa.concat_tables(held)


def flatten(images: pa.Table) -> pa.Table:
    """CaptionedImage rows to Caption rows, in Arrow, without a Python object a row."""
    captions = images["captions"].combine_chunks()
    image_at = pc.list_parent_indices(captions)
    flat = pa.Table.from_struct_array(captions.flatten())
    image = images.drop_columns(["captions", "regions", "status", "reason", "detail"]).take(image_at)
    regions = images["regions"].combine_chunks()
    all_regions = pa.Table.from_struct_array(regions.flatten())
    region = all_regions.take(pc.index_in(flat["region_id"], value_set=all_regions["region_id"]))
    columns = {**_columns(image), **_columns(region), **_columns(flat)}
    schema = arrow_schema(Caption)
    return pa.table([columns[name] for name in schema.names], schema=schema)


def _columns(table: pa.Table) -> dict[str, pa.ChunkedArray]:
    return dict(zip(table.column_names, table.columns, strict=True))


def _publish_parts(job: dict[str, Any]) -> dict[str, Any]:
    tables = (_flat_part(uri, drop) for uri, drop in zip(job["parts"], job["drop"], strict=True))
    counts = write_captions(job["out"], tables)
    return {
        "name": job["out"].rpartition("/")[2], "parts": [uri.rpartition("/parts/")[2] for uri in job["parts"]],
        "num_rows": counts["rows"], "num_tokens": counts["tokens"],
    }  # fmt: skip


def _flat_part(uri: str, drop: Sequence[int]) -> pa.Table:
    fs, path = storage.open_uri(uri)
    images = pq.read_table(path, filesystem=fs, partitioning=None, schema=arrow_schema(CaptionedImage))
    if len(drop):
        keep = np.ones(images.num_rows, np.bool_)
        keep[drop] = False
        images = images.filter(pa.array(keep))
    return flatten(images)


def _superseded(parts: list[tuple[int, str]]) -> dict[str, list[int]]:
    """For each part file the rows that another one replaces.

    Of an image's rows the one with the fewest failed captions stays, so that a retry on a bad endpoint undoes nothing;
    of equals the latest attempt's, then the first file's by name. Captions are looked at where an image occurs twice.
    """
    attempts = {uri: attempt for attempt, uri in parts}
    ids: list[NDArray[np.int64]] = []
    files: list[NDArray[np.int32]] = []
    rows: list[NDArray[np.int32]] = []
    order = sorted(attempts, key=lambda uri: (-attempts[uri], uri))
    for i, (_, images) in enumerate(images_in(order)):
        ids.append(images)
        files.append(np.full(len(images), i, np.int32))
        rows.append(np.arange(len(images), dtype=np.int32))
    if not ids:
        return {}
    all_ids, all_files, all_rows = np.concatenate(ids), np.concatenate(files), np.concatenate(rows)
    again = _occurring_again(all_ids)
    if not len(again):
        return {}
    all_ids, all_files, all_rows = all_ids[again], all_files[again], all_rows[again]
    held, starts = np.unique(all_files, return_index=True)  # the rows of a file follow each other
    counts = zip(failed_in([order[i] for i in held]), np.split(all_rows, starts[1:]), strict=True)
    failed = np.concatenate([num[some] for num, some in counts])
    best_first = np.lexsort((all_files, failed, all_ids))  # of equals the file that was put first
    losers = best_first[1:][all_ids[best_first[1:]] == all_ids[best_first[:-1]]]
    dropped: dict[str, list[int]] = {}
    for i in losers:
        dropped.setdefault(order[all_files[i]], []).append(int(all_rows[i]))
    return {uri: sorted(some) for uri, some in dropped.items()}


def _occurring_again(ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """Positions, in order, of the ids that occur more than once."""
    by_id = np.argsort(ids, kind="stable")
    same = ids[by_id[1:]] == ids[by_id[:-1]]
    is_again = np.zeros(len(ids), np.bool_)
    is_again[by_id[1:][same]] = is_again[by_id[:-1][same]] = True
    return np.flatnonzero(is_again)
