"""Grounded reports of a finished run: for each image the descriptions of its regions, each phrase tied to its place.

    meddam grounded s3://lab/runs/one --out reports                 # reports/IMAGE_ID.json, and reports/report.html
    meddam grounded runs/one --out reports --image 117440512 --image 117440513

Assembled from regions: meddam_core.reports.grounded says what that means. Needs no Ray.
"""

from __future__ import annotations

import hashlib
import heapq
import json

import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, Field

from meddam_core import storage
from meddam_core.captioner import RegionPreparer, ViewRules
from meddam_core.judging.phrases import Phrase, phrases
from meddam_core.records import Caption, from_row
from meddam_core.reports.grounded import grounded_page, grounded_report
from qa_library.loader import load_library
from ray_jobs.module_command import run_as
from ray_jobs.report import pictured
from ray_jobs.run_directory import RUN, RunDirectory

PAGE = "report.html"


class Config(BaseModel):
    """Write grounded reports of a run's images: JSON for each, and a page with the regions drawn over the pictures."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    run: str
    """The finished run, on S3 or disk."""
    out: str
    """Folder for the reports, on S3 or disk."""
    images: tuple[int, ...] = ()
    """Image ids; by default a sample."""
    num_images: int = Field(12, ge=1, le=200)
    """Images of the sample."""
    prompt_id: str | None = None
    """Prompt whose captions are taken; by default the first of the run."""
    title: str | None = None
    """Stands at the top of the page; by default the run's name."""
    library: str | None = None
    """Folder of a lab's own question templates."""
    seed: int = 0
    """Chooses the sample."""


class Summary(BaseModel):
    """What was written."""

    out: str
    num_images: int
    num_regions: int
    num_phrases: int
    num_without_picture: int
    """Images left out because their shard is gone or cannot be rendered."""

    @property
    def exit_code(self) -> int:
        """What the process ends with: no report is a failure."""
        return 0 if self.num_images else 3

    def lines(self) -> list[str]:
        """For a person."""
        text = [
            f"{self.num_images} images, {self.num_regions} regions, {self.num_phrases} phrases: "
            f"{storage.join(self.out, PAGE)}"
        ]
        if self.num_without_picture:
            text.append(f"  {self.num_without_picture} images are left out: no picture can be had of them")
        return text


def run(cfg: Config) -> Summary:
    """Writes the reports. Raises ValueError where the run is not complete, or has no such image or prompt."""
    directory = RunDirectory(cfg.run)
    files = directory.published()
    if files is None:
        raise ValueError(f"{directory.uri} is not a complete run: run `meddam caption` again first")
    described = directory.read_json(RUN) or {}
    prompt = cfg.prompt_id or next(iter(described["prompt_texts"]))
    captions = _captions(files, prompt, cfg)
    rules = ViewRules(**described["fingerprint"]["views"])
    library, reports, left = load_library(cfg.library), [], 0

    def phrases_of(caption: Caption) -> list[Phrase]:
        template_set = library.find(caption.dataset, caption.modality)
        return phrases(caption.text or "", template_set) if template_set is not None else []

    for image in sorted(captions):
        entries = pictured(captions[image], directory.inputs(), RegionPreparer(rules))
        if len(entries) < len(captions[image]):
            left += 1
            continue
        report = grounded_report(captions[image], phrases_of)
        storage.write_bytes(storage.join(cfg.out, f"{image}.json"), json.dumps(report, indent=1).encode() + b"\n")
        reports.append((report, entries))
    if reports:
        page = grounded_page(cfg.title or directory.uri.rpartition("/")[2], reports)
        storage.write_bytes(storage.join(cfg.out, PAGE), page.encode())
    regions = [region for report, _ in reports for region in report["regions"]]
    return Summary(
        out=cfg.out, num_images=len(reports), num_regions=len(regions),
        num_phrases=sum(len(r["phrases"]) for r in regions), num_without_picture=left,
    )  # fmt: skip


def _captions(files: list[str], prompt: str, cfg: Config) -> dict[int, list[Caption]]:
    """The first sample's captions of the wanted images, by image."""
    wanted = set(cfg.images) or _sample(files, cfg)
    found: dict[int, list[Caption]] = {}
    for uri in files:
        fs, path = storage.open_uri(uri)
        table = pq.read_table(path, filesystem=fs, partitioning=None)
        mine = table.filter(pc.is_in(table["image_id"], pc.cast(sorted(wanted), table["image_id"].type)))
        for row in mine.to_pylist():
            caption = from_row(Caption, row)
            if caption.prompt_id == prompt and caption.sample == 0:
                found.setdefault(caption.image_id, []).append(caption)
    if missing := set(cfg.images) - found.keys():
        raise ValueError(f"{cfg.run} has no captions of the image {min(missing)} by the prompt {prompt}")
    if not found:
        raise ValueError(f"{cfg.run} has no captions by the prompt {prompt}")
    return found


def _sample(files: list[str], cfg: Config) -> set[int]:
    """Image ids with the smallest numbers, by the seed."""
    ids: set[int] = set()
    for uri in files:
        fs, path = storage.open_uri(uri)
        ids |= set(pc.unique(pq.read_table(path, filesystem=fs, columns=["image_id"])["image_id"]).to_pylist())
        ids = set(heapq.nsmallest(cfg.num_images, ids, key=lambda i: _number(i, cfg.seed)))
    return ids


def _number(image: int, seed: int) -> bytes:
    return hashlib.blake2b(f"{seed}:{image}".encode(), digest_size=8).digest()


if __name__ == "__main__":  # the same options as `meddam grounded`
    run_as("grounded")
