"""Everything a source gives, as rows: what ingest makes of it, without Ray."""

from __future__ import annotations

import json

from meddam_core.datasets.base import Source, SourceItem
from meddam_core.datasets.rows import Rejected, RowRules, rows_of
from meddam_core.records import Image, from_row
from ray_jobs.ingest_parts import _plain

SECRET = b"a long random text"


def rows_from(source: Source, recipe: str = "auto") -> tuple[list[Image], list[Rejected]]:
    """(rows, rejects) of all items, each through JSON as ingest keeps it between driver and worker."""
    rules = RowRules(
        dataset=source.dataset, licence=source.licence, egress=source.egress, recipe=recipe, image_secret=SECRET,
        patient_secret=SECRET, pixels_cleared=True,
    )  # fmt: skip
    images: list[Image] = []
    rejected: list[Rejected] = []
    for ordinal, item in enumerate(source.items()):
        kept = from_row(SourceItem, {**json.loads(json.dumps(_plain(item))), "data": item.data})
        made, left = rows_of(source, kept, ordinal=ordinal, rules=rules, shard=0, first_row=len(images))
        images += made
        rejected += left
    assert source.fingerprint() == source.fingerprint()
    return images, rejected


def said(image: Image, region: int) -> dict[str, str]:
    """A region's labels by name."""
    return {label.name: label.value for label in image.regions[region].labels}
