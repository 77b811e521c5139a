"""Brings a dataset's or a run's own counts in line with its rows, after some were taken out (`meddam withdraw`)."""

from __future__ import annotations

import json
import logging

import pyarrow.parquet as pq

from meddam_core import storage
from meddam_core.shards import shard_facts
from ray_jobs.audit import audit
from ray_jobs.dataset_files import DATASET
from ray_jobs.fingerprint import inputs_digest
from ray_jobs.run_directory import MANIFEST, RUN, SUMMARY, RunDirectory
from ray_jobs.snapshot import as_they_are, shards_below

logger = logging.getLogger(__name__)


def recount(folder: str) -> None:
    """Counts what is there; a folder may be a dataset, a run, both or neither."""
    if storage.exists(storage.join(folder, DATASET)):
        _recount_dataset(folder)
    if storage.exists(storage.join(folder, RUN)):
        _recount_run(RunDirectory(folder))


def _recount_dataset(folder: str) -> None:
    uri = storage.join(folder, DATASET)
    shards = [shard_facts(o.uri) for o in shards_below(folder)]
    said = json.loads(storage.read_bytes(uri))
    said |= {"num_images": sum(s.num_rows for s in shards), "num_regions": sum(len(s.region_ids) for s in shards)}
    storage.write_bytes(uri, json.dumps(said, indent=2).encode())


def _recount_run(directory: RunDirectory) -> None:
    """Snapshot and fingerprint name the shards as they are now, so that the run can be resumed and retried."""
    described, summary = directory.read_json(RUN), directory.read_json(SUMMARY)
    assert described is not None
    shards = as_they_are(directory.inputs())
    directory.write_inputs(shards)
    described["fingerprint"]["inputs"] = inputs_digest(shards)
    directory.write_json(described, RUN)
    if summary is None:
        return
    _recount_manifest(directory, int(summary["generation"]))
    try:
        found = audit(directory)
    except FileNotFoundError as error:
        logger.warning("%s: a shard is gone, so its summary was left as it was (%s)", directory.uri, error)
        return
    directory.write_json(
        summary | {
            "num_images": found.num_images, "num_regions": found.num_regions, "num_captions": found.num_published,
            "by_status": found.by_status, "by_reason": found.by_reason, "audit": found.to_json(),
        }, SUMMARY,
    )  # fmt: skip


def _recount_manifest(directory: RunDirectory, generation: int) -> None:
    parts = ("captions", f"gen={generation}", MANIFEST)
    manifest = directory.read_json(*parts) or {"files": []}
    for file in manifest["files"]:
        fs, path = storage.open_uri(directory.at("captions", f"gen={generation}", file["name"]))
        with fs.open_input_file(path) as stream:
            file["num_rows"] = int(pq.ParquetFile(stream).metadata.num_rows)
    directory.write_json(manifest, *parts)
