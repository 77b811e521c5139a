"""The input of a run, fixed when it begins: which shards, of what content, holding which ids.

Reads footers and the id columns only, never pixels: 8 bytes an image and 8 a region.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from meddam_core import storage
from meddam_core.records import SCHEMA_VERSION, Image, arrow_schema
from ray_jobs.run_directory import InputShard

_REGION_IDS = "regions.list.element.region_id"


def snapshot(uris: Sequence[str]) -> list[InputShard]:
    """The shards below `uris` (folders or single files), in order of their ids.

    Raises ValueError where there are none, where a file is not a shard of this schema, or where ids occur twice;
    StorageError where the bucket cannot be read.
    """
    objects = [o for uri in uris for o in _shards_below(uri)]
    with ThreadPoolExecutor(16) as pool:
        shards = list(pool.map(_shard, objects))
    shards = sorted((s for s in shards if s.num_images), key=lambda s: s.first_id)
    if not shards:
        raise ValueError(f"the shards below {', '.join(uris)} hold no image")
    for before, after in itertools.pairwise(shards):
        if after.first_id <= before.last_id:
            raise ValueError(
                f"{before.uri} and {after.uri} hold the same image ids, up to {before.last_id}, from {after.first_id}. "
                "Shards of two datasets are captioned in two runs; or one is a copy of the other: leave it out."
            )
    return shards


def changed(then: Sequence[InputShard], now: Sequence[InputShard]) -> list[str]:
    """What is different between two snapshots, a short sentence each; [] where they are equal."""
    before, after = {s.uri: s for s in then}, {s.uri: s for s in now}
    said = [f"{uri} is gone" for uri in before.keys() - after.keys()]
    said += [f"{uri} is new" for uri in after.keys() - before.keys()]
    said += [f"{u} has other content" for u in before.keys() & after.keys() if before[u].etag != after[u].etag]
    return sorted(said)


def read_ids(uri: str) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int32]]:
    """(image ids, region ids, regions of each image) of a shard, reading no other column."""
    fs, path = storage.open_uri(uri)
    table = pq.read_table(path, columns=["image_id", _REGION_IDS], filesystem=fs, partitioning=None)
    regions = table["regions"].combine_chunks()
    lengths = regions.value_lengths().fill_null(0)
    ids = regions.flatten().field("region_id")
    return (
        np.asarray(table["image_id"].to_numpy(), np.int64),
        np.asarray(ids.to_numpy(zero_copy_only=False), np.int64),
        np.asarray(lengths.to_numpy(zero_copy_only=False), np.int32),
    )


def _shards_below(uri: str) -> list[storage.ObjectInfo]:
    if uri.endswith(".parquet"):
        folder, _, _ = uri.rpartition("/")
        wanted = uri if storage.is_s3(uri) else storage.open_uri(uri)[1]
        found = [o for o in storage.list_objects(folder or ".", ".parquet") if o.uri == wanted]
    else:
        dataset = storage.join(uri, "shards")  # a dataset folder as `meddam ingest` writes it, or just a folder
        found = storage.list_objects(dataset + "/", ".parquet") or storage.list_objects(uri + "/", ".parquet")
    if not found:
        raise ValueError(f"{uri}: there are no image shards (*.parquet); make some with `meddam ingest`")
    return found


def _shard(info: storage.ObjectInfo) -> InputShard:
    fs, path = storage.open_uri(info.uri)
    try:
        with fs.open_input_file(path) as stream:
            _check_schema(info.uri, pq.ParquetFile(stream).schema_arrow)
        images, regions, _ = read_ids(info.uri)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{info.uri} is no Parquet file, or a broken one; write it again or leave it out") from error
    if len(np.unique(images)) != len(images):
        raise ValueError(f"{info.uri} holds the same image id twice; ids must be unique, write the shard again")
    first, last = (int(images.min()), int(images.max())) if len(images) else (0, -1)
    return InputShard(
        uri=info.uri, etag=info.etag, size=info.size, num_images=len(images), num_regions=len(regions), first_id=first,
        last_id=last,
    )  # fmt: skip


def _check_schema(uri: str, found: pa.Schema) -> None:
    wanted = arrow_schema(Image)
    version = (found.metadata or {}).get(b"meddam.schema_version", b"none").decode()
    missing, extra = set(wanted.names) - set(found.names), set(found.names) - set(wanted.names)
    if version != str(SCHEMA_VERSION) or missing or extra:
        raise ValueError(
            f"{uri} is not an image shard of schema version {SCHEMA_VERSION} (it says {version}; missing columns "
            f"{sorted(missing)}, unknown columns {sorted(extra)}); make it again with `meddam ingest`"
        )
