"""LLaVA's conversation JSON: llava.json with images/*.png. The region is given as a box in the question's text."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from meddam_core.curation.exporters.item import Card, Item, facts, query_of


def write_llava(items: Iterable[Item], out: Path, card: Card) -> int:
    """One conversation a caption. Returns their number."""
    (out / "images").mkdir(parents=True, exist_ok=True)
    entries = []
    for item in items:
        image = f"images/{item.name}.png"
        if item.picture_HWC is not None:
            (out / image).write_bytes(item.png())
        for caption in item.captions:
            box = ", ".join(
                f"{v / s:.3f}" for v, s in zip(caption.box, (caption.width, caption.height) * 2, strict=True)
            )
            question = (
                f"{query_of(caption)}\nThe region's box is [{box}] (x0, y0, x1, y1 as shares of width and height)."
            )
            entries.append({
                "id": f"{caption.region_id}-{caption.prompt_id}-{caption.sample}", "image": image,
                "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": caption.text}],
                "metadata": facts(caption),
            })  # fmt: skip
    (out / "llava.json").write_text(json.dumps(entries, indent=1), encoding="utf-8")
    write_card(out, card, len(entries))
    return len(entries)


def write_card(out: Path, card: Card, num: int) -> None:
    """CARD.json beside a format that has no place for licences and lineage."""
    document = {"name": card.name, "num_captions": num, "licences": card.licences, "conditions": card.conditions,
                "lineage": card.lineage,
                "notice": "Pseudo-labels by a model. Not for diagnosis or treatment."}  # fmt: skip
    (out / "CARD.json").write_text(json.dumps(document, indent=1, default=str), encoding="utf-8")
