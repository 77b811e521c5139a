"""The report of a finished run, or the page of a dataset: one HTML file that can be mailed.

    meddam report s3://bucket/runs/one                       writes s3://bucket/runs/one/report.html
    meddam report runs/one --out one.html --num-regions 60
    meddam report s3://bucket/vindr                          a folder of image shards: ray_jobs.dataset_report

Reads the published captions a file at a time, and the pictures of the sampled regions from their shards; needs no Ray
session.

Invariants:
- the sample depends on the seed and the captions, not on how they lie in files;
- memory does not grow with the run: counters, and a bounded number of sampled rows a dataset, modality and status.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from meddam_core import storage
from meddam_core.captioner import RegionPreparer, ViewRules
from meddam_core.focal import focal_box
from meddam_core.imaging.render import render
from meddam_core.records import Caption, Image, Region, RowError
from meddam_core.regions.masks import prompt_box, region_prompt_mask
from meddam_core.reports.run_report import GalleryEntry, RunFacts, Speed, run_report
from meddam_core.reports.sample import CaptionSample
from meddam_core.reports.tally import CaptionTally
from meddam_core.shards import images_by_id
from ray_jobs.dataset_report import write_dataset_report
from ray_jobs.module_command import run_as
from ray_jobs.run_directory import RUN, SUMMARY, InputShard, RunDirectory
from ray_jobs.snapshot import has_shards

logger = logging.getLogger(__name__)

FAILED_IN_GALLERY = 4


class Config(BaseModel):
    """What `meddam report` does."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    run: str
    """The run directory, or a folder of image shards as `meddam ingest` writes it, on S3 or disk."""
    out: str | None = None
    """The HTML file, on S3 or disk; by default report.html in that folder."""
    num_regions: int = Field(48, ge=0, le=500)
    """Regions shown: of a run evenly over datasets and modalities, of shards over labels. Each adds about 60 kB."""
    num_failures: int = Field(40, ge=0, le=1000)
    """Failed captions listed."""
    seed: int = 0
    """Chooses the regions shown."""


class Summary(BaseModel):
    """What a report shows."""

    out: str
    num_captions: int
    num_regions: int | None = None
    """Regions in the shards; None for a run."""
    num_shown: int
    num_without_picture: int
    """Sampled regions left out because their shard is gone or their picture cannot be rendered."""

    @property
    def exit_code(self) -> int:
        """A report that was written is a success."""
        return 0

    def lines(self) -> list[str]:
        """For a person."""
        what = f"{self.num_captions:,} captions" if self.num_regions is None else f"{self.num_regions:,} regions"
        text = [f"report: {self.out} ({what}, {self.num_shown} shown)"]
        if self.num_without_picture:
            text.append(f"  {self.num_without_picture} sampled regions are not shown: no picture can be had of them")
        return text


def run(cfg: Config) -> Summary:
    """Writes the report of a run, or the page of a dataset, as one HTML file.

    Raises ValueError where the run is not published, or where there is neither.
    """
    directory = RunDirectory(cfg.run)
    if directory.read_json(RUN) is None and has_shards(cfg.run):
        page = write_dataset_report(cfg.run, cfg.out, cfg.num_regions, cfg.seed)
        return Summary(num_captions=0, **page._asdict())
    files = directory.published()
    if files is None:
        directory.inputs()  # says so where this is no run directory at all
        raise ValueError(f"{directory.uri} is not complete: run the same `meddam caption` again, then report")
    tally, sample = CaptionTally(), CaptionSample(cfg.num_regions, cfg.num_failures, cfg.seed)
    for file in files:
        captions = _read(file)
        tally.add(captions)
        sample.add(captions)
    described = directory.read_json(RUN) or {}
    rules = ViewRules(**described["fingerprint"]["views"])
    chosen = sample.shown() + sample.failures()[:FAILED_IN_GALLERY]
    gallery = pictured(chosen, directory.inputs(), RegionPreparer(rules))
    html = run_report(_facts(directory, described, tally), tally, gallery, sample.failures())
    out = cfg.out or directory.at("report.html")
    storage.write_bytes(out, html.encode())
    return Summary(
        out=out, num_captions=tally.num_captions, num_shown=len(gallery), num_without_picture=len(chosen) - len(gallery)
    )


def pictured(captions: Sequence[Caption], shards: Sequence[InputShard], preparer: RegionPreparer) -> list[GalleryEntry]:
    """The captions with what the model saw, in their order; those whose picture cannot be had are left out."""
    by_shard: dict[str, set[int]] = {}
    for caption in captions:
        for shard in shards:
            if shard.first_id <= caption.image_id <= shard.last_id:
                by_shard.setdefault(shard.uri, set()).add(caption.image_id)
    images = {image.image_id: image for uri, ids in by_shard.items() for image in _images(uri, ids)}
    rendered: dict[int, NDArray[np.uint8]] = {}
    entries = []
    for caption in captions:
        image = images.get(caption.image_id)
        if image is None:
            continue
        try:
            if image.image_id not in rendered:
                rendered = {image.image_id: render(image, window=preparer.recipe(image).window)}
            entries.append(_entry(caption, image, rendered[image.image_id], preparer))
        except RowError as error:
            logger.info("region %d has no picture: %s", caption.region_id, error)
    return entries


def _entry(caption: Caption, image: Image, image_HWC: NDArray[np.uint8], preparer: RegionPreparer) -> GalleryEntry:
    recipe = preparer.recipe(image)
    size = (image.width, image.height)
    region = Region(region_id=caption.region_id, box=caption.box, mask=caption.mask)
    mask_HW = region_prompt_mask(region, size, recipe.margin, recipe.prompt)
    x0, y0, x1, y1 = focal_box(mask_HW)
    by_mask = recipe.prompt == "mask" and region.mask is not None
    return GalleryEntry(
        caption=caption,
        full_HWC=image_HWC,
        crop_HWC=np.ascontiguousarray(image_HWC[y0:y1, x0:x1]),
        mask_HW=mask_HW if by_mask else None,
        prompt_box=None if by_mask else prompt_box(region, size, recipe.margin, recipe.prompt),
    )


def _images(uri: str, ids: set[int]) -> list[Image]:
    """The images of a shard by id; [] where the shard is gone."""
    if not storage.exists(uri):
        logger.warning("%s is gone; its regions are not shown", uri)
        return []
    return list(images_by_id(uri, ids))


def _read(uri: str) -> pa.Table:
    fs, path = storage.open_uri(uri)
    return pq.read_table(path, filesystem=fs, partitioning=None)


def _facts(directory: RunDirectory, described: dict[str, Any], tally: CaptionTally) -> RunFacts:
    summary = directory.read_json(SUMMARY) or {}
    fingerprint, session, audit = described["fingerprint"], summary["session"], summary["audit"] or {}
    sampling, views, engine = fingerprint["sampling"], fingerprint["views"], fingerprint["engine"]
    return RunFacts(
        title=directory.uri.rpartition("/")[2],
        run=directory.uri,
        state=summary["state"],
        generation=summary["generation"],
        model=described["model"],
        engine=engine["engine"],
        kernels=engine["kernels"],
        prompts=described["prompt_texts"],
        recipes=tuple(sorted(tally.recipes)),
        fingerprint=fingerprint["inputs"][:12] + " inputs, " + fingerprint["weights"][:12] + " weights",
        begun_at=described.get("begun_at"),
        finished_at=summary.get("finished_at"),
        wall_s=session.get("seconds"),
        speed=_speed(session),
        why=summary.get("why"),
        num_images_without_regions=audit.get("num_images_without_regions", 0),
        num_expected=audit.get("num_expected"),
        num_missing=audit.get("num_missing"),
        num_duplicated=audit.get("num_duplicated"),
        settings={
            "Precision": engine["dtype"],
            "Decoding": _decoding(sampling, fingerprint["num_samples"]),
            "Views": ", ".join(f"{k} {v}" for k, v in views.items() if v is not None) + "; else by recipe",
            "Attempt": str(summary["attempt"]),
        },
        versions={"meddam": described["meddam"], **{k: v for k, v in described["versions"].items() if v}},
        licences=_licences(described, tally),
    )


def _speed(session: dict[str, Any]) -> Speed | None:
    if "regions_per_s" not in session:
        return None
    return Speed(
        regions_per_s=session["regions_per_s"], tokens_per_s=session["tokens_per_s"], busy_share=session["busy_share"]
    )


def _decoding(sampling: dict[str, Any], num_samples: int) -> str:
    limit = f"at most {sampling['max_new_tokens']} tokens"
    if not sampling["temperature"]:
        return f"greedy, {limit}"
    cut = f", top-p {sampling['top_p']}" + (f", top-k {sampling['top_k']}" if sampling["top_k"] else "")
    return f"temperature {sampling['temperature']}{cut}, {num_samples} a prompt, seed {sampling['seed']}, {limit}"


def _licences(described: dict[str, Any], tally: CaptionTally) -> list[str]:
    images = ", ".join(f"{name} ({count:,} captions)" for name, count in tally.licences.most_common())
    return [f"Licences of the images: {images or 'none'}.", f"{described['licence'].capitalize()}."]


if __name__ == "__main__":  # the same options as `meddam report`
    run_as("report")
