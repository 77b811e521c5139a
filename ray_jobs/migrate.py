"""Files of an older schema version, written anew in the present one: a dataset's shards, or a run's captions.

    meddam migrate s3://bucket/set --out s3://bucket/set-2       into another place
    meddam migrate s3://bucket/set                               in place, shard by shard
    meddam migrate s3://bucket/runs/one                          a further generation of its captions

Nobody has to: every reader upgrades older rows as it reads them (meddam_core.migrations). It is for data that other
programs read, and before a release that no longer knows a version. Ids, pictures and counts stay as they are.

Each shard is replaced or written whole or not at all, and an interrupted migration is finished by running it again.
Published runs that were made of them stay readable; one that is still unfinished would find its shards changed, and
has to be finished first, or begun anew.
"""

from __future__ import annotations

import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict

from meddam_core import storage
from meddam_core.migrations import version_of
from meddam_core.records import SCHEMA_VERSION, Image
from meddam_core.shards import merge_shards, shard_metadata
from ray_jobs.compact import merged_generation
from ray_jobs.dataset_files import (
    DATASET,
    check_finished,
    copy_facts,
    is_shard_folder,
    making,
    meant_for_another_place,
    note_facts,
)
from ray_jobs.lease import Lease
from ray_jobs.module_command import run_as
from ray_jobs.publish import FILE_BYTES
from ray_jobs.run_directory import MANIFEST, SUMMARY, RunDirectory
from ray_jobs.snapshot import shards_below
from ray_jobs.summary import EXIT_INCOMPLETE

_OWN = ("meddam.schema", "meddam.schema_version")


class Config(BaseModel):
    """What `meddam migrate` does."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    place: str
    """A folder of image shards, or a published run, on S3 or disk."""
    out: str | None = None
    """Where the shards go; by default they are replaced where they are."""


class Summary(BaseModel):
    """What was written anew."""

    place: str
    num_migrated: int
    """Files that were of an older version."""
    num_current: int
    """Files that were not."""
    clean: bool = True

    @property
    def exit_code(self) -> int:
        """Not 0 where the audit of a run's new captions found something, and nothing was announced."""
        return 0 if self.clean else EXIT_INCOMPLETE

    def lines(self) -> list[str]:
        """For a person."""
        if not self.clean:
            return [f"{self.place}: its captions are not what the run should hold; `meddam audit` says more"]
        already = f"; {self.num_current:,} had it already" if self.num_current else ""
        return [f"{self.num_migrated:,} files brought to schema version {SCHEMA_VERSION}{already}; {self.place}"]


def run(cfg: Config) -> Summary:
    """Migrates. Raises ValueError for a place that is neither, or newer; LeaseHeld where somebody is at work."""
    if is_shard_folder(cfg.place):
        return _dataset(cfg)
    if cfg.out is not None:
        raise ValueError(f"--out is for shards; {cfg.place} is a run, whose captions get a further generation in place")
    directory = RunDirectory(cfg.place)
    with Lease(directory.uri):
        return _run(directory)


def _run(directory: RunDirectory) -> Summary:
    files, summary = directory.published(), directory.read_json(SUMMARY)
    if files is None or summary is None:
        raise ValueError(f"{directory.uri} is not complete yet: run `meddam caption` again first")
    manifest = directory.read_json("captions", f"gen={summary['generation']}", MANIFEST) or {}
    if manifest.get("schema_version", 1) == SCHEMA_VERSION:
        return Summary(place=directory.uri, num_migrated=0, num_current=len(files))
    merged = merged_generation(directory, FILE_BYTES)
    return Summary(place=directory.uri, num_migrated=len(files), num_current=0, clean=merged.clean)


def _dataset(cfg: Config) -> Summary:
    found = shards_below(cfg.place)
    check_finished(cfg.place)
    shards = [o.uri for o in found]
    out = cfg.place if cfg.out is None else meant_for_another_place(cfg.place, cfg.out)
    with Lease(out) if cfg.out is None else making(out, "migrate", cfg.place, found):
        versions = {uri: _version(uri) for uri in shards}  # all of them, before the first is written
        for uri in shards:
            target = uri if cfg.out is None else storage.join(out, "shards", uri.rpartition("/")[2])
            if cfg.out is not None or versions[uri] != SCHEMA_VERSION:
                kept = {k: v for k, v in (shard_metadata(uri) or {}).items() if k not in _OWN}
                merge_shards([uri], target, kept)
        if cfg.out is not None:
            copy_facts(cfg.place, out)
        elif storage.exists(storage.join(out, DATASET)):
            note_facts(storage.read_bytes(storage.join(out, DATASET)), out)
    current = sum(v == SCHEMA_VERSION for v in versions.values())
    return Summary(place=out, num_migrated=len(shards) - current, num_current=current)


def _version(uri: str) -> int:
    fs, path = storage.open_uri(uri)
    return version_of(pq.read_schema(path, filesystem=fs), Image, uri)


if __name__ == "__main__":  # the same options as `meddam migrate`
    run_as("migrate")
