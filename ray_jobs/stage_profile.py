"""Where the time of one stage goes, on rows that are there: `meddam profile SHARDS`, with --model the captioner's too.

    meddam profile s3://bucket/set                                     reading and preparing, on one core
    meddam profile s3://bucket/set --model /weights/DAM-3B             describing too, as one captioner does it

Works in this process, without Ray, on the first images that have regions: what a CPU actor and a captioner would do,
step by step. From the two rates follows how many cores one captioner needs in front of it.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from meddam_core.captioner import PreparedRegion, RegionPreparer, ViewRules, load_captioner
from meddam_core.imaging.render import render_stored, stored_pixels
from meddam_core.prompts import load_prompt
from meddam_core.records import Image, RowError
from meddam_core.shards import read_shard
from ray_jobs.module_command import run_as
from ray_jobs.snapshot import snapshot
from ray_jobs.views import pack

STEPS = ("read", "decode", "render", "views", "pack")


class Config(BaseModel):
    """What `meddam profile` measures."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    shards: tuple[str, ...] = Field(min_length=1)
    """Folders of image shards, on S3 or disk."""
    model: str | None = None
    """DAM checkpoint folder: describe the prepared regions too."""
    prompt: str = "meddam-v1"
    """Prompt id or text file."""
    max_new_tokens: int = Field(128, ge=1)
    """Longest caption, tokens."""
    engine: str = "auto"
    """auto, torch, mii, or module:Class of your own."""
    device: str = "auto"
    """auto, cpu or cuda."""
    num_images: int = Field(32, ge=2)
    """Images that are measured, after one to warm up."""
    size: int = Field(384, ge=14)
    """Side of the model's input, pixels; with --model the model's own."""


class Profile(BaseModel):
    """Milliseconds an image, and what follows."""

    model_config = ConfigDict(frozen=True)

    num_images: int
    num_regions: int
    num_failed: int
    """Images that could not be prepared."""
    ms: dict[str, float]
    """Median milliseconds an image, by step."""
    images_per_s: float
    """Of one core: reading is left out, it waits for the store."""
    regions_per_s: float
    captioner_regions_per_s: float | None = None
    captioner_tokens_per_s: float | None = None
    cores_per_captioner: int | None = None
    """Cores that must prepare images to keep one captioner busy."""
    engine: str | None = None

    @property
    def exit_code(self) -> int:
        """A profile that could be made is a success."""
        return 0

    def lines(self) -> list[str]:
        """For a person."""
        total = sum(self.ms.values())
        text = [f"{self.num_images} images, {self.num_regions} regions" + self._failed()]
        text += [f"  {name:<8} {ms:9.2f} ms an image {ms / total:6.0%}" for name, ms in self.ms.items()]
        text.append(f"  one core prepares {self.images_per_s:.1f} images/s, {self.regions_per_s:.1f} regions/s")
        if self.captioner_regions_per_s is not None:
            text.append(
                f"  one captioner ({self.engine}) describes {self.captioner_regions_per_s:.1f} regions/s, "
                f"{self.captioner_tokens_per_s:.0f} tokens/s: {self.cores_per_captioner} core(s) in front keep it busy"
            )
        return text

    def _failed(self) -> str:
        return f", {self.num_failed} could not be prepared" if self.num_failed else ""


def run(cfg: Config) -> Profile:
    """Measures. Raises ValueError where no image of the shards has a region that can be prepared."""
    captioner: Any = None
    if cfg.model is not None:
        device = _device(cfg.device)
        captioner = load_captioner(
            cfg.model, engine=cfg.engine, device=device, dtype="bfloat16" if device == "cuda" else "float32",
            prompts=(load_prompt(cfg.prompt),), sampling=_sampling(cfg.max_new_tokens),
        )  # fmt: skip
    size = cfg.size if captioner is None else _view_size(cfg.model)
    times, prepared, num_failed = _prepared(cfg, RegionPreparer(ViewRules(size=size)))
    if not prepared:
        raise ValueError("no image with a region could be prepared: there is nothing to measure")
    ms = {name: 1000 * statistics.median(times[name]) for name in STEPS}
    num_regions = sum(len(some) for some in prepared)
    per_s = 1000 / max(1e-9, sum(ms.values()) - ms["read"])
    regions_per_s = per_s * num_regions / len(prepared)
    described = {} if captioner is None else _described(captioner, prepared, regions_per_s)
    return Profile(
        num_images=len(prepared), num_regions=num_regions, num_failed=num_failed, ms=ms, images_per_s=per_s,
        regions_per_s=regions_per_s, **described,
    )  # fmt: skip


def _prepared(cfg: Config, preparer: RegionPreparer) -> tuple[dict[str, list[float]], list[list[PreparedRegion]], int]:
    """Seconds of each step for each image, the prepared regions, and how many images failed."""
    times: dict[str, list[float]] = {name: [] for name in STEPS}
    prepared: list[list[PreparedRegion]] = []
    num_failed = 0
    images = _timed(image for shard in snapshot(cfg.shards) for image in read_shard(shard.uri))
    wanted = ((s, i) for s, i in images if i.regions or preparer.recipe(i).detector)
    for number, (read_s, image) in enumerate(itertools.islice(wanted, cfg.num_images + 1)):
        try:
            steps, regions = _steps(image, preparer)
        except RowError:
            num_failed += 1
            continue
        if number:  # the first one loads libraries and fills caches
            prepared.append(regions)
            for name, seconds in {"read": read_s, **steps}.items():
                times[name].append(seconds)
    return times, prepared, num_failed


def _steps(image: Image, preparer: RegionPreparer) -> tuple[dict[str, float], list[PreparedRegion]]:
    started = time.perf_counter()
    stored = stored_pixels(image)
    decoded = time.perf_counter()
    render_stored(stored, image, preparer.recipe(image).window)
    rendered = time.perf_counter()
    regions = preparer.prepare(image)  # decodes and renders again: taken off below
    views = time.perf_counter()
    pack([[region.views_N8SS for region in regions]])
    packed = time.perf_counter()
    before = rendered - started
    steps = {
        "decode": decoded - started, "render": rendered - decoded, "views": max(0.0, views - rendered - before),
        "pack": packed - views,
    }  # fmt: skip
    return steps, regions


def _described(captioner: Any, prepared: list[list[PreparedRegion]], regions_per_s: float) -> dict[str, Any]:
    captioner.describe(prepared[0])
    flat = [region for some in prepared[1:] or prepared for region in some]
    started = time.perf_counter()
    captions = [caption for own in captioner.describe(flat) for caption in own]
    seconds = time.perf_counter() - started
    engine = captioner.loop.engine
    captioner.loop.close()
    rate = len(captions) / seconds
    return {
        "captioner_regions_per_s": rate, "captioner_tokens_per_s": sum(c.num_tokens for c in captions) / seconds,
        "cores_per_captioner": max(1, math.ceil(rate / regions_per_s)), "engine": f"{engine.name}, {engine.kernels}",
    }  # fmt: skip


def _timed(images: Iterator[Image]) -> Iterator[tuple[float, Image]]:
    """Each image with the seconds that reading it took."""
    while True:
        started = time.perf_counter()
        image = next(images, None)
        if image is None:
            return
        yield time.perf_counter() - started, image


def _device(wanted: str) -> str:
    if wanted != "auto":
        return wanted
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _view_size(model: str | None) -> int:
    from meddam_core.dam.config import read_config

    assert model is not None
    return read_config(model).view.size


def _sampling(max_new_tokens: int) -> Any:
    from meddam_core.engines.base import Sampling

    return Sampling(max_new_tokens=max_new_tokens)


if __name__ == "__main__":  # the same options as `meddam profile`
    run_as("profile")
