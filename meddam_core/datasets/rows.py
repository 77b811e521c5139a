"""An item of a source -> rows of a shard, or reasons why not.

    images, rejected = rows_of(source, item, ordinal=17, rules=rules, shard=0, first_row=40)

Invariants:
- nothing is raised for what is wrong with one item or region: it becomes a `Rejected`, counted by its reason;
- a bad region doesn't take its image along, unless none of the image's regions is left;
- rows and rejects hold keyed hashes, never the item's key, path or identifiers;
- an image with more regions than a row can hold continues in further rows with the same pixels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa

from meddam_core.datasets.base import Problem, Source, SourceItem, SourceRegion, read_limited
from meddam_core.datasets.recipes import Recipe, resolve_recipe
from meddam_core.imaging.decoded import Decoded
from meddam_core.imaging.deidentify import image_fields, keyed_hash, may_show_identity
from meddam_core.imaging.limits import Limits
from meddam_core.records import (
    MAX_REGIONS_PER_ROW,
    Egress,
    Image,
    Reason,
    Region,
    Rle,
    RowError,
    image_id,
    region_id,
)
from meddam_core.regions.geometry import checked_box, tight_box
from meddam_core.regions.masks import mask_of_png, mask_of_segmentation, rle_of
from meddam_core.regions.sampling import kind_of, sample_regions


@dataclass(frozen=True, slots=True, kw_only=True)
class RowRules:
    """What turns items into rows, the same for a whole ingest."""

    dataset: str
    licence: str
    egress: Egress
    recipe: str = "auto"
    """A recipe's name, or auto: the item's own, or by modality."""
    seed: int = 0
    max_regions: int | None = None
    """Regions an image; None leaves it to the recipe."""
    pixels_cleared: bool = False
    """Whether somebody has checked that no pixel names or shows a patient."""
    image_secret: bytes = field(repr=False)
    """Key of the image keys' hash."""
    patient_secret: bytes | None = field(repr=False, default=None)
    """Key of the patient and study keys' hash; None leaves them out."""
    limits: Limits = field(default_factory=Limits)
    labels: bool = True
    """Whether rows carry labels; without them they decide nothing either, such as which regions are chosen."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejected:
    """An item, or a region of one, that did not become a row."""

    item: int
    """Ordinal of the item in its source, from 0."""
    region: int | None
    """Ordinal of the region within the item; None where the whole item is left out."""
    reason: Reason
    detail: str
    image_key: str


REJECTED_SCHEMA = pa.schema(
    [
        ("item", pa.int64()),
        ("region", pa.int32()),
        ("reason", pa.string()),
        ("detail", pa.string()),
        ("image_key", pa.string()),
    ]
)


def rows_of(
    source: Source, item: SourceItem, *, ordinal: int, rules: RowRules, shard: int, first_row: int
) -> tuple[list[Image], list[Rejected]]:
    """The rows of an item, numbered from `first_row` of shard number `shard`, and what was left out."""
    key = keyed_hash(rules.image_secret, f"image:{rules.dataset}:{item.key}")
    rejected = [_rejected(ordinal, key, problem) for problem in item.problems]
    if any(problem.region is None for problem in item.problems):
        return [], rejected
    try:
        decoded, given = source.load(item, rules.limits)
        if item.modality is not None or item.pixel_spacing_mm is not None:
            decoded = _overridden(decoded, item)
        recipe = _recipe(rules, item, decoded)
        if not rules.labels:
            item, given = replace(item, labels=[]), [replace(region, labels=[]) for region in given]
        regions, bad = _regions(given, (decoded.width, decoded.height), rules.limits)
        rejected += [_rejected(ordinal, key, problem) for problem in bad]
        if not regions and (given or item.problems):
            raise RowError(Reason.NO_REGIONS, f"none of its {len(given) + len(item.problems)} regions can be used")
        fields = image_fields(decoded, recipe.window)
    except RowError as error:
        return [], [*rejected, _rejected(ordinal, key, Problem(reason=error.reason, detail=error.detail))]
    chosen = _sampled(regions, recipe, rules, (decoded.width, decoded.height), item.key)
    facts = {**fields, **_facts(item, decoded, rules), "image_key": key, "recipe": recipe.name}
    return _numbered(facts, chosen, shard, first_row), rejected


def _recipe(rules: RowRules, item: SourceItem, decoded: Decoded) -> Recipe:
    name = item.recipe if rules.recipe == "auto" and item.recipe is not None else rules.recipe
    recipe = resolve_recipe(name, decoded.modality)
    if recipe.window is not None and decoded.modality != "CT":
        raise RowError(
            Reason.UNSUPPORTED_PIXELS, f"the recipe {recipe.name} shows CT values; the picture is {decoded.modality}"
        )
    return recipe


def _overridden(decoded: Decoded, item: SourceItem) -> Decoded:
    spacing = decoded.pixel_spacing_mm
    if spacing is None and item.pixel_spacing_mm is not None:
        spacing = (item.pixel_spacing_mm[0], item.pixel_spacing_mm[1])
    return replace(decoded, modality=item.modality or decoded.modality, pixel_spacing_mm=spacing)


def _facts(item: SourceItem, decoded: Decoded, rules: RowRules) -> dict[str, Any]:
    """What a row says about where it comes from."""
    patient = item.patient_id or decoded.identity.patient_id
    study = item.study_id or decoded.identity.study_uid
    secret = rules.patient_secret
    risky = may_show_identity(decoded.modality, decoded.burned_in_annotation) and not rules.pixels_cleared
    return {
        "patient_key": item.patient_key or (keyed_hash(secret, f"patient:{patient}") if secret and patient else None),
        "study_key": item.study_key or (keyed_hash(secret, f"study:{study}") if secret and study else None),
        "labels": list(item.labels),
        "dataset": rules.dataset,
        "split": item.split or "all",
        "licence": item.licence or rules.licence,
        "egress": "deny" if risky else item.egress or rules.egress,
    }


def _regions(
    given: Sequence[SourceRegion], size: tuple[int, int], limits: Limits
) -> tuple[list[Region], list[Problem]]:
    """Checked regions without ids, and what is wrong with the others."""
    regions: list[Region] = []
    problems: list[Problem] = []
    for region in given:
        try:
            regions.append(_region(region, size, limits))
        except RowError as error:
            problems.append(Problem(reason=error.reason, detail=error.detail, region=region.ordinal))
    return regions, problems


def _region(given: SourceRegion, size: tuple[int, int], limits: Limits) -> Region:
    mask_HW = None
    if given.mask_uri is not None:
        mask_HW = mask_of_png(read_limited(given.mask_uri, limits), size)
    elif given.segmentation is not None:
        mask_HW = mask_of_segmentation(given.segmentation, size)
    if given.box is not None:
        box = checked_box(given.box, size)
    elif mask_HW is not None:
        box = tight_box(mask_HW)
    else:
        raise RowError(Reason.BAD_ANNOTATION, "the region has neither box nor mask")
    return Region(
        region_id=0,
        box=box,
        mask=None if mask_HW is None else rle_of(mask_HW),
        source=given.source,
        confidence=given.confidence,
        labels=list(given.labels),
        frame_masks=_frame_masks(given, size),
    )


def _frame_masks(given: SourceRegion, size: tuple[int, int]) -> list[Rle] | None:
    """The region on each context frame; empty where a frame does not show it."""
    if given.frame_segmentations is None:
        return None
    masks = []
    for segmentation in given.frame_segmentations:
        try:
            masks.append(rle_of(mask_of_segmentation(segmentation, size)))
        except RowError as error:
            if error.reason != Reason.MASK_EMPTY:
                raise
            masks.append(rle_of(np.zeros((size[1], size[0]), np.uint8)))
    return masks


def _sampled(regions: list[Region], recipe: Recipe, rules: RowRules, size: tuple[int, int], key: str) -> list[Region]:
    most = rules.max_regions if rules.max_regions is not None else recipe.max_regions
    # of the key itself, not of its keyed hash: the choice must not depend on anybody's secret
    name = hashlib.sha256(f"{rules.dataset}:{key}".encode()).hexdigest()
    kinds = [kind_of(region.labels) for region in regions]
    return [regions[i] for i in sample_regions([r.box for r in regions], kinds, size, most, rules.seed, name)]


def _numbered(facts: dict[str, Any], regions: list[Region], shard: int, first_row: int) -> list[Image]:
    """One row, or several where there are more regions than a row holds."""
    parts = [regions[i : i + MAX_REGIONS_PER_ROW] for i in range(0, len(regions), MAX_REGIONS_PER_ROW)] or [[]]
    images = []
    for row, part in enumerate(parts, start=first_row):
        number = image_id(shard, row)
        numbered = [replace(region, region_id=region_id(number, i)) for i, region in enumerate(part)]
        images.append(Image(image_id=number, regions=numbered, **facts))
    return images


def _rejected(ordinal: int, key: str, problem: Problem) -> Rejected:
    return Rejected(item=ordinal, region=problem.region, reason=problem.reason, detail=problem.detail, image_key=key)
