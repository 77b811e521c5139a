"""Image shards: Parquet files of `records.Image`, streamed in and out; Hugging Face `datasets` shows their pictures.

    write_shard("s3://bucket/set/shards/shard-000000.parquet", images)
    for image in read_shard("s3://bucket/set/shards/shard-000000.parquet"): ...

    datasets.load_dataset("parquet", data_files="shards/*.parquet")     # `image` and `preview` are pictures

Invariants:
- a shard appears whole or not at all, and the same rows give the same bytes;
- memory holds one row group, about ROW_GROUP_BYTES of pictures, whatever the shard's size;
- pictures are compressed already (PNG, JPEG), so their columns are stored as they are; all others are zstd;
- a shard of an older schema version is upgraded as it is read; one of a newer version, or of another schema, is a
  ValueError that names the difference.
"""

from __future__ import annotations

import json
import os
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from numpy.typing import NDArray

from meddam_core import storage
from meddam_core.migrations import upgraded, version_of
from meddam_core.records import SCHEMA_VERSION, Image, arrow_schema, from_row, to_row

ROW_GROUP_BYTES = 16 << 20
ROW_GROUP_ROWS = 64


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ShardFacts:
    """What a shard holds, read without its pictures."""

    uri: str
    num_rows: int
    image_ids: NDArray[np.int64]
    """(rows,), in file order."""
    num_regions: NDArray[np.int32]
    """(rows,): regions of each row."""
    region_ids: NDArray[np.int64]
    """(regions of all rows,), in file order."""
    metadata: dict[str, str]
    """The writer's own entries: every `meddam.*` key."""


def write_shard(
    uri: str, images: Iterable[Image], metadata: Mapping[str, str] | Callable[[], Mapping[str, str]] | None = None
) -> None:
    """Writes `images`, which is consumed a row at a time, as one shard; replaces what was there.

    `metadata` holds further `meddam.*` entries for the file; a function is called for them once all images are written,
    before the shard appears. Raises OSError where the place cannot be written.
    """
    schema = shard_schema(metadata if isinstance(metadata, Mapping) else {})
    with appearing_whole(uri) as path, _writer(path, schema) as writer:
        for group in _row_groups(images):
            writer.write_table(pa.Table.from_pylist([to_row(i) for i in group], schema=schema))
        if callable(metadata):
            writer.add_key_value_metadata(dict(metadata()))


def merge_shards(sources: Sequence[str], target: str, metadata: Mapping[str, str]) -> int:
    """Writes the rows of shards, one after another and in the present schema, as one shard; returns how many.

    Ids and pictures stay as they are. Raises as `read_shard` does, and nothing is written then.
    """
    schema = shard_schema(metadata)
    num_rows = 0
    with appearing_whole(target) as path, _writer(path, schema) as writer:
        for uri in sources:
            with _opened(uri) as file:
                version = version_of(file.schema_arrow, Image, uri)
                for group in range(file.num_row_groups):
                    table = upgraded(file.read_row_group(group), Image, version)
                    writer.write_table(table.cast(schema))
                    num_rows += table.num_rows
    return num_rows


def read_shard(uri: str, columns: list[str] | None = None, batch_rows: int = 8) -> Iterator[Image]:
    """The rows of a shard, streamed. Raises ValueError where it is not an image shard of this schema.

    With `columns` the rest is not read; those without a default must be among them, pictures may be left out and then
    hold no bytes.
    """
    with _opened(uri) as file:
        for table in _tables(uri, file, batch_rows, columns):
            for row in table.to_pylist():
                if columns is not None:
                    row.setdefault("image", {"bytes": None, "path": None})
                    row.setdefault("preview", {"bytes": None, "path": None})
                yield from_row(Image, row)


def shard_batches(uri: str, leaves: Sequence[str], batch_rows: int = 4096) -> Iterator[pa.Table]:
    """The rows of a shard with some of its leaves only (Parquet's names), as tables. Raises as `read_shard` does."""
    with _opened(uri) as file:
        yield from _tables(uri, file, batch_rows, list(leaves))


def images_by_id(uri: str, ids: Set[int]) -> Iterator[Image]:
    """The images of a shard by id, one at a time, from the row groups that hold them. Raises as `read_shard` does."""
    with _opened(uri) as file:
        for group in range(file.num_row_groups):
            held = file.read_row_group(group, columns=["image_id"])["image_id"].to_numpy()
            rows = np.flatnonzero(np.isin(held, list(ids)))
            if len(rows):
                table = upgraded(file.read_row_group(group), Image, version_of(file.schema_arrow, Image, uri))
                for row in rows.tolist():
                    yield from_row(Image, table.slice(row, 1).to_pylist()[0])


def shard_facts(uri: str) -> ShardFacts:
    """Rows, ids and region counts of a shard, reading those columns only. Raises ValueError as `read_shard` does."""
    with _opened(uri) as file:
        table = file.read(columns=["image_id", "regions.list.element.region_id"])
        metadata = _metadata(file)
    regions = table["regions"].combine_chunks()
    lengths = regions.value_lengths().fill_null(0)
    region_ids = regions.flatten().field("region_id")
    return ShardFacts(
        uri=uri,
        num_rows=table.num_rows,
        image_ids=np.asarray(table["image_id"].to_numpy(), np.int64),
        num_regions=np.asarray(lengths.to_numpy(zero_copy_only=False), np.int32),
        region_ids=np.asarray(region_ids.to_numpy(zero_copy_only=False), np.int64),
        metadata=metadata,
    )


def shard_recipes(uri: str) -> set[str]:
    """The names of the recipes that a shard's rows have. Raises ValueError as `read_shard` does."""
    with _opened(uri) as file:
        return set(file.read(columns=["recipe"])["recipe"].unique().to_pylist())


def shard_metadata(uri: str) -> dict[str, str] | None:
    """The `meddam.*` entries of a shard, from its footer; None where there is no such file. Raises as `read_shard`."""
    if not storage.exists(uri):
        return None
    with _opened(uri) as file:
        return _metadata(file)


def shard_schema(metadata: Mapping[str, str]) -> pa.Schema:
    """The Arrow schema of a shard, with the file's own metadata and that of Hugging Face `datasets`."""
    wanted = arrow_schema(Image)
    schema = pa.schema([pa.field(f.name, _stored(f.type)) for f in wanted])
    features = {field.name: _feature(field.type) for field in schema}
    entries = {
        **(wanted.metadata or {}),
        b"huggingface": json.dumps({"info": {"features": features}}).encode(),
        **{key.encode(): value.encode() for key, value in metadata.items()},
    }
    return schema.with_metadata(entries)


def _stored(kind: pa.DataType) -> pa.DataType:
    """The type with 32-bit offsets for bytes: what `datasets` knows as a picture. A row group is far below 2 GiB."""
    if pa.types.is_struct(kind):
        return pa.struct([pa.field(f.name, _stored(f.type)) for f in kind])
    if pa.types.is_large_list(kind):
        return pa.large_list(_stored(kind.value_type))
    return pa.binary() if pa.types.is_large_binary(kind) else kind


def _leaves(kind: pa.DataType, path: str) -> Iterator[str]:
    """Parquet's names of a column's leaves."""
    if pa.types.is_struct(kind):
        for field in kind:
            yield from _leaves(field.type, f"{path}.{field.name}")
    elif pa.types.is_nested(kind):
        yield from _leaves(kind.value_type, f"{path}.list.element")
    else:
        yield path


def _compression(schema: pa.Schema) -> dict[str, str]:
    leaves = [leaf for field in schema for leaf in _leaves(field.type, field.name)]
    return {leaf: "none" if leaf.endswith(".bytes") else "zstd" for leaf in leaves}


_REPEATED = ["dataset", "split", "recipe", "modality", "photometric", "decoder", "licence", "egress"]


def _writer(path: str, schema: pa.Schema) -> pq.ParquetWriter:
    return pq.ParquetWriter(
        path, schema, compression=_compression(schema), use_dictionary=_REPEATED, write_statistics=["image_id"]
    )


def _row_groups(images: Iterable[Image]) -> Iterator[list[Image]]:
    group: list[Image] = []
    num_bytes = 0
    for image in images:
        group.append(image)
        pictures = [image.image, image.preview, *(image.frames or [])]
        num_bytes += sum(len(p.bytes or b"") for p in pictures)
        if num_bytes >= ROW_GROUP_BYTES or len(group) >= ROW_GROUP_ROWS:
            yield group
            group, num_bytes = [], 0
    if group:
        yield group


@contextmanager
def appearing_whole(uri: str) -> Iterator[str]:
    """A local path to write to, which becomes the file or object `uri` at the end, or nothing if the body raises."""
    fs, path = storage.open_uri(uri)
    if isinstance(fs, pafs.LocalFileSystem):
        beside = Path(path).with_name(f".{Path(path).name}.{uuid.uuid4().hex}")
        beside.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield str(beside)
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)
        return
    # boto3's transfer gives a broken multipart upload up, where pyarrow's stream would complete it
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    with tempfile.TemporaryDirectory(prefix="meddam-shard-") as folder:
        local = os.path.join(folder, "shard.parquet")  # noqa: PTH118
        yield local
        storage.s3_client().upload_file(local, bucket, key)


def _tables(uri: str, file: pq.ParquetFile, batch_rows: int, columns: list[str] | None) -> Iterator[pa.Table]:
    """Batches of rows in the present schema; `columns` may name leaves."""
    version = version_of(file.schema_arrow, Image, uri)
    names = None if columns is None else [column.partition(".")[0] for column in columns]
    for batch in file.iter_batches(batch_size=batch_rows, columns=columns):
        yield upgraded(pa.Table.from_batches([batch]), Image, version, names)


@contextmanager
def _opened(uri: str) -> Iterator[pq.ParquetFile]:
    fs, path = storage.open_uri(uri)
    with fs.open_input_file(path) as stream:
        try:
            file = pq.ParquetFile(stream)
        except pa.ArrowInvalid as error:
            raise ValueError(f"{uri} is no Parquet file, or a broken one; make the shard again") from error
        _check_schema(uri, file.schema_arrow)
        yield file


def _check_schema(uri: str, found: pa.Schema) -> None:
    """Raises ValueError unless `found` is an image shard's schema of a version that can be read."""
    entries = found.metadata or {}
    kind, version = (entries.get(k, b"none").decode() for k in (b"meddam.schema", b"meddam.schema_version"))
    is_shard = kind == Image.__name__ and version.isdigit() and int(version) > 0
    if is_shard:
        known = upgraded(found.empty_table(), Image, version_of(found, Image, uri)).column_names
        lacks = sorted(set(arrow_schema(Image).names) - set(known))
        unknown = sorted(set(found.names) - set(arrow_schema(Image).names))
        if not lacks and not unknown:
            return
        said = f"lacks the columns {lacks} and has the unknown columns {unknown}"
    else:
        said = f"it says {kind}, version {version}"
    raise ValueError(
        f"{uri} is not an image shard of schema version {SCHEMA_VERSION} or older: {said}; "
        "make it again with `meddam ingest`"
    )


def _metadata(file: pq.ParquetFile) -> dict[str, str]:
    entries = file.metadata.metadata or {}
    return {k.decode(): v.decode() for k, v in entries.items() if k.startswith(b"meddam.")}


def _feature(kind: pa.DataType) -> Any:
    """The type as Hugging Face `datasets` (4 and later) writes it in a Parquet file's metadata."""
    if pa.types.is_struct(kind):
        if [field.name for field in kind] == ["bytes", "path"]:
            return {"_type": "Image"}
        return {field.name: _feature(field.type) for field in kind}
    if pa.types.is_large_list(kind):
        return {"feature": _feature(kind.value_type), "_type": "LargeList"}
    if pa.types.is_fixed_size_list(kind):
        return {"feature": _feature(kind.value_type), "length": kind.list_size, "_type": "List"}
    if pa.types.is_list(kind):
        return {"feature": _feature(kind.value_type), "_type": "List"}
    return {"dtype": {"double": "float64", "float": "float32"}.get(str(kind), str(kind)), "_type": "Value"}
