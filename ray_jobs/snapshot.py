"""The input of a run, fixed when it begins: which shards, of what content, holding which ids.

Reads footers and the id columns only, never pixels: 8 bytes an image and 8 a region.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from meddam_core import storage
from meddam_core.records import ROW_BITS
from meddam_core.shards import shard_facts
from ray_jobs.dataset_files import check_finished
from ray_jobs.run_directory import InputShard


def snapshot(uris: Sequence[str], finished: bool = False) -> list[InputShard]:
    """The shards below `uris` (folders or single files), in order of their ids.

    Args:
        uris: where they are.
        finished: refuse a dataset that is half made, whose shards would be taken for all of it.

    Raises ValueError where there are none, where a file is not a shard of this schema, or where ids occur twice;
    StorageError where the bucket cannot be read.
    """
    objects = [o for uri in uris for o in shards_below(uri)]
    if finished:
        for uri in uris:
            check_finished(uri)
    with ThreadPoolExecutor(16) as pool:
        shards = list(pool.map(_shard, objects))
    shards = sorted((s for s in shards if s.num_images), key=lambda s: s.first_id)
    if not shards:
        raise ValueError(f"the shards below {', '.join(uris)} hold no image")
    for before, after in itertools.pairwise(shards):
        if after.first_id <= before.last_id:
            raise ValueError(
                f"{before.uri} and {after.uri} hold the same image ids, up to {before.last_id}, from {after.first_id}. "
                "If one is a copy of the other, leave it out. Two datasets are captioned in two runs, or in one when "
                f"the second was ingested with numbers of its own: `meddam ingest ... --first-shard {_free(shards)}`."
            )
    return shards


def _free(shards: Sequence[InputShard]) -> int:
    """The first shard number that none of them has."""
    return max(s.last_id >> ROW_BITS for s in shards) + 1


def as_they_are(shards: Sequence[InputShard]) -> list[InputShard]:
    """The same shards as they are now: those without images left out, those that are gone as they were."""
    folders = {s.uri.rpartition("/")[0] for s in shards}
    there = {o.uri: o for folder in folders for o in storage.list_objects(folder + "/", ".parquet")}
    with ThreadPoolExecutor(16) as pool:
        now = list(pool.map(lambda s: _shard(there[s.uri]) if s.uri in there else s, shards))
    return [s for s in now if s.num_images]


def changed(then: Sequence[InputShard], now: Sequence[InputShard]) -> list[str]:
    """What is different between two snapshots, a short sentence each; [] where they are equal."""
    before, after = {s.uri: s for s in then}, {s.uri: s for s in now}
    said = [f"{uri} is gone" for uri in before.keys() - after.keys()]
    said += [f"{uri} is new" for uri in after.keys() - before.keys()]
    said += [f"{u} has other content" for u in before.keys() & after.keys() if before[u].etag != after[u].etag]
    return sorted(said)


def has_shards(uri: str) -> bool:
    """Whether `uri` is a Parquet file or a folder that holds some, as folders of shards do."""
    if uri.endswith(".parquet"):
        return storage.exists(uri)
    return bool(storage.list_objects(uri.rstrip("/") + "/", ".parquet"))


def shards_below(uri: str) -> list[storage.ObjectInfo]:
    """The shards of a dataset folder, of any other folder, or a single one. Raises ValueError where there are none."""
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
    facts = shard_facts(info.uri)
    ids = facts.image_ids
    if len(np.unique(ids)) != len(ids):
        raise ValueError(f"{info.uri} holds the same image id twice; ids must be unique, write the shard again")
    return InputShard(
        uri=info.uri, etag=info.etag, size=info.size, num_images=len(ids), num_regions=len(facts.region_ids),
        first_id=int(ids.min()) if len(ids) else 0, last_id=int(ids.max()) if len(ids) else -1,
    )  # fmt: skip
