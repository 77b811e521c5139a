"""The page of a dataset of image shards: `meddam report SHARDS`, where SHARDS is what `meddam ingest` wrote.

    meddam report s3://bucket/vindr                 writes s3://bucket/vindr/report.html
    meddam report vindr --out vindr.html --num-regions 96

Reads every row once, without pictures and masks; then the pictures of the sampled regions, one at a time. Needs no Ray
session, and works on shards of an ingest that has not come to its end.

Invariants:
- memory holds one batch of rows, counters, and one decoded picture, whatever the dataset's size;
- of the ingest's settings only those are shown that name no file or folder of the source.
"""

from __future__ import annotations

import io
import json
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from meddam_core import storage
from meddam_core.datasets.recipes import get_recipe
from meddam_core.focal import focal_box
from meddam_core.imaging.render import render
from meddam_core.records import ROW_BITS, Image, Region, RowError
from meddam_core.regions.masks import prompt_box, region_prompt_mask
from meddam_core.reports.dataset_report import Card, DatasetFacts, Rejects, card, dataset_report
from meddam_core.reports.dataset_sample import Drawn, RegionSample
from meddam_core.reports.dataset_tally import TALLY_COLUMNS, DatasetTally
from meddam_core.shards import images_by_id, shard_batches
from ray_jobs.dataset_files import DATASET, PLAN
from ray_jobs.snapshot import shards_below

logger = logging.getLogger(__name__)

NUM_DETAILS = 3
"""Sentences shown for each reason."""
_SETTINGS = {
    "seed": "Seed", "max_regions": "Regions an image, at most", "splits": "Splits dealt", "classes": "Classes",
    "boxes": "Boxes", "min_votes": "Votes, at least", "min_readers": "Readers, at least", "slices": "Slices",
    "upsample": "Upsampled", "context_slices": "Context slices", "pixels_cleared": "Pixels cleared",
}  # fmt: skip


class Written(NamedTuple):
    """What a page shows."""

    out: str
    num_regions: int
    """Regions in the shards."""
    num_shown: int
    num_without_picture: int
    """Sampled regions left out because their picture cannot be rendered."""


def write_dataset_report(uri: str, out: str | None, num_regions: int, seed: int) -> Written:
    """Writes the page of the shards at `uri` to `out`, by default report.html beside them.

    Raises ValueError where there are no image shards, or where they are of another schema.
    """
    shards = shards_below(uri)
    root = uri.rstrip("/").removesuffix("/shards")
    tally, sample = DatasetTally(), RegionSample(num_regions, seed)
    held: dict[int, set[str]] = {}
    for shard in shards:
        for rows in shard_batches(shard.uri, TALLY_COLUMNS):
            tally.add(rows)
            sample.add(rows)
            for number in np.unique(rows["image_id"].to_numpy() >> ROW_BITS).tolist():
                held.setdefault(number, set()).add(shard.uri)
    chosen = sample.shown()
    cards = list(_cards(chosen, held))
    html = dataset_report(_facts(root, shards), tally, cards)
    out = out or (root + ".html" if root.endswith(".parquet") else storage.join(root, "report.html"))
    storage.write_bytes(out, html.encode())
    return Written(out, tally.num_regions, len(cards), len(chosen) - len(cards))


def _cards(chosen: Sequence[tuple[Drawn, str]], held: dict[int, set[str]]) -> Iterator[Card]:
    """The drawn regions with their pictures, in their order; those without a picture are left out."""
    wanted: dict[str, set[int]] = {}
    for drawn, _ in chosen:
        for uri in held[drawn.image_id >> ROW_BITS]:
            wanted.setdefault(uri, set()).add(drawn.image_id)
    made: dict[Drawn, Card] = {}
    by_image: dict[int, list[tuple[Drawn, str]]] = {}
    for drawn, label in chosen:
        by_image.setdefault(drawn.image_id, []).append((drawn, label))
    for uri, ids in wanted.items():
        for image in images_by_id(uri, ids):
            try:
                made.update(_of_image(image, by_image[image.image_id]))
            except RowError as error:
                logger.info("image %d has no picture: %s", image.image_id, error)
    return (made[drawn] for drawn, _ in chosen if drawn in made)


def _of_image(image: Image, drawn: list[tuple[Drawn, str]]) -> Iterator[tuple[Drawn, Card]]:
    recipe = get_recipe(image.recipe)
    image_HWC = render(image, window=recipe.window)
    size = (image.width, image.height)
    for one, label in drawn:
        if one.ordinal is None:
            yield one, card(image, None, label, image_HWC, None, None, None)
            continue
        region: Region = image.regions[one.ordinal]
        mask_HW = region_prompt_mask(region, size, recipe.margin, recipe.prompt)
        x0, y0, x1, y1 = focal_box(mask_HW)
        crop_HWC = np.ascontiguousarray(image_HWC[y0:y1, x0:x1])
        own_HW = region_prompt_mask(region, size, 0.0, "mask") if region.mask is not None else None
        box = None if recipe.prompt == "mask" else prompt_box(region, size, recipe.margin, recipe.prompt)
        yield one, card(image, region, label, image_HWC, crop_HWC, own_HW, box)


def _facts(root: str, shards: Sequence[storage.ObjectInfo]) -> DatasetFacts:
    """What `meddam ingest` wrote beside the shards, as far as it is there."""
    finished, plan = _json(root, DATASET), _json(root, PLAN)
    images, regions, details = _rejects(root)
    described = finished or plan or {}
    config = described.get("config", {})
    settings = {"Source": config.get("source", "").removesuffix("Config")} if config else {}
    if finished:
        settings |= {
            "Recipe": finished["recipe"], "Fingerprint": finished["fingerprint"][:12],
            "Patient keys": "keyed hashes" if finished["patient_keys"] else "left out: no secret was given",
        }  # fmt: skip
    settings |= {title: str(config[name]) for name, title in _SETTINGS.items() if config.get(name) is not None}
    return DatasetFacts(
        title=(finished or {}).get("dataset") or root.rpartition("/")[2], where=root,
        complete=finished is not None if described else None, num_shards=len(shards),
        num_bytes=sum(s.size for s in shards), num_items=finished["num_items"] if finished else None,
        rejects=Rejects(images=images, regions=regions, details=details), settings=settings,
    )  # fmt: skip


def _json(root: str, name: str) -> dict[str, Any] | None:
    uri = storage.join(root, name)
    if root.endswith(".parquet") or not storage.exists(uri):
        return None
    found: dict[str, Any] = json.loads(storage.read_bytes(uri))
    return found


def _rejects(root: str) -> tuple[Counter[str], Counter[str], dict[str, list[str]]]:
    """Rejects by reason, of whole items and of single regions, and a few sentences of each reason."""
    images: Counter[str] = Counter()
    regions: Counter[str] = Counter()
    details: dict[str, list[str]] = {}
    files = [] if root.endswith(".parquet") else storage.list_objects(storage.join(root, "rejected") + "/", ".parquet")
    for file in files:
        table: pa.Table = pq.read_table(
            io.BytesIO(storage.read_bytes(file.uri)), columns=["region", "reason", "detail"]
        )
        for row in table.group_by(["region", "reason", "detail"]).aggregate([([], "count_all")]).to_pylist():
            (images if row["region"] is None else regions)[row["reason"]] += row["count_all"]
            said = details.setdefault(row["reason"], [])
            if len(said) < NUM_DETAILS and row["detail"] not in said:
                said.append(row["detail"])
    return images, regions, details
