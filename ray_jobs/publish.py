"""From parts to the published table: one caption a row, each image once, its latest attempt.

One Ray task a part file; the driver sees ids and counts, never captions. A generation is a folder of whole files named
by its manifest; a publication that died half-way is not named by any summary, and the next one takes a new number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from meddam_core import storage
from meddam_core.records import Caption, CaptionedImage, arrow_schema
from ray_jobs.audit import images_in
from ray_jobs.run_directory import MANIFEST, RunDirectory


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """A written, not yet announced, generation of the captions table."""

    number: int
    files: list[str]
    num_tokens: int
    num_superseded: int
    """Part rows left out because a later attempt, or another file of the same attempt, holds the image too."""


def publish(run: RunDirectory) -> Generation:
    """Writes a new generation from all part files of the run and names its files in a manifest. Needs Ray."""
    import ray

    parts = run.part_files()
    dropped = _superseded(parts)
    number = run.next_generation()
    folder = run.generation(number)
    jobs = [
        {"part": uri, "out": storage.join(folder, f"captions-{i:06d}.parquet"), "drop": dropped.get(uri, [])}
        for i, (_, uri) in enumerate(parts)
    ]
    done: list[dict[str, Any]] = []
    if jobs:
        ray.data.DataContext.get_current().checkpoint_config = None  # this is no resumable job: it takes a new folder
        published = ray.data.from_items(jobs).map(_publish_part, num_cpus=0.25)
        done = sorted((row for row in published.iter_rows() if row["num_rows"]), key=lambda row: row["name"])
    files = [{"name": row["name"], "num_rows": row["num_rows"], "part": row["part"]} for row in done]
    run.write_json({"files": files}, "captions", f"gen={number}", MANIFEST)
    return Generation(
        number=number, files=[storage.join(folder, f["name"]) for f in files],
        num_tokens=sum(row["num_tokens"] for row in done), num_superseded=sum(len(d) for d in dropped.values()),
    )  # fmt: skip


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


def _publish_part(job: dict[str, Any]) -> dict[str, Any]:
    fs, path = storage.open_uri(job["part"])
    images = pq.read_table(path, filesystem=fs, partitioning=None, schema=arrow_schema(CaptionedImage))
    if len(job["drop"]):
        keep = np.ones(images.num_rows, np.bool_)
        keep[job["drop"]] = False
        images = images.filter(pa.array(keep))
    captions = flatten(images)
    if captions.num_rows:
        sink = pa.BufferOutputStream()
        pq.write_table(captions, sink, compression="zstd")
        storage.write_bytes(job["out"], sink.getvalue().to_pybytes())
    return {
        "name": job["out"].rpartition("/")[2], "part": job["part"].rpartition("/parts/")[2],
        "num_rows": captions.num_rows, "num_tokens": pc.sum(captions["num_tokens"]).as_py() or 0,
    }  # fmt: skip


def _superseded(parts: list[tuple[int, str]]) -> dict[str, list[int]]:
    """For each part file the rows that another one replaces: the latest attempt wins, then the first file by name."""
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
    by_id = np.argsort(all_ids, kind="stable")  # stable: of equal ids the winner, which was put first, stays first
    losers = by_id[1:][all_ids[by_id[1:]] == all_ids[by_id[:-1]]]
    dropped: dict[str, list[int]] = {}
    for i in losers:
        dropped.setdefault(order[all_files[i]], []).append(int(all_rows[i]))
    return dropped
