"""Image rows in, captions out: the one path of batch and online use, so that the same bytes give the same caption.

Two halves, because they run in different places:

    preparer = RegionPreparer(ViewRules(size=384))        # CPU: decode, window, margin, focal crop; needs no torch
    prepared = preparer.prepare(image)
    captioner = Captioner(loop, prompts, sampling)        # where the engine is
    captions = captioner.describe([prepared])

Invariants:
- a caption depends on the image row, its region, the prompt, the sampling and the weights, on nothing else;
- a region that cannot be prepared or described is a failed caption with a reason; the others are not touched.

Arrays: R regions, 8 channels, S the model's input side.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from meddam_core.clips import clip_views
from meddam_core.datasets.recipes import Recipe, get_recipe
from meddam_core.engines.base import Request, Result, Sampling
from meddam_core.engines.loop import EngineLoop
from meddam_core.focal import Aspect, FocalImage
from meddam_core.imaging.render import render_shared
from meddam_core.prompts import Prompt
from meddam_core.records import (
    Egress,
    FinishReason,
    Image,
    Label,
    Reason,
    Region,
    RegionCaption,
    RowError,
    Status,
    region_id,
)
from meddam_core.regions.geometry import with_margin
from meddam_core.regions.lesions import detect_lesions
from meddam_core.regions.masks import region_prompt_mask


@dataclass(frozen=True, slots=True, kw_only=True)
class ViewRules:
    """How regions become model input. None leaves the choice to the row's recipe."""

    size: int
    """Side of the model's input, pixels."""
    aspect: Aspect | None = None
    margin: float | None = None
    """Share of the box's width and height added on each side."""
    window: str | None = None
    """Name of a window preset, for all images."""
    egress: tuple[Egress, ...] | None = None
    """Policies under which pictures may go to the engine; None for one inside the cluster, which may see all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedRegion:
    """A region ready for the engine, or why it isn't."""

    region: Region
    views_N8SS: NDArray[np.uint8] | None
    """(N, 8, S, S), N = 1 for a picture, one entry a frame for a clip; None where `error` is set."""
    error: RowError | None = None


class RegionPreparer:
    """The CPU half: pixels of a row to the model's input. Holds no weights."""

    def __init__(self, rules: ViewRules) -> None:
        self.rules = rules

    def recipe(self, image: Image) -> Recipe:
        """The row's recipe with the rules that override it."""
        chosen = {k: v for k in ("aspect", "margin", "window") if (v := getattr(self.rules, k)) is not None}
        return replace(get_recipe(image.recipe), **chosen)

    def _check_egress(self, image: Image) -> None:
        if self.rules.egress is not None and image.egress not in self.rules.egress:
            raise RowError(Reason.ACCESS_DENIED, f"the egress policy {image.egress} keeps it from this endpoint")

    def prepare(self, image: Image) -> list[PreparedRegion]:
        """One entry a region, in their order; of an image without any, those that its recipe's detector finds.

        Raises RowError when the image as a whole cannot be rendered, or may not go to the engine.
        """
        self._check_egress(image)
        return self.prepare_rendered(image, render_shared(image, window=self.recipe(image).window))

    def prepare_rendered(
        self, image: Image, image_HWC: NDArray[np.uint8], masks: Mapping[int, NDArray[np.uint8]] | None = None
    ) -> list[PreparedRegion]:
        """As `prepare`, for a row whose picture was rendered by its recipe's window: it needs no pixels of its own.

        masks: (H, W) masks by region id, of regions whose run lengths need not be read again.
        """
        self._check_egress(image)
        recipe = self.recipe(image)
        focal, size = FocalImage(image_HWC, self.rules.size, recipe.aspect), (image.width, image.height)
        prepared = []
        for region in image.regions or detected_regions(image, image_HWC, recipe):
            try:
                if recipe.clip:
                    views_N8SS = clip_views(image, region, recipe, self.rules.size)
                elif recipe.prompt == "mask" and region.mask is not None:
                    mask_HW = (masks or {}).get(region.region_id)
                    if mask_HW is None:
                        mask_HW = region_prompt_mask(region, size, recipe.margin, recipe.prompt)
                    views_N8SS = focal.views(mask_HW)[None]
                else:
                    views_N8SS = focal.box_views(with_margin(region.box, recipe.margin, size), size)[None]
            except RowError as error:
                prepared.append(PreparedRegion(region=region, views_N8SS=None, error=error))
            else:
                prepared.append(PreparedRegion(region=region, views_N8SS=views_N8SS))
        return prepared


def detected_regions(image: Image, image_HWC: NDArray[np.uint8], recipe: Recipe) -> list[Region]:
    """What the recipe's detector finds in a rendered image; [] where it has none.

    Each region takes over the image's labels, which may hold outside it: the label `roi` says how it was found, lesion,
    central (nothing stood out) or whole (an extensive eruption).
    """
    if recipe.detector is None:
        return []
    return [
        Region(
            region_id=region_id(image.image_id, ordinal),
            box=found.box,
            source="detected",
            confidence=found.confidence,
            labels=[*image.labels, Label(name="roi", value=found.kind)],
        )
        for ordinal, found in enumerate(detect_lesions(np.ascontiguousarray(image_HWC), recipe.max_regions))
    ]


class Captioner:
    """The engine half. Several threads may call `describe`; their requests share the engine's batches.

    Args:
        loop: drives the engine.
        prompts: each region is described once for each of them.
        sampling: its `seed` is mixed with the caption's identity, so that no two captions share a random stream.
        num_samples: captions a region and prompt.
    """

    def __init__(self, loop: EngineLoop, prompts: Sequence[Prompt], sampling: Sampling, num_samples: int = 1) -> None:
        self.loop = loop
        self.prompts = list(prompts)
        self.sampling = sampling
        self.num_samples = num_samples

    def describe(self, regions: Sequence[PreparedRegion]) -> list[list[RegionCaption]]:
        """For each region its captions, prompts times samples of them, in that order."""
        keys = [(p, s) for p in self.prompts for s in range(self.num_samples)]
        requests = [
            Request(
                request_id=f"{entry.region.region_id}/{prompt.id}/{sample}/{id(entry):x}",
                views_N8SS=entry.views_N8SS,
                query=prompt.about(entry.region.labels),
                sampling=replace(self.sampling, seed=caption_seed(self.sampling.seed, entry.region, prompt, sample)),
            )
            for entry in regions
            for prompt, sample in keys
            if entry.views_N8SS is not None
        ]
        results = iter(self.loop.generate(requests))
        return [
            [
                failed_caption(entry.region, prompt.id, sample, entry.error)
                if entry.error is not None
                else _caption(entry.region, prompt.id, sample, next(results))
                for prompt, sample in keys
            ]
            for entry in regions
        ]


def caption_seed(seed: int, region: Region, prompt: Prompt, sample: int) -> int:
    """The random stream of one caption: the same in every run, batch and process."""
    identity = f"{seed}/{region.region_id}/{prompt.id}/{sample}".encode()
    return int.from_bytes(hashlib.blake2b(identity, digest_size=7).digest(), "big")


def failed_caption(region: Region, prompt_id: str, sample: int, error: RowError) -> RegionCaption:
    """The caption row of a region that could not be described."""
    return RegionCaption(
        region_id=region.region_id,
        prompt_id=prompt_id,
        sample=sample,
        status=Status.FAILED,
        reason=error.reason,
        detail=error.detail,
    )


_STATUS: dict[FinishReason, Status] = {"stop": Status.OK, "length": Status.TRUNCATED}


def _caption(region: Region, prompt_id: str, sample: int, result: Result) -> RegionCaption:
    if result.finish_reason not in _STATUS:
        error = RowError(result.reason or Reason.ENGINE_ERROR, result.detail or "the engine gave the request up")
        return failed_caption(region, prompt_id, sample, error)
    return RegionCaption(
        region_id=region.region_id,
        prompt_id=prompt_id,
        sample=sample,
        text=result.text,
        num_tokens=len(result.token_ids),
        mean_logprob=result.mean_logprob,
        finish_reason=result.finish_reason,
        status=_STATUS[result.finish_reason],
    )


def load_captioner(
    model: str,
    *,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    engine: str = "auto",
    device: str = "cpu",
    dtype: str = "float32",
    slots: int | None = None,
    num_threads: int | None = None,
    num_samples: int = 1,
) -> Captioner:
    """A Captioner over the checkpoint folder `model`, its engine running in a thread of this process.

    `num_threads` is torch's on a CPU; None leaves it. Raises as `meddam_core.engines.make_engine` does.
    """
    from meddam_core.engines import make_engine

    if num_threads is not None:
        import torch

        torch.set_num_threads(num_threads)
    made, _ = make_engine(engine, model, device=device, dtype=dtype, slots=slots)
    return Captioner(EngineLoop(made), prompts, sampling, num_samples)
