"""Captions of any other system become a run: `meddam captions import TABLE`, then audit, judge and report as for ours.

    meddam captions import gpt4roi.csv --shard s3://bucket/vindr --out s3://bucket/runs/gpt4roi --model GPT4RoI

The table (CSV, JSON lines or Parquet, on S3 or disk) has the columns `region_id` and `text` (or `caption`), and may
have `prompt_id` and `sample`. Region ids are those of the shards; `meddam captions list SHARDS --out regions.csv`
writes them with image keys and boxes, for the other system to describe.

Invariants:
- every region of the shards has a row for each prompt and sample; one without a caption in the table is a failed row;
- rows of the table for regions that are not in the shards are counted and named, and go nowhere.

Memory: the table; images a shard at a time, without pixels. Needs no Ray.
"""

from __future__ import annotations

import io
import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.json as pajson
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from meddam_core import __version__, storage
from meddam_core.captioner import failed_caption
from meddam_core.records import (
    CaptionedImage,
    Image,
    Reason,
    RegionCaption,
    RowError,
    Status,
    arrow_schema,
    to_row,
)
from meddam_core.shards import read_shard, shard_facts
from ray_jobs import summary as caption_summary
from ray_jobs.audit import audit
from ray_jobs.fingerprint import STAGES, inputs_digest
from ray_jobs.module_command import run_as
from ray_jobs.publish import flatten, write_manifest
from ray_jobs.run_directory import RUN, SUMMARY, InputShard, RunDirectory
from ray_jobs.snapshot import snapshot

IMPORTED = "imported"
NUM_EXAMPLES = 5
_KEPT = ["image_id", "image_key", "patient_key", "study_key", "dataset", "split", "recipe", "modality", "width",
         "height", "pixel_spacing_mm", "licence", "egress", "regions"]  # fmt: skip


class Config(BaseModel):
    """Make a run of captions that another system wrote, so that they can be audited, judged and shown like ours."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    table: str
    """CSV, JSON lines or Parquet file with region_id and text, on S3 or disk."""
    shards: tuple[str, ...] = Field(min_length=1)
    """Folders of the image shards that were described."""
    out: str
    """The run directory to make, on S3 or disk."""
    model: str = Field(min_length=1)
    """The system's name, as leaderboards show it."""
    prompt_id: str = IMPORTED
    """Prompt id of rows that name none."""


class Summary(caption_summary.Summary):
    """As that of a caption run, with what was in the table and not in the shards."""

    num_unknown: int = 0
    unknown_regions: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """The summary as a person reads it."""
        text = super().lines()
        if self.num_unknown:
            shown = ", ".join(self.unknown_regions)
            text.append(f"  {self.num_unknown:>8,}  rows left out: no such region in the shards, such as {shown}")
        return text


@dataclass(frozen=True, slots=True)
class _Texts:
    """The table, sorted by region."""

    regions: NDArray[np.int64]
    texts: list[str | None]
    prompts: list[str]
    samples: NDArray[np.int64]

    def of(self, region: int) -> Iterator[tuple[str, int, str | None]]:
        """(prompt, sample, text) of a region's rows."""
        start, end = np.searchsorted(self.regions, [region, region + 1])
        for i in range(start, end):
            yield self.prompts[i], int(self.samples[i]), self.texts[i]


def run(cfg: Config) -> Summary:
    """Writes the run directory.

    Raises ValueError where the table lacks columns, names a caption twice, or fits none of the regions; where the place
    holds a run already; StorageError where it cannot be written.
    """
    directory = RunDirectory(cfg.out)
    if directory.read_json(SUMMARY) is not None:
        raise ValueError(f"{directory.uri} holds a run already; give another --out")
    texts = _sorted(read_captions(cfg.table, cfg.prompt_id))
    shards = snapshot(cfg.shards, finished=True)
    regions = np.concatenate([shard_facts(s.uri).region_ids for s in shards])
    if not np.isin(texts.regions, regions).any():
        raise ValueError(f"{cfg.table} has no caption of a region of {', '.join(cfg.shards)}: region_id must be theirs")
    storage.check_writable(directory.uri)
    keys = sorted(set(zip(texts.prompts, texts.samples.tolist(), strict=True)))
    prompts = sorted({p for p, _ in keys})
    num_samples = 1 + max(s for _, s in keys)
    directory.write_inputs(shards)
    directory.write_json(_description(cfg, shards, prompts, num_samples), RUN)
    files = []
    for i, shard in enumerate(shards):
        captions = _captions(shard, texts, prompts, num_samples, cfg.model)
        if captions.num_rows:
            files.append({"name": f"captions-{i:06d}.parquet", "num_rows": captions.num_rows, "parts": [shard.uri]})
            sink = io.BytesIO()
            pq.write_table(captions, sink, compression="zstd")
            storage.write_bytes(directory.at("captions", "gen=1", str(files[-1]["name"])), sink.getvalue())
    write_manifest(directory, 1, files)
    return _finish(directory, shards, files, texts.regions[~np.isin(texts.regions, regions)])


class ListConfig(BaseModel):
    """List the regions of shards as a CSV, for another system to describe; pixels are in the shards."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    shards: tuple[str, ...] = Field(min_length=1)
    """Folders of image shards."""
    out: str
    """The CSV file, on S3 or disk."""


class Listed(BaseModel):
    """What was listed."""

    out: str
    num_regions: int

    @property
    def exit_code(self) -> int:
        """What the process ends with."""
        return 0 if self.num_regions else 3

    def lines(self) -> list[str]:
        """For a person."""
        return [f"{self.num_regions:,} regions: {self.out}"]


def list_regions(cfg: ListConfig) -> Listed:
    """Writes region_id, image_id, image_key, dataset, modality and the box of every region."""
    sink = io.StringIO()
    sink.write("region_id,image_id,image_key,dataset,modality,x0,y0,x1,y1\n")
    num = 0
    for shard in snapshot(cfg.shards, finished=True):
        for image in read_shard(shard.uri, columns=_KEPT, batch_rows=256):
            facts = f"{image.image_id},{image.image_key},{image.dataset},{image.modality}"
            for region in image.regions:
                sink.write(f"{region.region_id},{facts},{','.join(map(str, region.box))}\n")
                num += 1
    storage.write_bytes(cfg.out, sink.getvalue().encode())
    return Listed(out=cfg.out, num_regions=num)


def read_captions(uri: str, prompt_id: str = IMPORTED) -> pa.Table:
    """The table with region_id int64, text, prompt_id and sample. Raises ValueError where it is none."""
    data = pa.BufferReader(storage.read_bytes(uri))
    try:
        if uri.endswith(".parquet"):
            table = pq.read_table(data)
        elif uri.endswith((".jsonl", ".json", ".ndjson")):
            table = pajson.read_json(data, parse_options=pajson.ParseOptions(newlines_in_values=True))
        else:
            table = pacsv.read_csv(data, parse_options=pacsv.ParseOptions(newlines_in_values=True))
    except pa.ArrowInvalid as error:
        raise ValueError(f"{uri} is no table: CSV, JSON lines (.jsonl) or .parquet is expected") from error
    text = next((n for n in ("text", "caption") if n in table.column_names), None)
    if "region_id" not in table.column_names or text is None:
        raise ValueError(f"{uri} needs the columns region_id and text; it has {', '.join(table.column_names)}")
    try:
        regions = pc.cast(table["region_id"], pa.int64())
        samples = pc.cast(table["sample"], pa.int64()) if "sample" in table.column_names else None
    except pa.ArrowInvalid as error:
        raise ValueError(f"{uri}: region_id and sample must be whole numbers") from error
    num = table.num_rows
    prompts = (
        table["prompt_id"].cast(pa.string())
        if "prompt_id" in table.column_names
        else pa.array([prompt_id] * num, pa.string())
    )
    return pa.table(
        {
            "region_id": regions, "text": table[text].cast(pa.string()), "prompt_id": pc.fill_null(prompts, prompt_id),
            "sample": pa.array(np.zeros(num, np.int64)) if samples is None else samples,
        }
    )  # fmt: skip


def _sorted(table: pa.Table) -> _Texts:
    if not table.num_rows or table["region_id"].null_count or table["sample"].null_count:
        raise ValueError("the table holds no caption, or rows without a region_id or sample")
    table = table.sort_by([("region_id", "ascending"), ("prompt_id", "ascending"), ("sample", "ascending")])
    regions = np.asarray(table["region_id"].to_numpy(), np.int64)
    found = _Texts(regions, table["text"].to_pylist(), table["prompt_id"].to_pylist(),
                   np.asarray(table["sample"].to_numpy(), np.int64))  # fmt: skip
    if found.samples.min() < 0 or found.samples.max() > 1000:
        raise ValueError("`sample` counts a region's captions from 0")
    keys = list(zip(regions.tolist(), found.prompts, found.samples.tolist(), strict=True))
    if twice := [k for k, after in itertools.pairwise(keys) if k == after]:
        raise ValueError(
            f"{len(twice)} captions occur twice, such as that of region {twice[0][0]}; number them in a column `sample`"
        )
    return found


def _captions(shard: InputShard, texts: _Texts, prompts: list[str], num_samples: int, model: str) -> pa.Table:
    """The published rows of a shard."""
    rows = []
    for image in read_shard(shard.uri, columns=_KEPT, batch_rows=256):
        captions = []
        for region in image.regions:
            given = {(p, s): text for p, s, text in texts.of(region.region_id)}
            for prompt in prompts:
                captions += [_caption(region, prompt, s, given.get((prompt, s))) for s in range(num_samples)]
        rows.append(to_row(_row(image, captions, model)))
    return flatten(pa.Table.from_pylist(rows, schema=arrow_schema(CaptionedImage)))


def _caption(region: Any, prompt: str, sample: int, text: str | None) -> RegionCaption:
    if text is None:
        error = RowError(Reason.NOT_FOUND, "the imported table holds no caption of this region")
        return failed_caption(region, prompt, sample, error)
    return RegionCaption(
        region_id=region.region_id, prompt_id=prompt, sample=sample, text=text, num_tokens=0, finish_reason="stop"
    )


def _row(image: Image, captions: list[RegionCaption], model: str) -> CaptionedImage:
    kept = {name: getattr(image, name) for name in _KEPT}
    return CaptionedImage(**kept, captions=captions, status=Status.OK, model=model, engine=IMPORTED, kernels=IMPORTED)


def _description(cfg: Config, shards: list[InputShard], prompts: list[str], num_samples: int) -> dict[str, Any]:
    """run.json in the form of a caption run; what is not known of the other system is said to be so."""
    return {
        "meddam": __version__, "begun_at": _now(), "model": cfg.model, "config": cfg.model_dump(mode="json"),
        "fingerprint": {
            "inputs": inputs_digest(shards), "prompts": dict.fromkeys(prompts, IMPORTED), "num_samples": num_samples,
            "sampling": {"max_new_tokens": 0, "temperature": 0.0, "top_p": 1.0, "top_k": 0, "seed": 0},
            "weights": IMPORTED, "views": {"size": 384, "aspect": None, "margin": None, "window": None},
            "stages": STAGES, "engine": {"engine": IMPORTED, "kernels": IMPORTED, "dtype": "unknown"},
        },
        "prompt_texts": dict.fromkeys(prompts, "not known: the captions were imported"), "versions": {},
        "licence": "captions inherit the licences of the other system and of the images", "not_for_diagnosis": True,
    }  # fmt: skip


def _finish(directory: RunDirectory, shards: list[InputShard], files: list[Any], unknown: NDArray[np.int64]) -> Summary:
    found = audit(directory, [directory.at("captions", "gen=1", f["name"]) for f in files])
    summary = Summary(
        state="complete" if found.clean else "incomplete", generation=1, attempt=1,
        num_images=sum(s.num_images for s in shards), num_regions=found.num_regions, num_captions=found.num_published,
        by_status=found.by_status, by_reason=found.by_reason, engine=IMPORTED, kernels=IMPORTED, finished_at=_now(),
        audit=found.to_json(), session={}, num_unknown=len(unknown),
        unknown_regions=tuple(str(r) for r in np.unique(unknown)[:NUM_EXAMPLES]),
    )  # fmt: skip
    kept = summary.model_dump(mode="json", exclude={"num_unknown", "unknown_regions"})
    directory.write_json(kept | {"session": {"num_unknown": summary.num_unknown}}, SUMMARY)
    return summary


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S+00:00", time.gmtime())


if __name__ == "__main__":  # the same options as `meddam captions`
    run_as("captions")
