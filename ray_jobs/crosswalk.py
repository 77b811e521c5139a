"""The way back from keyed hashes to patients and studies, in one file that its user keeps: `--crosswalk FILE`.

    meddam ingest manifest list.csv --out s3://lab/films --secret-file ~/.meddam/secret --crosswalk /safe/crosswalk.csv

Written by the process that is started, on its machine, after the ingest; for a dataset that is complete already the
same command writes the crosswalk alone. Ids never pass through the cluster: the source is listed once more here, and of
files whose item names no patient or study only the header is read. Rows are added to a file that is there, so that the
datasets of one secret can share one. Columns: kind (patient or study), key as in the rows, id as in the source.

Invariants:
- the file is readable by its owner alone (0600) from its first byte, appears whole, and never lies where the shards do;
- every key in the shards is looked for in it, and what was not found is counted.
"""

from __future__ import annotations

import csv
import io
import os
import stat
import uuid
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from meddam_core import storage
from meddam_core.datasets.base import Source, SourceItem
from meddam_core.imaging.decode import read_identity
from meddam_core.imaging.deidentify import keyed_hash
from meddam_core.records import RowError
from meddam_core.shards import shard_batches
from ray_jobs.snapshot import shards_below

COLUMNS = ["kind", "key", "id"]
HEADER_BYTES = 1 << 18
_AT_ONCE = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Crosswalk:
    """What was written."""

    num_patients: int
    num_studies: int
    num_unknown: int
    """Keys of the shards that the source, as it is now, does not explain."""

    def line(self) -> str:
        """For a person; without any of its content."""
        unknown = f"; {self.num_unknown:,} keys of the shards were not found in the source" if self.num_unknown else ""
        return f"crosswalk: {self.num_patients:,} patients, {self.num_studies:,} studies{unknown}"


def check_place(path: Path, out: str, secret: bytes | None) -> None:
    """Raises ValueError, before any work, where a crosswalk cannot be written or would not be safe."""
    if secret is None:
        raise ValueError("--crosswalk needs the secret of the keys: set MEDDAM_SECRET or give --secret-file")
    if "://" in str(path) or str(path).startswith(("s3:/", "file:/")):
        raise ValueError("--crosswalk is a file of this machine, never a bucket: it leads back to patients")
    if not storage.is_s3(out) and path.resolve().is_relative_to(Path(storage.open_uri(out)[1])):
        raise ValueError(f"--crosswalk lies inside {out}; keep it away from the rows that it leads back from")
    if not path.resolve().parent.is_dir():
        raise ValueError(f"--crosswalk: the folder {path.resolve().parent} is not there")
    if path.exists() and stat.S_IMODE(path.stat().st_mode) & 0o077:
        raise ValueError(f"--crosswalk: others may read {path}; run `chmod 600` on it first")


def write_crosswalk(path: Path, out: str, source: Source, secret: bytes) -> Crosswalk:
    """Adds the patients and studies of `source` to the file at `path`, and compares it with the shards below `out`."""
    rows = set(_existing(path))
    found = {(kind, keyed_hash(secret, f"{kind}:{id_}"), id_) for kind, id_ in _ids(source.items())}
    _write(path, sorted(rows | found))
    keys = {key for _, key, _ in found}
    unknown: set[str] = set()
    for shard in shards_below(out):
        for table in shard_batches(shard.uri, ["patient_key", "study_key"]):
            for name in table.column_names:
                unknown.update(k for k in table[name].to_pylist() if k is not None and k not in keys)
    count = [sum(kind == wanted for kind, _, _ in found) for wanted in ("patient", "study")]
    return Crosswalk(num_patients=count[0], num_studies=count[1], num_unknown=len(unknown))


def _ids(items: Iterable[SourceItem]) -> Iterator[tuple[str, str]]:
    """("patient" or "study", id) of every item, by the rules of meddam_core.datasets.rows."""
    with ThreadPoolExecutor(16) as pool:
        stream = iter(items)
        while some := list(islice(stream, _AT_ONCE)):
            for patient, study in pool.map(_of_item, some):
                if patient:
                    yield "patient", patient
                if study:
                    yield "study", study


def _of_item(item: SourceItem) -> tuple[str | None, str | None]:
    if (item.patient_id and item.study_id) or (item.uri is None and item.data is None):
        return item.patient_id, item.study_id
    try:
        who = read_identity(_beginning(item))
    except (RowError, OSError):  # no DICOM file, or none that is there: its row has no such key either
        return item.patient_id, item.study_id
    return item.patient_id or who.patient_id, item.study_id or who.study_uid


def _beginning(item: SourceItem) -> bytes:
    if item.data is not None:
        return item.data
    fs, path = storage.open_uri(item.uri or "")
    with fs.open_input_file(path) as stream:
        return bytes(stream.read(HEADER_BYTES))


def _existing(path: Path) -> Iterator[tuple[str, str, str]]:
    if not path.exists():
        return
    with path.open(newline="", encoding="utf-8") as stream:
        rows = csv.DictReader(stream)
        if rows.fieldnames != COLUMNS:
            raise ValueError(f"--crosswalk: {path} is another file: its columns are not {', '.join(COLUMNS)}")
        for row in rows:
            yield row["kind"], row["key"], row["id"]


def _write(path: Path, rows: Iterable[tuple[str, str, str]]) -> None:
    sink = io.StringIO(newline="")
    writer = csv.writer(sink)
    writer.writerow(COLUMNS)
    writer.writerows(rows)
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    handle = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="") as stream:
            stream.write(sink.getvalue())
            stream.flush()
            os.fsync(stream.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
