"""Small files into large ones: a run's captions, or a dataset's shards. Ids and rows stay as they are.

    meddam compact s3://bucket/runs/one                              a further generation of its captions
    meddam compact s3://bucket/set --out s3://bucket/set-large       a dataset of fewer, larger shards

A run publishes files of a good size itself; this is for runs of many small ones (imported captions, older releases),
and for another size. The new generation is audited before the run's summary names it; the one before stays where it is.
Shards are merged into another place only, because runs know the shards that they were made of by name and content; run
it again where it was cut off.

Works in this process, a row group in memory, without Ray.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, Field

from meddam_core import storage
from meddam_core.migrations import upgraded, version_of
from meddam_core.records import Caption
from meddam_core.shards import merge_shards
from ray_jobs.audit import audit
from ray_jobs.dataset_files import copy_facts, is_shard_folder, making, meant_for_another_place
from ray_jobs.lease import Lease
from ray_jobs.module_command import run_as
from ray_jobs.publish import FILE_BYTES, grouped, write_captions, write_manifest
from ray_jobs.run_directory import SUMMARY, RunDirectory
from ray_jobs.snapshot import snapshot
from ray_jobs.summary import EXIT_INCOMPLETE

SHARD_MB = 512


class Config(BaseModel):
    """What `meddam compact` does."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    place: str
    """A published run, or a folder of image shards, on S3 or disk."""
    out: str | None = None
    """Where the larger shards go; for shards only."""
    file_mb: int | None = Field(None, ge=1)
    """Size of a file, MB, at most or little more; by default 32 of captions and 512 of shards."""


class Summary(BaseModel):
    """What was merged."""

    place: str
    num_files_before: int
    num_files: int
    num_rows: int
    generation: int | None = None
    """Of a run's captions."""
    clean: bool = True

    @property
    def exit_code(self) -> int:
        """Not 0 where the audit of the merged captions found something, and nothing was announced."""
        return 0 if self.clean else EXIT_INCOMPLETE

    def lines(self) -> list[str]:
        """For a person."""
        if not self.clean:
            return [f"{self.place}: the merged captions are not what the run should hold; `meddam audit` says more"]
        of = f", generation {self.generation}" if self.generation is not None else ""
        return [f"{self.num_files_before:,} files into {self.num_files:,}: {self.num_rows:,} rows{of}; {self.place}"]


def run(cfg: Config) -> Summary:
    """Merges. Raises ValueError for a place that is neither, or not complete; LeaseHeld where somebody is at work."""
    if is_shard_folder(cfg.place):
        return _shards(cfg)
    if cfg.out is not None:
        raise ValueError(f"--out is for shards; {cfg.place} is a run, whose captions get a further generation in place")
    directory = RunDirectory(cfg.place)
    directory.inputs()  # says what is wrong where it is no run
    with Lease(directory.uri):
        return merged_generation(directory, FILE_BYTES if cfg.file_mb is None else cfg.file_mb << 20)


def merged_generation(directory: RunDirectory, file_bytes: int) -> Summary:
    """Publishes the run's captions again, in files of about `file_bytes` and in the present schema.

    The run's summary names them once they are audited. Raises ValueError where the run is not complete.
    """
    before, summary = directory.published(), directory.read_json(SUMMARY)
    if before is None or summary is None:
        raise ValueError(f"{directory.uri} is not complete yet: run `meddam caption` again first")
    infos = storage.list_objects(directory.generation(int(summary["generation"])) + "/", ".parquet")
    sizes = {storage.open_uri(o.uri)[1]: o.size for o in infos}
    number = directory.next_generation()
    files = []
    sized = [(uri, sizes[storage.open_uri(uri)[1]]) for uri in before]
    for i, uris in enumerate(grouped(sized, file_bytes)):
        name = f"captions-{i:06d}.parquet"
        counts = write_captions(storage.join(directory.generation(number), name), _tables(uris))
        if counts["rows"]:
            files.append(
                {"name": name, "num_rows": counts["rows"], "parts": [u.rpartition("/captions/")[2] for u in uris]}
            )
    write_manifest(directory, number, files)
    found = audit(directory, [storage.join(directory.generation(number), str(f["name"])) for f in files])
    if found.clean:
        now = datetime.now(UTC).isoformat(sep=" ", timespec="seconds")
        directory.write_json(summary | {"generation": number, "audit": found.to_json(), "finished_at": now}, SUMMARY)
    return Summary(
        place=directory.uri, num_files_before=len(before), num_files=len(files), num_rows=found.num_published,
        generation=number, clean=found.clean,
    )  # fmt: skip


def _tables(uris: Sequence[str]) -> Iterator[pa.Table]:
    """The captions of files, a row group at a time, in the present schema."""
    for uri in uris:
        fs, path = storage.open_uri(uri)
        with fs.open_input_file(path) as stream:
            file = pq.ParquetFile(stream)
            version = version_of(file.schema_arrow, Caption, uri)
            for group in range(file.num_row_groups):
                yield upgraded(file.read_row_group(group), Caption, version)


def _shards(cfg: Config) -> Summary:
    out = meant_for_another_place(cfg.place, cfg.out)
    shards = snapshot([cfg.place], finished=True)  # by their ids, which must not overlap
    file_mb = cfg.file_mb or SHARD_MB
    groups = list(grouped([(s.uri, s.size) for s in shards], file_mb << 20))
    with making(out, "compact", cfg.place, shards, file_mb=file_mb):
        num_rows = sum(
            merge_shards(uris, storage.join(out, "shards", uris[0].rpartition("/")[2]), {}) for uris in groups
        )
        copy_facts(cfg.place, out, num_shards=len(groups))
    return Summary(place=out, num_files_before=len(shards), num_files=len(groups), num_rows=num_rows)


if __name__ == "__main__":  # the same options as `meddam compact`
    run_as("compact")
