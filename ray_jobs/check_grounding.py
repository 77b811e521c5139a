"""A grounding suite for any model: does its description follow the mask, and does it need the picture?

    meddam check variants s3://lab/vindr --out s3://lab/variants              # moved/, blanked/, normal/: image shards
    meddam caption s3://lab/variants/moved --out s3://lab/runs/moved --model ...        # each, by any engine, as usual
    meddam check grounding s3://lab/runs/one --moved s3://lab/runs/moved --blanked ... --normal ... --out grounding.json

What the variants are and what is compared: meddam_core.judging.grounding. Needs no Ray and no judge.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, Field

from meddam_core import storage
from meddam_core.imaging.png import decode_png, encode_png, preview_jpeg
from meddam_core.judging.grounding import (
    VARIANTS,
    Described,
    Rate,
    Variant,
    grounding_figures,
    moved_regions,
    normal_regions,
)
from meddam_core.records import Caption, EncodedImage, Image, Status, from_row
from meddam_core.shards import read_shard, write_shard
from qa_library.loader import load_library
from qa_library.schema import TemplateSet
from ray_jobs.module_command import run_as
from ray_jobs.run_directory import RunDirectory
from ray_jobs.snapshot import snapshot


class VariantsConfig(BaseModel):
    """Make the three variants of labelled shards: masks moved, pictures blanked, masks on normal places."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    shards: tuple[str, ...] = Field(min_length=1)
    """Folders of labelled image shards."""
    out: str
    """Where the folders moved, blanked and normal go, on S3 or disk."""
    num_images: int = Field(500, ge=1)
    """Images to take, chosen by --seed."""
    seed: int = 0
    """Chooses images and places."""


class Variants(BaseModel):
    """What was made."""

    out: str
    num_regions: dict[str, int]
    """Regions by variant; an image with a single place has no moved ones."""

    @property
    def exit_code(self) -> int:
        """What the process ends with: variants without a region are of no use."""
        return 0 if any(self.num_regions.values()) else 3

    def lines(self) -> list[str]:
        """For a person."""
        return [f"{n:>8,} regions  {storage.join(self.out, variant)}" for variant, n in self.num_regions.items()]


class Config(BaseModel):
    """Compare a model's captions of the variants with its captions of the originals."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    run: str
    """The model's run on the original shards."""
    moved: str | None = None
    """Its run on the variant with moved masks."""
    blanked: str | None = None
    """Its run on the blanked variant."""
    normal: str | None = None
    """Its run on the variant with masks on normal places."""
    out: str | None = None
    """JSON file for the figures; by default RUN/checks/grounding.json."""
    prompt_id: str | None = None
    """Prompt whose captions are compared, where the runs have several."""
    library: str | None = None
    """Folder of a lab's own question templates."""


class Figure(BaseModel):
    """A share with its 95 % interval, and of how many it is a share."""

    value: float
    low: float
    high: float
    num: int


class Summary(BaseModel):
    """What the suite found; null where a variant was not captioned."""

    out: str
    follows: Figure | None
    same_when_moved: Figure | None
    claims_when_blank: Figure | None
    same_when_blank: Figure | None
    presumed: Figure | None

    @property
    def exit_code(self) -> int:
        """Figures that were written are a success, whatever they are."""
        return 0

    def lines(self) -> list[str]:
        """For a person."""
        told = (
            ("claims about the place the mask was moved to, of those that tell it from the old one", self.follows),
            ("captions that stayed the same to the letter when the mask moved", self.same_when_moved),
            ("blank pictures of which a finding is still claimed", self.claims_when_blank),
            ("captions that stayed the same to the letter when the picture was blanked", self.same_when_blank),
            ("normal places of which an abnormality is claimed", self.presumed),
        )
        text = [
            f"  {100 * f.value:5.1f} % ({100 * f.low:.1f} to {100 * f.high:.1f}, n = {f.num:,})  {what}"
            for what, f in told
            if f is not None
        ]
        return [*text, f"written to {self.out}"]


def make_variants(cfg: VariantsConfig) -> Variants:
    """Writes the shards of the variants. Raises ValueError for shards that are none."""
    storage.check_writable(cfg.out)
    shards = snapshot(cfg.shards, finished=True)
    total = sum(s.num_images for s in shards)
    wanted = set(random.Random(cfg.seed).sample(range(total), min(total, cfg.num_images)))
    counts = dict.fromkeys(VARIANTS, 0)
    first = 0
    for number, shard in enumerate(shards):
        mine = {i - first for i in wanted if first <= i < first + shard.num_images}
        first += shard.num_images
        images = [image for i, image in enumerate(read_shard(shard.uri)) if i in mine and image.regions] if mine else []
        for variant in VARIANTS:
            made = [v for image in images if (v := _variant(image, variant, cfg.seed)) is not None]
            counts[variant] += sum(len(v.regions) for v in made)
            if made:
                write_shard(storage.join(cfg.out, variant, "shards", f"shard-{number:06d}.parquet"), made)
    return Variants(out=cfg.out, num_regions={str(v): n for v, n in counts.items()})


def _variant(image: Image, variant: Variant, seed: int) -> Image | None:
    """An image of a variant; None where it has no region there."""
    rng = random.Random(f"{seed}:{variant}:{image.image_id}")
    if variant == "blanked":
        return _blanked(image)
    if variant == "moved":
        regions = moved_regions(image.regions, rng)
    else:
        regions = normal_regions(image.regions, (image.width, image.height), rng)
    return replace(image, regions=regions) if regions else None


def _blanked(image: Image) -> Image:
    """The same row with every pixel the median of its own, stored as before."""
    assert image.image.bytes is not None
    stored = decode_png(image.image.bytes)
    even = np.broadcast_to(np.median(stored, axis=(0, 1)).astype(stored.dtype), stored.shape)
    pixels = EncodedImage(bytes=encode_png(np.ascontiguousarray(even)))
    frames = None if image.frames is None else [pixels] * len(image.frames)
    grey = preview_jpeg(np.full((image.height, image.width, 3), 127, np.uint8))
    return replace(image, image=pixels, preview=EncodedImage(bytes=grey), frames=frames)


def run(cfg: Config) -> Summary:
    """Compares the runs. Raises ValueError where none of the variants is given, or a run is not complete."""
    given = {v: uri for v in VARIANTS if (uri := getattr(cfg, v)) is not None}
    if not given:
        raise ValueError("give at least one of --moved, --blanked and --normal: runs on what `check variants` made")
    library = load_library(cfg.library)
    original = {d.region_id: d for d in _described(cfg.run, cfg.prompt_id)}
    variants: dict[Variant, dict[int, Described]] = {
        v: {d.region_id: d for d in _described(uri, cfg.prompt_id)} for v, uri in given.items()
    }
    sets: dict[int, TemplateSet] = {}
    for described in [original, *variants.values()]:
        for region, entry in list(described.items()):
            found = library.find(entry.dataset, entry.modality)
            if found is None:
                del described[region]
            else:
                sets[region] = found
    figures = grounding_figures(original, variants, sets)
    out = cfg.out or RunDirectory(cfg.run).at("checks", "grounding.json")
    names = ("follows", "same_when_moved", "claims_when_blank", "same_when_blank", "presumed")
    summary = Summary(out=out, **{name: _figure(getattr(figures, name)) for name in names})
    storage.write_bytes(out, summary.model_dump_json(indent=1).encode() + b"\n")
    return summary


def _described(uri: str, prompt_id: str | None) -> Iterator[Described]:
    """The first caption of each region that has text."""
    run = RunDirectory(uri)
    files = run.published()
    if files is None:
        raise ValueError(f"{uri} is not a complete run: run `meddam caption` again first")
    for file in files:
        fs, path = storage.open_uri(file)
        for row in pq.read_table(path, filesystem=fs, partitioning=None).to_pylist():
            caption = from_row(Caption, row)
            if caption.sample or caption.status == Status.FAILED or caption.text is None:
                continue
            if prompt_id is None or caption.prompt_id == prompt_id:
                yield Described(
                    region_id=caption.region_id, dataset=caption.dataset, modality=caption.modality,
                    cluster=caption.patient_key or caption.image_key, text=caption.text, labels=caption.labels,
                )  # fmt: skip


def _figure(rate: Rate | None) -> Figure | None:
    if rate is None:
        return None
    return Figure(value=rate.share.value, low=rate.share.low, high=rate.share.high, num=rate.num)


if __name__ == "__main__":  # the same options as `meddam check`
    run_as("check")
