"""The data of a training run: image shards with a caption table, or views that were prepared once.

    captions = CaptionTable(uris)                             # published captions, or a curated set
    files = files_of_shards(shards, split="train", captions=captions)
    examples = read_file(files[0], size=384, captions=captions)

Shards are read where they lie, a row group at a time; captions are joined by region as they are read, so that neither
is copied. Memory holds region ids and one row group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from meddam_core import storage
from meddam_core.migrations import upgraded, version_of
from meddam_core.records import Image, from_row
from meddam_core.training.examples import Example, examples_of_images, read_views
from meddam_core.training.order import File

USABLE = ("ok", "truncated")
_COLUMNS = ["region_id", "prompt_id", "text", "status"]


@dataclass(frozen=True, slots=True)
class CaptionTable:
    """Captions by region, sorted."""

    region_ids: NDArray[np.int64]
    prompt_ids: list[str]
    texts: list[str]

    @staticmethod
    def read(uris: Sequence[str]) -> CaptionTable:
        """The finished captions of Parquet files with region_id, prompt_id and text.

        Raises ValueError where a file lacks these columns, or where nothing is left.
        """
        tables = []
        for uri in uris:
            fs, path = storage.open_uri(uri)
            schema = pq.read_schema(path, filesystem=fs)
            missing = sorted(set(_COLUMNS[:3]) - set(schema.names))
            if missing:
                raise ValueError(f"{uri} is no table of captions: it has no {', '.join(missing)}")
            table = pq.read_table(path, columns=[c for c in _COLUMNS if c in schema.names], filesystem=fs)
            if "status" in table.column_names:
                table = table.filter(pc.is_in(table["status"], value_set=pa.array(USABLE))).drop_columns("status")
            tables.append(table.filter(pc.is_valid(table["text"])).select(_COLUMNS[:3]))
        table = pa.concat_tables(tables, promote_options="permissive").sort_by("region_id") if tables else None
        if table is None or not table.num_rows:
            raise ValueError("there is no finished caption to learn from; give published runs or curated sets")
        return CaptionTable(table["region_id"].to_numpy(), table["prompt_id"].to_pylist(), table["text"].to_pylist())

    def of(self, region_id: int) -> list[tuple[str, str]]:
        """(prompt id, text) of each caption of a region."""
        first, last = np.searchsorted(self.region_ids, [region_id, region_id + 1])
        return [(self.prompt_ids[i], self.texts[i]) for i in range(first, last)]

    def count(self, region_ids: NDArray[np.int64]) -> int:
        """How many of these regions have a caption."""
        return int(np.isin(region_ids, self.region_ids).sum())


def files_of_shards(
    uris: Sequence[str], *, split: str | None = None, captions: CaptionTable | None = None
) -> list[File]:
    """The row groups of image shards with the number of regions to learn from in each; those without are left out.

    Raises ValueError where a file is no image shard.
    """
    files = []
    for uri in uris:
        fs, path = storage.open_uri(uri)
        parquet = pq.ParquetFile(fs.open_input_file(path))
        if (parquet.schema_arrow.metadata or {}).get(b"meddam.schema") != b"Image":
            raise ValueError(f"{uri} is not an image shard; make one with `meddam ingest`")
        version_of(parquet.schema_arrow, Image, uri)
        for group in range(parquet.num_row_groups):
            table = parquet.read_row_group(group, columns=["split", "regions.list.element.region_id"])
            if split is not None:
                table = table.filter(pc.equal(table["split"], split))
            ids = np.asarray(table["regions"].combine_chunks().flatten().field("region_id"), np.int64)
            num = len(ids) if captions is None else captions.count(ids)
            if num:
                files.append(File(uri, num, group))
    return files


def files_of_views(uris: Sequence[str]) -> list[File]:
    """Prepared files of views. Raises ValueError where one is something else."""
    files = []
    for uri in uris:
        fs, path = storage.open_uri(uri)
        files.append(File(uri, pq.read_metadata(path, filesystem=fs).num_rows))
    return [f for f in files if f.num_examples]


def read_file(file: File, size: int, split: str | None = None, captions: CaptionTable | None = None) -> list[Example]:
    """The examples of a file or row group, with the captions they may be given; regions without one are left out."""
    if file.row_group is None:
        found = read_views(file.uri)
    else:
        fs, path = storage.open_uri(file.uri)
        parquet = pq.ParquetFile(fs.open_input_file(path))
        table = upgraded(
            parquet.read_row_group(file.row_group), Image, version_of(parquet.schema_arrow, Image, file.uri)
        )
        images = (from_row(Image, row) for row in table.to_pylist())
        found, _ = examples_of_images((i for i in images if split is None or i.split == split), size)
    if captions is None:
        return found
    joined = [replace(e, captions=captions.of(e.region_id)) for e in found]
    return [e for e in joined if e.captions]


def labels_of_shards(uris: Sequence[str], split: str | None, limit: int) -> list[dict[str, str]]:
    """The labels of the first regions, to make captions of phantoms from; pictures are not read."""
    found: list[dict[str, str]] = []
    for uri in uris:
        fs, path = storage.open_uri(uri)
        table = pq.ParquetFile(fs.open_input_file(path)).read(columns=["split", "regions.list.element.labels"])
        for row in table.to_pylist():
            if split is None or row["split"] == split:
                found += [{label["name"]: label["value"] for label in r["labels"]} for r in row["regions"]]
        if len(found) >= limit:
            break
    return found[:limit]
