"""A patient's rows out of everything that was made of them: `meddam withdraw --patient-id ID PLACE...`

    export MEDDAM_SECRET=...                       the secret that the datasets were ingested with
    meddam withdraw s3://lab/vindr s3://lab/runs/one --patient-id 4711 --dry-run
    meddam withdraw s3://lab/vindr s3://lab/runs/one --patient-id 4711
    meddam withdraw s3://lab/exports/set1 --patient-key 5f0c...

A place is a dataset of `meddam ingest`, a run, or any folder below which rows lie as Parquet: exports, judgements. Give
all places at once: rows that name no patient are known by the image ids of those that do. Each file with such rows is
replaced by one without; a run's and a dataset's counts follow, pages with pictures are deleted, and withdrawn.json
records date and numbers. It keeps no name: the patient only as a hash of the keyed hash.

Invariants:
- a file is replaced whole or not at all, and a withdrawal that was interrupted is finished by running it again;
- nobody works at a place meanwhile: its lease is held;
- what cannot be looked into (JSON, tars, other tables) is listed, never passed over in silence.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

from meddam_core import storage
from meddam_core.imaging.deidentify import keyed_hash
from meddam_core.records import REGION_BITS
from meddam_core.shards import appearing_whole
from ray_jobs.audit import audit
from ray_jobs.lease import Lease
from ray_jobs.module_command import run_as
from ray_jobs.run_directory import RUN, SUMMARY, RunDirectory
from ray_jobs.snapshot import snapshot

RECORD, BEGUN = "withdrawn.json", "_withdrawing.json"
SECRET = "MEDDAM_SECRET"
_KNOWN_FILES = ("dataset.json", "ingest.json", "run.json", "summary.json", "manifest.json", "progress.json", RECORD)


class Config(BaseModel):
    """What `meddam withdraw` does."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    places: tuple[str, ...] = Field(min_length=1)
    """Datasets, runs and other folders of rows, on S3 or disk: all that may hold the patient."""
    patient_id: str | None = None
    """The patient's id as the source names it; needs the secret of the ingest."""
    patient_key: str | None = None
    """The key as rows carry it, instead."""
    secret_file: Path | None = None
    """File with the secret; by default the variable MEDDAM_SECRET."""
    dry_run: bool = False
    """Count, and change nothing."""

    @model_validator(mode="after")
    def _one_patient(self) -> Config:
        if (self.patient_id is None) == (self.patient_key is None):
            raise ValueError("give --patient-id with the ingest's secret, or --patient-key")
        return self


class Summary(BaseModel):
    """What was withdrawn."""

    num_images: int
    num_rows: dict[str, int]
    """Rows taken out, by place."""
    num_files: int
    """Files that were replaced."""
    deleted_pages: list[str]
    not_looked_into: list[str]
    """Files of other kinds below the places: look at them yourself, or make them again."""
    dry_run: bool

    @property
    def exit_code(self) -> int:
        """A patient of whom there is nothing is withdrawn too."""
        return 0

    def lines(self) -> list[str]:
        """For a person."""
        verb = "would be" if self.dry_run else "were"
        text = [f"{self.num_images:,} images of the patient; {sum(self.num_rows.values()):,} rows {verb} taken out"]
        text += [f"  {count:>8,}  rows of {place}" for place, count in self.num_rows.items()]
        text += [f"  deleted: {page}" for page in self.deleted_pages if not self.dry_run]
        text += [f"  not looked into: {name}" for name in self.not_looked_into]
        if not self.dry_run and any(storage.is_s3(place) for place in self.num_rows):
            text.append("  a bucket with versions keeps the old objects: let its lifecycle rule delete them")
        return text


def run(cfg: Config) -> Summary:
    """Takes the patient's rows out.

    Raises ValueError where a place is not there or no secret is given, LeaseHeld where somebody is at work.
    """
    key = cfg.patient_key or keyed_hash(_secret(cfg), f"patient:{cfg.patient_id}")
    files = {place: storage.list_objects(place.rstrip("/") + "/") for place in cfg.places}
    for place, found in files.items():
        if not found:
            raise ValueError(f"{place}: there is nothing; give datasets, runs or folders of rows")
    with ExitStack() as held:
        if not cfg.dry_run:
            for place in cfg.places:
                held.enter_context(Lease(place))
        tables = {place: [o.uri for o in found if o.uri.endswith(".parquet")] for place, found in files.items()}
        begun = [storage.join(place, BEGUN) for place in cfg.places]
        ids = np.union1d(_image_ids([u for some in tables.values() for u in some], key), _begun(begun))
        if not cfg.dry_run:
            for uri in begun:  # were this cut off, rows without a patient's key could not be told any more
                storage.write_bytes(uri, json.dumps([str(i) for i in ids.tolist()]).encode())
        changed = {place: _without(some, key, ids, cfg.dry_run) for place, some in tables.items()}
        touched = [place for place, rows in changed.items() if any(rows.values())]
        pages = [o.uri for place in touched for o in files[place] if o.uri.endswith(".html")]
        summary = Summary(
            num_images=len(ids), num_rows={place: sum(rows.values()) for place, rows in changed.items()},
            num_files=sum(n > 0 for rows in changed.values() for n in rows.values()), deleted_pages=pages,
            not_looked_into=[o.uri for found in files.values() for o in found if not _known(o.uri)],
            dry_run=cfg.dry_run,
        )  # fmt: skip
        if not cfg.dry_run:
            for page in pages:
                storage.delete(page)
            for place in cfg.places:  # also those that an interrupted withdrawal had reached
                _recount(place)
            for place in touched:
                _record(place, key, summary)
            for uri in begun:
                storage.delete(uri)
        return summary


def _begun(uris: Sequence[str]) -> NDArray[np.int64]:
    """Image ids of a withdrawal that was interrupted."""
    found = [json.loads(storage.read_bytes(uri)) for uri in uris if storage.exists(uri)]
    return np.array([int(i) for some in found for i in some], np.int64)


def _secret(cfg: Config) -> bytes:
    text = cfg.secret_file.read_bytes() if cfg.secret_file else os.environ.get(SECRET, "").encode()
    if not text.strip():
        raise ValueError(f"--patient-id needs the secret of the ingest: set {SECRET} or give --secret-file")
    return text.strip()


def _image_ids(uris: Sequence[str], key: str) -> NDArray[np.int64]:
    """Ids of the images that rows of the patient name, sorted."""
    ids = [np.empty(0, np.int64)]
    for uri in uris:
        with _opened(uri) as file:
            if {"patient_key", "image_id"} <= set(file.schema_arrow.names):
                for batch in file.iter_batches(columns=["patient_key", "image_id"]):
                    mine = np.asarray(pc.fill_null(pc.equal(batch["patient_key"], key), False))
                    ids.append(np.asarray(batch["image_id"])[mine])
    return np.unique(np.concatenate(ids))


def _without(uris: Sequence[str], key: str, ids: NDArray[np.int64], dry_run: bool) -> dict[str, int]:
    """Rows of the patient in each file; the files are replaced by ones without them."""
    counts = {}
    for uri in uris:
        with _opened(uri) as file:
            names = [n for n in ("patient_key", "image_id", "region_id") if n in file.schema_arrow.names]
            mine = _is_mine(file.read(columns=names), key, ids) if names else np.zeros(0, bool)
            counts[uri] = int(mine.sum())
            if counts[uri] and not dry_run:
                _replace(uri, file, mine)
    return counts


def _is_mine(rows: pa.Table, key: str, ids: NDArray[np.int64]) -> NDArray[np.bool_]:
    mine = np.zeros(len(rows), bool)
    if "patient_key" in rows.column_names:
        mine |= np.asarray(pc.fill_null(pc.equal(rows["patient_key"], key), False))
    if "image_id" in rows.column_names:
        mine |= np.isin(_numbers(rows["image_id"]), ids)
    elif "region_id" in rows.column_names:
        mine |= np.isin(_numbers(rows["region_id"]) >> REGION_BITS, ids)
    return mine


def _numbers(column: pa.ChunkedArray) -> NDArray[np.int64]:
    """Ids as numbers; exports write them as text, because JavaScript rounds them."""
    return np.asarray(pc.fill_null(pc.cast(column, pa.int64()), -1), np.int64)


def _replace(uri: str, file: pq.ParquetFile, mine: NDArray[np.bool_]) -> None:
    """The file without some of its rows: the same schema, metadata and compression, row group by row group."""
    first = file.metadata.row_group(0)
    codecs = {first.column(i).path_in_schema: first.column(i).compression.lower() for i in range(first.num_columns)}
    codecs = {path: "none" if codec == "uncompressed" else codec for path, codec in codecs.items()}
    own = {k.decode(): v.decode() for k, v in (file.metadata.metadata or {}).items() if k.startswith(b"meddam.")}
    with appearing_whole(uri) as path, pq.ParquetWriter(path, file.schema_arrow, compression=codecs) as writer:
        start = 0
        for number in range(file.num_row_groups):
            group = file.read_row_group(number)
            writer.write_table(group.filter(pa.array(~mine[start : start + len(group)])))
            start += len(group)
        writer.add_key_value_metadata(own)


def _opened(uri: str) -> Any:
    fs, path = storage.open_uri(uri)
    return pq.ParquetFile(path, filesystem=fs)


def _known(uri: str) -> bool:
    """Whether a file is a table that was looked into, or holds counts and settings only."""
    name = uri.rpartition("/")[2]
    return uri.endswith((".parquet", ".html")) or name in (*_KNOWN_FILES, "lease")


def _recount(place: str) -> None:
    """Brings a dataset's or a run's own counts in line with its rows."""
    dataset = storage.join(place, "dataset.json")
    if storage.exists(dataset):
        said = json.loads(storage.read_bytes(dataset))
        shards = snapshot([place])
        said |= {"num_images": sum(s.num_images for s in shards), "num_regions": sum(s.num_regions for s in shards)}
        storage.write_bytes(dataset, json.dumps(said, indent=2).encode())
    directory = RunDirectory(place)
    described, summary = directory.read_json(RUN), directory.read_json(SUMMARY)
    if described is None or summary is None:
        return
    directory.write_inputs(snapshot(described["config"]["shards"]))  # with the etags of the shards as they are now
    found = audit(directory)
    directory.write_json(
        summary | {
            "num_images": found.num_images, "num_regions": found.num_regions, "num_captions": found.num_published,
            "by_status": found.by_status, "by_reason": found.by_reason, "audit": found.to_json(),
        }, SUMMARY,
    )  # fmt: skip


def _record(place: str, key: str, summary: Summary) -> None:
    uri = storage.join(place, RECORD)
    before = json.loads(storage.read_bytes(uri)) if storage.exists(uri) else []
    entry = {
        "at": datetime.now(UTC).isoformat(sep=" ", timespec="seconds"),
        "patient": hashlib.sha256(key.encode()).hexdigest(), "num_images": summary.num_images,
        "num_rows": summary.num_rows[place], "not_looked_into": summary.not_looked_into,
    }  # fmt: skip
    storage.write_bytes(uri, json.dumps([*before, entry], indent=2).encode())


if __name__ == "__main__":  # the same options as `meddam withdraw`
    run_as("withdraw")
