"""DLC-Bench's files: annotations.json (COCO), images/, class_names.json, and the captions as predictions.json.

With a question file these are what its evaluation reads (facts of NVlabs/describe-anything: keys are annotation ids as
text, predictions hold one key `query` beside the captions). One caption a region: DLC-Bench knows no samples.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from meddam_core.curation.exporters.coco import coco_document
from meddam_core.curation.exporters.item import Card, Item, query_of
from meddam_core.curation.exporters.llava import write_card


def write_dlc_bench(items: Iterable[Item], out: Path, card: Card) -> int:
    """One prediction a region: its first caption. Returns their number."""
    queries: list[str] = []

    def firsts() -> Iterator[Item]:
        for item in items:
            seen: set[int] = set()
            chosen = [c for c in item.captions if not (c.region_id in seen or seen.add(c.region_id))]  # type: ignore[func-returns-value]
            if not queries:
                queries.append(query_of(chosen[0]))
            yield replace(item, captions=chosen)

    document, findings = coco_document(firsts(), out, card)
    predictions = {str(a["id"]): a.pop("caption") for a in document["annotations"]}
    for name, value in (("annotations", document), ("class_names", findings),
                        ("predictions", {**predictions, "query": queries[0] if queries else ""})):  # fmt: skip
        (out / f"{name}.json").write_text(json.dumps(value, indent=1), encoding="utf-8")
    write_card(out, card, len(predictions))
    return len(predictions)
