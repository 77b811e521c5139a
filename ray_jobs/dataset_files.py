"""The files of a dataset beside its shards, for commands that write its shards anew."""

from __future__ import annotations

import json
from typing import Any

from meddam_core import storage
from meddam_core.records import SCHEMA_VERSION
from ray_jobs.run_directory import INPUTS

DATASET = "dataset.json"
_COPIED = ("ingest.json", "withdrawn.json")


def is_shard_folder(place: str) -> bool:
    """Whether `place` is a folder of image shards and no run. Raises ValueError where there is nothing."""
    if storage.exists(storage.join(place, INPUTS)):
        return False
    if not storage.list_objects(place.rstrip("/") + "/", ".parquet"):
        raise ValueError(f"{place} is neither a run nor a folder of image shards: it holds no Parquet file")
    return True


def meant_for_another_place(place: str, out: str | None) -> str:
    """`out`, where shards may go. Raises ValueError where it is missing, is `place`, or holds shards of its own."""
    if out is None or storage.open_uri(out)[1] == storage.open_uri(place)[1]:
        raise ValueError("give --out, another place: runs know the shards that they were made of by name and content")
    if storage.list_objects(storage.join(out, "shards") + "/"):
        raise ValueError(f"{out}/shards holds files already; give a new --out")
    return out


def copy_facts(place: str, out: str, **changed: Any) -> None:
    """Copies what says what a dataset is, and its rejects; dataset.json comes last, with what has changed in it."""
    for name in _COPIED:
        if storage.exists(storage.join(place, name)):
            storage.write_bytes(storage.join(out, name), storage.read_bytes(storage.join(place, name)))
    for rejected in storage.list_objects(storage.join(place, "rejected") + "/", ".parquet"):
        name = rejected.uri.rpartition("/")[2]
        storage.write_bytes(storage.join(out, "rejected", name), storage.read_bytes(rejected.uri))
    if storage.exists(storage.join(place, DATASET)):
        note_facts(storage.read_bytes(storage.join(place, DATASET)), out, **changed)


def note_facts(dataset: bytes, out: str, **changed: Any) -> None:
    """Writes dataset.json with the present schema version and what else has changed."""
    facts = json.loads(dataset) | {"schema_version": SCHEMA_VERSION} | changed
    storage.write_bytes(storage.join(out, DATASET), json.dumps(facts, indent=2).encode())
