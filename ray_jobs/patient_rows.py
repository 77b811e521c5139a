"""The rows of one patient in Parquet tables, found by the patient's key, or by the images that are the patient's.

Shards, parts and captions carry the key. Checkpoints, verdicts and exports don't: their rows are known by image and
region ids, and by the dataset where they name it, for every dataset may number its images from 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from meddam_core import storage
from meddam_core.records import REGION_BITS
from meddam_core.shards import appearing_whole

_NAMES = ("patient_key", "dataset", "image_id", "region_id")


@dataclass(frozen=True, slots=True, kw_only=True)
class Patient:
    """Who is looked for."""

    key: str
    """As rows carry it."""
    images: dict[str, NDArray[np.int64]]
    """Sorted ids of the patient's images by dataset; "" for rows that name none."""

    @property
    def all_images(self) -> NDArray[np.int64]:
        """Sorted ids of the images of every dataset."""
        return np.unique(np.concatenate([np.empty(0, np.int64), *self.images.values()]))

    @property
    def num_images(self) -> int:
        """Images, those of two datasets counted apart."""
        return sum(len(ids) for ids in self.images.values())

    def is_mine(self, rows: pa.Table) -> NDArray[np.bool_]:
        """Which rows are the patient's: by the key, or in tables without keys by dataset and image.

        A row without a key in a table of keys is of a patient whom nobody knows.
        """
        if "patient_key" in rows.column_names:
            return np.asarray(pc.fill_null(pc.equal(rows["patient_key"], self.key), False))
        return self.by_image(rows)

    def has_image_of(self, rows: pa.Table) -> NDArray[np.bool_]:
        """Which rows name an image id that is the patient's in some dataset."""
        ids = _image_ids(rows)
        return np.zeros(len(rows), np.bool_) if ids is None else np.isin(ids, self.all_images)

    def by_image(self, rows: pa.Table) -> NDArray[np.bool_]:
        """Which rows name one of the patient's images, whatever their key; by dataset too, where they name it."""
        if "dataset" not in rows.column_names:
            return self.has_image_of(rows)
        mine, ids = np.zeros(len(rows), np.bool_), _image_ids(rows)
        if ids is not None:
            datasets = pc.fill_null(rows["dataset"], "")
            for dataset, images in self.images.items():
                mine |= np.asarray(pc.equal(datasets, dataset)) & np.isin(ids, images)
        return mine


def find_patient(uris: Sequence[str], key: str) -> Patient:
    """The images that rows with the patient's key name."""
    found: dict[str, list[NDArray[np.int64]]] = {}
    for uri in uris:
        with opened(uri) as file:
            names = _names(file)
            if not {"patient_key", "image_id"} <= set(names):
                continue
            for batch in file.iter_batches(columns=names):
                mine = batch.filter(pc.fill_null(pc.equal(batch["patient_key"], key), False))
                datasets = pc.fill_null(mine["dataset"], "").to_pylist() if "dataset" in names else [""] * len(mine)
                for dataset in set(datasets):
                    of = np.asarray([d == dataset for d in datasets], np.bool_)
                    found.setdefault(dataset, []).append(_numbers(mine["image_id"])[of])
    return Patient(key=key, images={d: np.unique(np.concatenate(ids)) for d, ids in found.items()})


def count_rows(uris: Sequence[str], patient: Patient) -> dict[str, int]:
    """The patient's rows in each table that has some.

    Raises ValueError where it cannot be told whose rows they are: tables that name no patient, beside rows of another
    one with the same image ids.
    """
    counts: dict[str, int] = {}
    by_id, by_dataset = "", ""  # tables whose rows are known by these alone
    other_id, other_dataset = "", ""  # tables with rows of others that are alike in these
    for uri in uris:
        with opened(uri) as file:
            if not (names := _names(file)):
                continue
            rows = file.read(columns=names)
        mine = patient.is_mine(rows)
        if num := int(mine.sum()):
            counts[uri] = num
            if "patient_key" not in names:
                by_id, by_dataset = (by_id, by_dataset or uri) if "dataset" in names else (by_id or uri, by_dataset)
        if not other_id and (patient.has_image_of(rows) & ~mine).any():
            other_id = uri
        if not other_dataset and (patient.by_image(rows) & ~mine).any():
            other_dataset = uri
    for unclear, other in ((by_id, other_id), (by_dataset, other_dataset)):
        if unclear and other:
            raise ValueError(
                f"rows of {unclear} name no patient, and {other} has rows of others with the same image ids: it cannot "
                "be told whose they are. Nothing was changed. Withdraw from one dataset and what was made of it at a "
                "time, with a command for each"
            )
    return counts


def take_out(uri: str, patient: Patient) -> None:
    """Replaces a table by one without the patient's rows: same schema, metadata and compression, by row groups."""
    with opened(uri) as file:
        mine = patient.is_mine(file.read(columns=_names(file)))
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


def opened(uri: str) -> Any:
    """A Parquet file on S3 or disk."""
    fs, path = storage.open_uri(uri)
    return pq.ParquetFile(path, filesystem=fs)


def _names(file: Any) -> list[str]:
    """The columns that say whose a row is, of those that a table has; [] where no row can be told."""
    names = [n for n in _NAMES if n in file.schema_arrow.names]
    return names if names != ["dataset"] else []


def _image_ids(rows: pa.Table) -> NDArray[np.int64] | None:
    if "image_id" in rows.column_names:
        return _numbers(rows["image_id"])
    if "region_id" in rows.column_names:
        return np.asarray(_numbers(rows["region_id"]) >> REGION_BITS, np.int64)
    return None


def _numbers(column: pa.Array | pa.ChunkedArray) -> NDArray[np.int64]:
    """Ids as numbers; exports write them as text, because JavaScript rounds them."""
    return np.asarray(pc.fill_null(pc.cast(column, pa.int64()), -1), np.int64)
