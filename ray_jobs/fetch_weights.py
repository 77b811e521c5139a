"""A checkpoint folder from a bucket to a node's disk, whole or not at all: `meddam fetch-weights SOURCE TARGET`.

    meddam fetch-weights s3://bucket/weights/DAM-3B /weights/DAM-3B

For init containers, prologues and `ray up`: nodes without a network have no hub to ask. Does nothing where the same
files lie there already; several processes of a node may run it at once.
"""

from __future__ import annotations

import os
import shutil
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from meddam_core import storage
from ray_jobs.module_command import run_as

CHUNK_BYTES = 16 << 20


class Config(BaseModel):
    """What `meddam fetch-weights` does."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    source: str
    """The checkpoint folder, on S3 or disk."""
    target: Path
    """Where it goes, on this machine's disk."""
    num_threads: int = Field(8, ge=1)
    """Files copied at once."""


class Summary(BaseModel):
    """What was copied."""

    target: str
    num_files: int
    num_bytes: int
    copied: bool
    """False where everything was there already."""

    @property
    def exit_code(self) -> int:
        """A folder that is there is a success."""
        return 0

    def lines(self) -> list[str]:
        """For a person."""
        what = "copied" if self.copied else "there already"
        return [f"{self.target}: {self.num_files} files, {self.num_bytes / 1e9:.2f} GB, {what}"]


def run(cfg: Config) -> Summary:
    """Copies what is not there. Raises ValueError for a source without a checkpoint, OSError where copying fails."""
    prefix = cfg.source.rstrip("/") + "/"
    found = storage.list_objects(prefix)
    names = {o.uri[len(_full(prefix)) :]: o for o in found}
    if "config.json" not in names:
        raise ValueError(f"{cfg.source} holds no config.json: give the folder of a checkpoint in DAM's official layout")
    total = sum(o.size for o in found)
    there = all((cfg.target / n).is_file() and (cfg.target / n).stat().st_size == o.size for n, o in names.items())
    if not there:
        _copy(cfg, names)
    return Summary(target=str(cfg.target), num_files=len(names), num_bytes=total, copied=not there)


def _copy(cfg: Config, names: dict[str, storage.ObjectInfo]) -> None:
    beside = cfg.target.with_name(f".{cfg.target.name}.{uuid.uuid4().hex}")
    try:
        with ThreadPoolExecutor(cfg.num_threads) as pool:
            list(pool.map(lambda item: _copy_file(item[1].uri, beside / item[0], item[1].size), names.items()))
        if cfg.target.exists():  # an older or broken copy gives way
            cfg.target.rename(beside.with_name(beside.name + ".old"))
        os.replace(beside, cfg.target)  # noqa: PTH105 - the one call that replaces an empty folder too
    finally:
        for leftover in (beside, beside.with_name(beside.name + ".old")):
            shutil.rmtree(leftover, ignore_errors=True)


def _copy_file(uri: str, target: Path, size: int) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    fs, path = storage.open_uri(uri)
    with fs.open_input_file(path) as stream, target.open("wb") as file:
        while chunk := stream.read(CHUNK_BYTES):
            file.write(chunk)
    if target.stat().st_size != size:
        raise OSError(f"{uri} ended after {target.stat().st_size} of {size} bytes; try again")


def _full(prefix: str) -> str:
    """The prefix as listings write it."""
    return prefix if storage.is_s3(prefix) else storage.open_uri(prefix)[1].rstrip("/") + "/"


if __name__ == "__main__":  # the same options as `meddam fetch-weights`
    run_as("fetch-weights")
