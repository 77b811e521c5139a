"""A curated set (or a published run) in the format that somebody else reads; stops where a licence would be broken.

    meddam export s3://bucket/sets/one --format hf --out one-hf
    meddam export sets/one --format dicom --out one-dicom          # SR (TID 1500) and SEG, through highdicom

Pictures are read from the shards that the captions came from and rendered as the model saw them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, Field

from meddam_core import storage
from meddam_core.curation.exporters import FORMATS, Card, Item
from meddam_core.curation.licences import Export, check_export, licence_of_model
from meddam_core.datasets.recipes import get_recipe
from meddam_core.imaging.render import render
from meddam_core.records import Caption, arrow_schema, from_row
from meddam_core.shards import images_by_id
from ray_jobs.curate import CAPTIONS, CURATION
from ray_jobs.module_command import run_as
from ray_jobs.run_directory import RUN, InputShard, RunDirectory


class Config(BaseModel):
    """What `meddam export` does."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    source: str
    """A set of `meddam curate`, or a published run, on S3 or disk."""
    out: Path
    """Folder for the result; it must not hold anything yet."""
    format: Literal["hf", "llava", "webdataset", "coco", "dlc-bench", "dicom"] = "hf"
    """Hugging Face dataset with card and Croissant, LLaVA JSON, WebDataset tars, COCO captions, DLC-Bench, DICOM SR."""
    pixels: bool = True
    """Copy the pictures; without, only captions and references."""
    audience: Literal["internal", "public"] = "internal"
    """Who will get it: public asks more of licences and of the egress policy."""
    purpose: Literal["research", "commercial"] = "research"
    """What it will be used for."""
    name: str = Field("meddam-captions", min_length=1)
    """The set's name on its card."""


class Summary(BaseModel):
    """What was written."""

    out: str
    format: str
    num_captions: int
    conditions: list[str]

    @property
    def exit_code(self) -> int:
        """An export that ends is whole."""
        return 0

    def lines(self) -> list[str]:
        """For a person."""
        return [f"{self.num_captions:,} captions as {self.format}: {self.out}", *(f"  {c}" for c in self.conditions)]


def run(cfg: Config) -> Summary:
    """Exports. Raises ValueError for an export that a licence forbids, and for a folder that is not empty."""
    if cfg.out.exists() and any(cfg.out.iterdir()):
        raise ValueError(f"{cfg.out} is not empty; give a new folder")
    files, runs, lineage = _source(cfg.source)
    seen: dict[str, set[str]] = {"images": set(), "weights": set(), "egress": set()}
    for file in files:
        table = _read(file, ["licence", "egress", "model"])
        seen["images"] |= set(table["licence"].unique().to_pylist())
        seen["egress"] |= set(table["egress"].unique().to_pylist())
        seen["weights"] |= {licence_of_model(m) for m in table["model"].unique().to_pylist()}
    wanted = Export(pixels=cfg.pixels, audience=cfg.audience, purpose=cfg.purpose)
    conditions = check_export(seen["images"], seen["weights"], seen["egress"], wanted)
    licences = {k: sorted(seen[k]) for k in ("images", "weights")}
    card = Card(name=cfg.name, licences=licences, conditions=conditions, lineage=lineage)
    cfg.out.mkdir(parents=True, exist_ok=True)
    shards = {uri: RunDirectory(uri).inputs() for uri in runs} if cfg.pixels else {}
    num = FORMATS[cfg.format](_items(files, shards, runs), cfg.out, card)
    return Summary(out=str(cfg.out), format=cfg.format, num_captions=num, conditions=conditions)


def _source(uri: str) -> tuple[list[str], list[str], dict[str, Any]]:
    """(caption files, runs, lineage) of a curated set or a run."""
    directory = RunDirectory(uri)
    curated = directory.read_json(CURATION)
    if curated is not None:
        files = [o.uri for o in storage.list_objects(directory.at(CAPTIONS) + "/", ".parquet")]
        runs = [r["uri"] for r in curated["runs"]]
        return files, runs, {"curation": curated["config"], "runs": curated["runs"]}
    published = directory.published()
    if published is None:
        raise ValueError(f"{uri} is neither a set of `meddam curate` nor a published run")
    return published, [directory.uri], {"runs": [{"uri": uri, **(directory.read_json(RUN) or {})}]}


def _read(uri: str, columns: list[str] | None = None) -> pa.Table:
    fs, path = storage.open_uri(uri)
    return pq.read_table(path, columns=columns, filesystem=fs)


def _items(files: list[str], shards: dict[str, list[InputShard]], runs: list[str]) -> Iterator[Item]:
    """One item an image, a caption file at a time."""
    names = arrow_schema(Caption).names
    for file in files:
        table = _read(file)
        own = table["run"].to_pylist() if "run" in table.column_names else [runs[0]] * table.num_rows
        rows = zip(own, table.select(names).to_pylist(), strict=True)
        for (run_uri, _), group in itertools.groupby(rows, key=lambda r: (r[0], r[1]["image_id"])):
            captions = [from_row(Caption, row) for _, row in group if row["text"]]
            if captions:
                yield Item(captions=captions, picture_HWC=_picture(captions[0], shards.get(run_uri)))


def _picture(caption: Caption, shards: list[InputShard] | None) -> Any:
    if shards is None:
        return None
    for shard in shards:
        if shard.first_id <= caption.image_id <= shard.last_id:
            for image in images_by_id(shard.uri, {caption.image_id}):
                return render(image, window=get_recipe(image.recipe).window)
    raise ValueError(f"the shard of image {caption.image_id} is gone; export without pixels (--no-pixels)")


if __name__ == "__main__":  # the same options as `meddam export`
    run_as("export")
