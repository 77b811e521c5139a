"""The files of a dataset beside its shards, for commands that write its shards anew."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from meddam_core import storage
from meddam_core.records import SCHEMA_VERSION
from ray_jobs.lease import Lease
from ray_jobs.run_directory import INPUTS, InputShard

DATASET, PLAN = "dataset.json", "ingest.json"
UNFINISHED = "unfinished.json"
"""Lies in a dataset that `meddam compact` or `meddam migrate` is making, until all is there."""
_COPIED = (PLAN, "withdrawn.json")


def is_shard_folder(place: str) -> bool:
    """Whether `place` is a folder of image shards and no run. Raises ValueError where there is nothing."""
    if storage.exists(storage.join(place, INPUTS)):
        return False
    if not storage.list_objects(place.rstrip("/") + "/", ".parquet"):
        raise ValueError(f"{place} is neither a run nor a folder of image shards: it holds no Parquet file")
    return True


def check_finished(place: str) -> None:
    """Raises ValueError where a folder, or the dataset whose `shards` it is, is being made or was left half made."""
    dataset = place.rstrip("/").removesuffix("/shards")
    note = storage.join(dataset, UNFINISHED)
    if storage.exists(note):
        what = json.loads(storage.read_bytes(note))
        again = f"`meddam {what['command']} {what['place']} --out {dataset}`"
    elif storage.exists(storage.join(dataset, PLAN)) and not storage.exists(storage.join(dataset, DATASET)):
        again = "the same `meddam ingest` command"
    else:
        return
    raise ValueError(f"{dataset} is not finished: some shards are there, others may not be. Run {again} again first")


def meant_for_another_place(place: str, out: str | None) -> str:
    """`out`, where shards may go. Raises ValueError where it is missing, or is `place`."""
    if out is None or storage.open_uri(out)[1] == storage.open_uri(place)[1]:
        raise ValueError("give --out, another place: runs know the shards that they were made of by name and content")
    return out


@contextmanager
def making(
    out: str, command: str, place: str, shards: Sequence[storage.ObjectInfo | InputShard], **settings: Any
) -> Iterator[None]:
    """Holds `out` while a dataset is made there of the shards of `place`. Cut off, the same command may go on.

    Raises ValueError where `out` holds shards of its own, or of another making; LeaseHeld where somebody is at work.
    """
    note = storage.join(out, UNFINISHED)
    digest = hashlib.sha256("\n".join(f"{s.uri} {s.etag}" for s in shards).encode()).hexdigest()
    source = place.rstrip("/") if storage.is_s3(place) else storage.open_uri(place)[1]
    what = {"command": command, "place": source, "shards": digest, "settings": settings}
    with Lease(out):
        begun = storage.exists(note) and json.loads(storage.read_bytes(note)) == what
        if not begun and storage.list_objects(storage.join(out, "shards") + "/"):
            raise ValueError(f"{out}/shards holds files already; give a new --out")
        storage.write_bytes(note, json.dumps(what, indent=2).encode())
        yield
        storage.delete(note)


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
