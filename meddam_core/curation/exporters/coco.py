"""COCO captions of regions: captions.json with images, one annotation a caption (bbox, segmentation), and licences."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from meddam_core.curation.exporters.item import Card, Item, facts, mask_field
from meddam_core.curation.exporters.llava import write_card


def write_coco(items: Iterable[Item], out: Path, card: Card) -> int:
    """One annotation a caption. Returns their number."""
    document, _ = coco_document(items, out, card)
    (out / "captions.json").write_text(json.dumps(document, indent=1), encoding="utf-8")
    write_card(out, card, len(document["annotations"]))
    return len(document["annotations"])


def coco_document(items: Iterable[Item], out: Path, card: Card) -> tuple[dict[str, Any], dict[str, str]]:
    """The COCO document with captions, its pictures written to out/images; and the finding of each annotation by id."""
    (out / "images").mkdir(parents=True, exist_ok=True)
    names = sorted({n for found in card.licences.values() for n in found})
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    findings: dict[str, str] = {}
    for number, item in enumerate(items, start=1):
        first = item.captions[0]
        file = f"{item.name}.png"
        if item.picture_HWC is not None:
            (out / "images" / file).write_bytes(item.png())
        images.append({"id": number, "file_name": file, "width": first.width, "height": first.height,
                       "license": names.index(first.licence) + 1 if first.licence in names else 0})  # fmt: skip
        for caption in item.captions:
            x0, y0, x1, y1 = caption.box
            annotations.append({
                "id": len(annotations) + 1, "image_id": number, "caption": caption.text, "category_id": 1, "iscrowd": 0,
                "bbox": [x0, y0, x1 - x0, y1 - y0], "area": (x1 - x0) * (y1 - y0),
                "segmentation": mask_field(caption) or [],
                "meddam": facts(caption),
            })  # fmt: skip
            labels = {label.name: label.value for label in caption.labels}
            findings[str(len(annotations))] = labels.get("finding", labels.get("kind", "lesion"))
    document = {
        "info": {"description": card.name, "version": "1"},
        "licenses": [{"id": i, "name": n, "url": ""} for i, n in enumerate(names, start=1)],
        "images": images, "annotations": annotations, "categories": [{"id": 1, "name": "region"}],
    }  # fmt: skip
    return document, findings
