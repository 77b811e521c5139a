"""A patient's rows out of everything that was made of them: `meddam withdraw --patient-id ID PLACE...`

    export MEDDAM_SECRET=...                       the secret that the datasets were ingested with
    meddam withdraw s3://lab/vindr s3://lab/runs/one --patient-id 4711 --dry-run
    meddam withdraw s3://lab/vindr s3://lab/runs/one --patient-id 4711
    meddam withdraw s3://lab/exports/set1 --patient-key 5f0c...

A place is a dataset of `meddam ingest`, a run, or any folder below which rows lie as Parquet: exports, judgements. Give
a dataset and all that was made of it at once: rows that name no patient are known by the image ids of those that do.
Each file with such rows is replaced by one without; a run's and a dataset's counts follow, pages with pictures are
deleted, judgings of the captions are to be made again, and withdrawn.json records date and numbers. It keeps no name:
the patient only as a hash of the keyed hash.

Invariants:
- a file is replaced whole or not at all, and a withdrawal that was interrupted is finished by running it again;
- nobody works at a place or in a folder below it meanwhile: their leases are held before the files are listed;
- whose row it is, is known, or nothing is changed;
- what cannot be looked into (JSON, tars, other tables) is listed, never passed over in silence.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from meddam_core import storage
from meddam_core.imaging.deidentify import keyed_hash
from ray_jobs.dataset_files import DATASET, PLAN, UNFINISHED, check_finished
from ray_jobs.judging_directory import JUDGE
from ray_jobs.lease import Lease, give_way
from ray_jobs.module_command import run_as
from ray_jobs.patient_rows import Patient, count_rows, find_patient, take_out
from ray_jobs.recount import recount
from ray_jobs.run_directory import INPUTS, MANIFEST, RUN, SUMMARY, RunDirectory

RECORD, BEGUN = "withdrawn.json", "_withdrawing.json"
SECRET = "MEDDAM_SECRET"
LEASE = "lease"
_WORKED_AT = {RUN, DATASET, PLAN, UNFINISHED, JUDGE, LEASE}
"""Files of folders at which a job may be at work."""
_KNOWN_FILES = {*_WORKED_AT, SUMMARY, MANIFEST, RECORD, "progress.json", "budget.json"}


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
    judge_again: list[str]
    """Judgings whose verdict files were deleted, because the captions they were about have moved."""
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
        text += [f"  to be judged again: {name}; decided verdicts are in its cache" for name in self.judge_again]
        text += [f"  not looked into: {name}" for name in self.not_looked_into]
        if not self.dry_run and any(storage.is_s3(place) for place in self.num_rows):
            text.append("  a bucket with versions keeps the old objects: let its lifecycle rule delete them")
        return text


def run(cfg: Config) -> Summary:
    """Takes the patient's rows out.

    Raises ValueError where a place is not there, where it cannot be told whose rows they are or no secret is given;
    LeaseHeld where somebody is at work.
    """
    key = cfg.patient_key or keyed_hash(_secret(cfg), f"patient:{cfg.patient_id}")
    places = _places(cfg)
    with ExitStack() as held:
        files = _listed(places) if cfg.dry_run else _leased(places, held)
        begun = _read_begun(places, key)
        tables = [uri for uri in files if uri.endswith(".parquet")]
        patient = _joined(find_patient(tables, key), begun)
        _check_lineage(files, patient)
        left = count_rows(tables, patient)
        rows = {uri: max(left.get(uri, 0), begun.rows.get(uri, 0)) for uri in left.keys() | begun.rows.keys()}
        summary = _summary(cfg, places, files, patient, rows)
        if not cfg.dry_run and rows:
            begun = _write_begun(places, patient, rows, begun.at)
            for uri in left:
                take_out(uri, patient)
            _follow_up(files, rows, summary)
            for place, num in summary.num_rows.items():
                if num:
                    _record(place, begun, summary)
            for place in places:
                storage.delete(storage.join(place, BEGUN))
        return summary


class Begun(BaseModel):
    """What a withdrawal is about to do, at each place until it is done: whoever finishes it needs to know."""

    patient: str
    """Hash of the patient's key."""
    at: str
    images: dict[str, list[str]] = {}
    """Image ids by dataset; once the shards are replaced, no row names them any more."""
    rows: dict[str, int] = {}
    """The patient's rows by table, before the first was replaced."""


def _places(cfg: Config) -> list[str]:
    """The places in the form in which files are listed, without those that lie in another."""
    places = list(dict.fromkeys(RunDirectory(place).uri for place in cfg.places))
    return [p for p in places if not any(p.startswith(other + "/") for other in places)]


def _listed(places: Sequence[str]) -> list[str]:
    files = []
    for place in places:
        found = [o.uri for o in storage.list_objects(place + "/")]
        if not found:
            raise ValueError(f"{place}: there is nothing; give datasets, runs or folders of rows")
        files += found
    return files


def _leased(places: Sequence[str], held: ExitStack) -> list[str]:
    """The files, listed again until the leases of all folders below at which a job may be at work are held."""
    taken: set[str] = set()
    files = _listed(places)
    while missing := {*places, *_folders_with(_WORKED_AT, files)} - taken:
        for folder in sorted(missing):
            held.enter_context(Lease(folder, on_lost=give_way))
        taken |= missing
        files = [uri for uri in _listed(places) if not uri.endswith("/" + LEASE)]
    return files


def _folders_with(names: set[str], files: Sequence[str]) -> set[str]:
    return {folder for folder, _, name in (uri.rpartition("/") for uri in files) if name in names}


def _read_begun(places: Sequence[str], key: str) -> Begun:
    """What a withdrawal of this patient that was interrupted was about to do. Raises ValueError for another patient."""
    found = Begun(patient=_hash(key), at=datetime.now(UTC).isoformat(sep=" ", timespec="seconds"))
    for uri in (storage.join(place, BEGUN) for place in places):
        if storage.exists(uri):
            earlier = Begun.model_validate_json(storage.read_bytes(uri))
            if earlier.patient != found.patient:
                raise ValueError(f"{uri}: the withdrawal of another patient was interrupted; run that one again first")
            images = {d: sorted({*found.images.get(d, []), *ids}) for d, ids in earlier.images.items()}
            found = Begun(
                patient=found.patient, at=min(found.at, earlier.at), images=found.images | images,
                rows=found.rows | earlier.rows,
            )  # fmt: skip
    return found


def _write_begun(places: Sequence[str], patient: Patient, rows: Mapping[str, int], at: str) -> Begun:
    images = {d: [str(i) for i in ids.tolist()] for d, ids in patient.images.items()}
    begun = Begun(patient=_hash(patient.key), at=at, images=images, rows=dict(rows))
    for place in places:
        storage.write_bytes(storage.join(place, BEGUN), begun.model_dump_json().encode())
    return begun


def _joined(patient: Patient, begun: Begun) -> Patient:
    images = dict(patient.images)
    for dataset, ids in begun.images.items():
        images[dataset] = np.union1d(
            images.get(dataset, np.empty(0, np.int64)), np.array([int(i) for i in ids], np.int64)
        )
    return Patient(key=patient.key, images=images)


def _check_lineage(files: Sequence[str], patient: Patient) -> None:
    """What is unfinished, or made of shards that keep the patient, would bring the patient back."""
    given = set(files)
    for dataset in sorted(_folders_with({PLAN, UNFINISHED}, files)):
        check_finished(dataset)
    for run_uri in sorted(_folders_with({RUN}, files)):
        if storage.join(run_uri, INPUTS) not in given:
            continue
        others = [s.uri for s in RunDirectory(run_uri).inputs() if s.uri not in given and storage.exists(s.uri)]
        if found := [uri for uri in others if count_rows([uri], find_patient([uri], patient.key))]:
            raise ValueError(
                f"{run_uri} was made of {found[0]}, which holds rows of the patient and lies in none of the places; "
                "give its dataset too"
            )


def _summary(
    cfg: Config, places: Sequence[str], files: Sequence[str], patient: Patient, rows: Mapping[str, int]
) -> Summary:
    homes = {*places, *_folders_with({DATASET, RUN}, files)}
    touched = {_home(uri, homes) for uri in rows}
    moved = {uri.rpartition("/captions/")[0] for uri in rows if "/captions/" in uri}
    judgings = sorted(_folders_with({JUDGE}, files))
    return Summary(
        num_images=patient.num_images,
        num_rows={place: sum(n for uri, n in rows.items() if uri.startswith(place + "/")) for place in places},
        num_files=len(rows),
        deleted_pages=[u for u in files if u.endswith(".html") and _home(u, homes) in touched],
        judge_again=[j for j in judgings if any(j.startswith(run_uri + "/") for run_uri in moved)],
        not_looked_into=[uri for uri in files if not _known(uri)], dry_run=cfg.dry_run,
    )  # fmt: skip


def _follow_up(files: Sequence[str], rows: Mapping[str, int], summary: Summary) -> None:
    """Pages, judgings and counts after the rows."""
    for page in summary.deleted_pages:
        storage.delete(page)
    for judging in summary.judge_again:  # a verdict file is named by its first row in the caption file, which moved
        storage.delete(storage.join(judging, SUMMARY))
        for uri in files:
            if uri.startswith(storage.join(judging, "verdicts") + "/"):
                storage.delete(uri)
    for folder in sorted(_folders_with({DATASET, RUN}, files)):
        recount(folder)


def _home(uri: str, homes: set[str]) -> str:
    """The innermost dataset, run or place that a file belongs to."""
    folder = uri.rpartition("/")[0]
    while folder and folder not in homes:
        folder = folder.rpartition("/")[0]
    return folder


def _secret(cfg: Config) -> bytes:
    text = cfg.secret_file.read_bytes() if cfg.secret_file else os.environ.get(SECRET, "").encode()
    if not text.strip():
        raise ValueError(f"--patient-id needs the secret of the ingest: set {SECRET} or give --secret-file")
    return text.strip()


def _known(uri: str) -> bool:
    """Whether a file is a table that was looked into, or holds counts and settings only."""
    return uri.endswith((".parquet", ".html")) or uri.rpartition("/")[2] in _KNOWN_FILES


def _record(place: str, begun: Begun, summary: Summary) -> None:
    """An entry for this withdrawal, once, however often it was interrupted."""
    uri = storage.join(place, RECORD)
    before = json.loads(storage.read_bytes(uri)) if storage.exists(uri) else []
    entry = {
        "at": begun.at, "patient": begun.patient, "num_images": summary.num_images,
        "num_rows": summary.num_rows[place], "not_looked_into": summary.not_looked_into,
    }  # fmt: skip
    others = [e for e in before if (e["at"], e["patient"]) != (begun.at, begun.patient)]
    storage.write_bytes(uri, json.dumps([*others, entry], indent=2).encode())


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


if __name__ == "__main__":  # the same options as `meddam withdraw`
    run_as("withdraw")
