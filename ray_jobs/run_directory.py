"""The run directory on S3 or disk: everything that a run is, in files that are written once.

    run.json                    effective config, fingerprint, versions; written first
    inputs.parquet              snapshot of the shards: uri, etag, rows, regions, first and last id
    lease                       who works on it (ray_jobs.lease)
    parts/attempt=1/*.parquet   what Ray writes: one image a row, captions nested
    checkpoint/attempt=1/       Ray's record of the ids written; removed once the run is published
    captions/gen=1/*.parquet    the flat, audited table, one caption a row, with manifest.json
    summary.json                counts and times; written last, names the generation

Without summary.json a run is not complete. A generation is never changed; `meddam retry` publishes a further one.
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from meddam_core import storage
from meddam_core.migrations import check_version

RUN, INPUTS, SUMMARY, MANIFEST = "run.json", "inputs.parquet", "summary.json", "manifest.json"

_INPUT_SCHEMA = pa.schema(
    [
        ("uri", pa.string()), ("etag", pa.string()), ("size", pa.int64()), ("num_images", pa.int64()),
        ("num_regions", pa.int64()), ("first_id", pa.int64()), ("last_id", pa.int64()),
    ]
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class InputShard:
    """One shard as it was when the run began. Ids lie in [first_id, last_id] and in no other shard's range."""

    uri: str
    etag: str
    size: int
    num_images: int
    num_regions: int
    first_id: int
    last_id: int


class RunDirectory:
    """Names and reads the files of a run; knows nothing of how they come about."""

    def __init__(self, uri: str) -> None:
        fs, path = storage.open_uri(uri)
        self.uri = uri.rstrip("/") if storage.is_s3(uri) else path
        self.filesystem = fs

    def at(self, *parts: str) -> str:
        """The URI of something in the run directory."""
        return storage.join(self.uri, *parts)

    def path(self, *parts: str) -> str:
        """The same as a path for `filesystem`."""
        return storage.open_uri(self.at(*parts))[1]

    # -- run.json, inputs.parquet, summary.json ----------------------------------------------------------------------

    def read_json(self, *parts: str) -> dict[str, Any] | None:
        """A JSON file of the run; None where it is not there."""
        if not storage.exists(self.at(*parts)):
            return None
        found: dict[str, Any] = json.loads(storage.read_bytes(self.at(*parts)))
        return found

    def write_json(self, value: dict[str, Any], *parts: str) -> None:
        """Puts a JSON file in one step."""
        storage.write_bytes(self.at(*parts), json.dumps(value, indent=2, sort_keys=False).encode() + b"\n")

    def write_inputs(self, shards: list[InputShard]) -> None:
        """Puts the snapshot of the input shards."""
        rows = [{name: getattr(s, name) for name in _INPUT_SCHEMA.names} for s in shards]
        sink = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows, schema=_INPUT_SCHEMA), sink)
        storage.write_bytes(self.at(INPUTS), sink.getvalue())

    def inputs(self) -> list[InputShard]:
        """The snapshot of the input shards. Raises ValueError where this is no run directory."""
        if not storage.exists(self.at(INPUTS)):
            raise ValueError(
                f"{self.uri} is not a run directory: it has no {INPUTS}; give the --out of `meddam caption`"
            )
        table = pq.read_table(io.BytesIO(storage.read_bytes(self.at(INPUTS))))
        return [InputShard(**row) for row in table.to_pylist()]

    # -- parts and checkpoint ----------------------------------------------------------------------------------------

    def parts(self, attempt: int) -> str:
        """Where Ray writes the captioned images of an attempt."""
        return self.at("parts", f"attempt={attempt}")

    def checkpoint(self, attempt: int) -> str:
        """Where Ray notes which ids of an attempt are written."""
        return self.at("checkpoint", f"attempt={attempt}")

    def part_files(self) -> list[tuple[int, str]]:
        """(attempt, URI) of every part file, sorted."""
        return [(attempt, uri) for attempt, uri, _ in self.sized_parts()]

    def sized_parts(self) -> list[tuple[int, str, int]]:
        """(attempt, URI, bytes) of every part file, sorted."""
        infos = storage.list_files(self.at("parts"), ".parquet", recursive=True)
        prefix = "s3://" if storage.is_s3(self.uri) else ""
        return [(int(i.path.split("/attempt=")[1].split("/")[0]), prefix + i.path, i.size) for i in infos]

    # -- generations -------------------------------------------------------------------------------------------------

    def generation(self, number: int) -> str:
        """Where a generation of the published table lies."""
        return self.at("captions", f"gen={number}")

    def next_generation(self) -> int:
        """A number no generation has, finished or not."""
        infos = storage.list_files(self.at("captions"), recursive=True)
        numbers = [int(i.path.split("/gen=")[1].split("/")[0]) for i in infos if "/gen=" in i.path]
        return max(numbers, default=0) + 1

    def published(self) -> list[str] | None:
        """URIs of the caption files that summary.json stands for; None while the run is not complete."""
        summary = self.read_json(SUMMARY)
        if summary is None:
            return None
        number = int(summary["generation"])
        manifest = self.read_json("captions", f"gen={number}", MANIFEST)
        if manifest is None:
            raise ValueError(f"{self.generation(number)} has no {MANIFEST}: the run directory is damaged")
        check_version(int(manifest.get("schema_version", 1)), self.generation(number))
        return [storage.join(self.generation(number), f["name"]) for f in manifest["files"]]
