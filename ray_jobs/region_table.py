"""The region table of LIDC-IDRI, from the readings alone: `meddam ingest lidc-idri --regions-only --out OUT`.

Writes OUT/regions.parquet and OUT/regions.csv (meddam_core.datasets.lidc_table has the columns). Takes no images, no
Ray, and about a minute for the whole collection on one core.
"""

from __future__ import annotations

import io

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict

from meddam_core import storage
from meddam_core.datasets.lidc_annotations import read_database
from meddam_core.datasets.lidc_table import SCHEMA, region_rows
from ray_jobs.ingest_config import LidcIdriConfig

TABLES = ("regions.parquet", "regions.csv")


class RegionSummary(BaseModel):
    """What was written."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    out: str
    num_regions: int
    num_scans: int
    num_patients: int

    @property
    def exit_code(self) -> int:
        """What the process ends with."""
        return 0 if self.num_regions else 3

    def lines(self) -> list[str]:
        """The summary as a person reads it."""
        where = " and ".join(storage.join(self.out, name) for name in TABLES)
        return [f"{self.num_regions:,} nodules in {self.num_scans:,} scans of {self.num_patients:,} patients: {where}"]


def write_region_table(cfg: LidcIdriConfig) -> RegionSummary:
    """Writes the table. Raises ValueError where the readings are not there, StorageError where it cannot be written."""
    storage.check_writable(cfg.out)
    rows = list(region_rows(read_database(cfg.annotations), min_readers=cfg.min_readers, merged=cfg.merged))
    table = pa.Table.from_pylist(rows, schema=SCHEMA)
    parquet, text = io.BytesIO(), io.BytesIO()
    pq.write_table(table, parquet)
    pacsv.write_csv(table, text)
    for name, sink in zip(TABLES, (parquet, text), strict=True):
        storage.write_bytes(storage.join(cfg.out, name), sink.getvalue())
    return RegionSummary(
        out=cfg.out, num_regions=len(rows), num_scans=len({row["scan_id"] for row in rows}),
        num_patients=len({row["patient_id"] for row in rows}),
    )  # fmt: skip
