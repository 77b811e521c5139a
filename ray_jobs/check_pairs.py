"""Does a model see what it would describe? Minimal pairs: true captions against ones with a single attribute flipped.

    meddam check pairs s3://lab/lidc --model /weights/DAM-3B --out pairs.json

Needs labelled shards and a DAM checkpoint, no judge and no Ray: nothing is generated, captions are only scored
(meddam_core.engines.likelihood), so a few hundred regions take minutes on one GPU.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import random
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from meddam_core import storage
from meddam_core.captioner import PreparedRegion, RegionPreparer, ViewRules
from meddam_core.dam.config import read_config
from meddam_core.judging.minimal_pairs import CHANCE, Pair, PairFigures, PairScore, minimal_pairs, pair_figures
from meddam_core.judging.statistics import Interval
from meddam_core.prompts import load_prompt
from meddam_core.records import Image, RowError
from meddam_core.shards import read_shard
from qa_library.loader import load_library
from qa_library.truth import truth_of
from ray_jobs.module_command import run_as
from ray_jobs.snapshot import snapshot

logger = logging.getLogger(__name__)
BLANK_GREY = 127
_PICTURE = [0, 1, 2, 4, 5, 6]
"""Channels of a view that hold pixels; the others are masks."""


class Config(BaseModel):
    """Score true captions against ones with one attribute flipped: which of the two does the model find likelier?"""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    shards: tuple[str, ...] = Field(min_length=1)
    """Folders of labelled image shards."""
    model: str
    """DAM checkpoint folder, in the official layout."""
    out: str
    """JSON file for the figures and every pair, on S3 or disk."""
    prompt: str = "meddam-v1"
    """A prompt id or a text file."""
    num_images: int = Field(200, ge=1)
    """Images to look at, chosen by --seed."""
    pairs_per_region: int = Field(4, ge=1)
    """Attributes flipped a region, at most."""
    blank: bool = True
    """Score each pair on a blank picture too, to tell seeing from a preference for common words."""
    margin: float | None = Field(None, ge=0, le=2)
    """Share of a box's width and height added on each side; by default the recipe's."""
    window: str | None = None
    """Window preset; by default the recipe's."""
    device: str = Field("auto", pattern="^(auto|cpu|cuda)$")
    """Where the model runs; auto takes a GPU if there is one."""
    dtype: str = Field("auto", pattern="^(auto|float32|bfloat16|float16)$")
    """auto is bfloat16 on a GPU and float32 on a CPU."""
    library: str | None = None
    """Folder of a lab's own question templates."""
    seed: int = 0
    """Chooses images and flips."""


class Summary(BaseModel):
    """The figures; shares, with 95 % intervals (value, low, high)."""

    out: str
    model: str
    num_images: int
    num_pairs: int
    preferred: tuple[float, float, float]
    seen: tuple[float, float, float] | None
    by_attribute: dict[str, tuple[float, float | None, int]]

    @property
    def exit_code(self) -> int:
        """Figures that were written are a success, whatever they are."""
        return 0

    def lines(self) -> list[str]:
        """For a person."""
        text = [f"{self.num_pairs:,} pairs in {self.num_images:,} images; chance is {100 * CHANCE:.0f}"]
        text.append(f"  the true caption is likelier:               {_shown(self.preferred)}")
        if self.seen is not None:
            text.append(f"  the picture moves the model to the truth:   {_shown(self.seen)}")
        for name, (preferred, seen, num) in self.by_attribute.items():
            second = "" if seen is None else f"{100 * seen:6.1f}"
            text.append(f"  {100 * preferred:6.1f} {second}  {name} ({num:,})")
        return [*text, f"written to {self.out}"]


def run(cfg: Config) -> Summary:
    """Scores the pairs. Raises ValueError where no region has a label that the question library knows."""
    scores: list[PairScore] = []
    num_images = 0
    scorer = _Scorer(cfg)
    for image in _chosen(cfg):
        num_images += 1
        scores += scorer.image(image)
    figures = pair_figures(scores, seed=cfg.seed)
    summary = _summary(cfg, figures, num_images)
    written = summary.model_dump(mode="json") | {"pairs": [dataclasses.asdict(s) for s in scores]}
    storage.write_bytes(cfg.out, json.dumps(written, indent=1).encode() + b"\n")
    return summary


def _chosen(cfg: Config) -> Iterator[Image]:
    """Images by the seed, in the order of the shards."""
    shards = snapshot(cfg.shards, finished=True)
    total = sum(s.num_images for s in shards)
    wanted = set(random.Random(cfg.seed).sample(range(total), min(total, cfg.num_images)))
    number = 0
    for shard in shards:
        if wanted.isdisjoint(range(number, number + shard.num_images)):
            number += shard.num_images
            continue
        for image in read_shard(shard.uri):
            if number in wanted:
                yield image
            number += 1


class _Scorer:
    """The model, and how regions are shown to it."""

    def __init__(self, cfg: Config) -> None:
        import torch

        from meddam_core.dam.checkpoint import load_dam

        self.cfg = cfg
        self.library = load_library(cfg.library)
        self.prompt = load_prompt(cfg.prompt)
        rules = ViewRules(size=read_config(cfg.model).view.size, margin=cfg.margin, window=cfg.window)
        self.preparer = RegionPreparer(rules)
        device = cfg.device if cfg.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        dtype = cfg.dtype if cfg.dtype != "auto" else "bfloat16" if device == "cuda" else "float32"
        self.dam = load_dam(cfg.model, device=device, dtype=getattr(torch, dtype))

    def image(self, image: Image) -> list[PairScore]:
        """The pairs of an image's regions; regions that cannot be shown, or of which nothing is known, have none."""
        template_set = self.library.find(image.dataset, image.modality)
        if template_set is None:
            return []
        try:
            prepared = self.preparer.prepare(image)
        except RowError as error:
            logger.info("an image is left out: %s", error)
            return []
        scores: list[PairScore] = []
        for entry in prepared:
            rng = random.Random(f"{self.cfg.seed}:{entry.region.region_id}")
            truth = truth_of(template_set, entry.region.labels)
            pairs = minimal_pairs(template_set, truth, rng, self.cfg.pairs_per_region)
            if pairs and entry.views_N8SS is not None:
                scores += self._region(image, entry, pairs)
        return scores

    def _region(self, image: Image, entry: PreparedRegion, pairs: list[Pair]) -> list[PairScore]:
        assert entry.views_N8SS is not None
        gains = self._gains(entry.views_N8SS, pairs)
        blank: list[float | None] = [None] * len(pairs)
        if self.cfg.blank:
            grey = entry.views_N8SS.copy()
            grey[:, _PICTURE] = BLANK_GREY
            blank = [*self._gains(grey, pairs)]
        cluster = image.patient_key or image.image_key
        return [
            PairScore(pair=p, dataset=image.dataset, cluster=cluster, gain=g, blank_gain=b)
            for p, g, b in zip(pairs, gains, blank, strict=True)
        ]

    def _gains(self, views_N8SS: NDArray[np.uint8], pairs: list[Pair]) -> list[float]:
        from meddam_core.engines.likelihood import caption_likelihoods

        texts = [text for p in pairs for text in (p.true, p.flipped)]
        scored = caption_likelihoods(self.dam, views_N8SS, self.prompt.text, texts)
        return [scored[2 * i].total - scored[2 * i + 1].total for i in range(len(pairs))]


def _summary(cfg: Config, figures: PairFigures, num_images: int) -> Summary:
    return Summary(
        out=cfg.out, model=cfg.model, num_images=num_images, num_pairs=figures.num_pairs,
        preferred=_plain(figures.preferred), seen=None if figures.seen is None else _plain(figures.seen),
        by_attribute=figures.by_attribute,
    )  # fmt: skip


def _plain(interval: Interval) -> tuple[float, float, float]:
    return interval.value, interval.low, interval.high


def _shown(interval: tuple[float, float, float]) -> str:
    value, low, high = (100 * v for v in interval)
    return f"{value:5.1f} % ({low:.1f} to {high:.1f})"


if __name__ == "__main__":  # the same options as `meddam check pairs`
    run_as("check", "pairs")
