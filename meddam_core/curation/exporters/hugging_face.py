"""A Hugging Face dataset: data/train-*.parquet with a card (README.md) and Croissant metadata (croissant.json).

datasets.load_dataset("parquet", data_files="OUT/data/*.parquet")          # `image` is a picture
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from meddam_core.curation.exporters.item import Card, Item, facts

_TEXT = ("region_id", "image_id", "dataset", "split", "modality", "prompt_id", "model", "licence")
ROWS_PER_FILE = 2000


def write_hugging_face(items: Iterable[Item], out: Path, card: Card) -> int:
    """One row a caption. Returns their number."""
    (out / "data").mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    num = files = 0
    for item in items:
        picture = {"bytes": item.png(), "path": f"{item.name}.png"} if item.picture_HWC is not None else None
        for caption in item.captions:
            row = facts(caption)
            rows.append({**{n: row[n] for n in _TEXT}, "image": picture, "box": row["box"], "caption": caption.text,
                         "mask": row["mask"], "labels": [{"name": k, "value": v} for k, v in row["labels"].items()],
                         "mean_logprob": row["mean_logprob"]})  # fmt: skip
            num += 1
        if len(rows) >= ROWS_PER_FILE:
            files = _flush(rows, out, files)
    if rows or not files:
        files = _flush(rows, out, files)
    (out / "README.md").write_text(_card(card, num), encoding="utf-8")
    (out / "croissant.json").write_text(json.dumps(_croissant(card, num), indent=1), encoding="utf-8")
    return num


def _schema() -> pa.Schema:
    kinds = [
        *((name, pa.string()) for name in _TEXT),
        ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        ("box", pa.list_(pa.int32(), 4)), ("caption", pa.string()),
        ("mask", pa.struct([("size", pa.list_(pa.int32())), ("counts", pa.string())])),
        ("labels", pa.list_(pa.struct([("name", pa.string()), ("value", pa.string())]))),
        ("mean_logprob", pa.float32()),
    ]  # fmt: skip
    features = {
        **{name: _value("string") for name in _TEXT}, "image": {"_type": "Image"},
        "box": {"feature": _value("int32"), "length": 4, "_type": "List"}, "caption": _value("string"),
        "mask": {"size": {"feature": _value("int32"), "_type": "List"}, "counts": _value("string")},
        "labels": {"feature": {"name": _value("string"), "value": _value("string")}, "_type": "List"},
        "mean_logprob": _value("float32"),
    }  # fmt: skip
    return pa.schema(kinds, metadata={b"huggingface": json.dumps({"info": {"features": features}}).encode()})


def _value(dtype: str) -> dict[str, str]:
    return {"dtype": dtype, "_type": "Value"}


def _flush(rows: list[dict[str, Any]], out: Path, number: int) -> int:
    pq.write_table(pa.Table.from_pylist(rows, schema=_schema()), out / "data" / f"train-{number:05d}.parquet")
    rows.clear()
    return number + 1


def _card(card: Card, num: int) -> str:
    conditions = "\n".join(f"- {c}" for c in card.conditions) or "- None beyond the licences named above."
    return f"""---
license: other
license_name: {json.dumps(card.licence)}
task_categories: [image-to-text]
tags: [medical, region-captioning, pseudo-labels]
configs:
- config_name: default
  data_files: data/train-*.parquet
---
# {card.name}

{num:,} captions of regions in medical images, written by models and chosen by rules: pseudo-labels, not read by a
physician. Not for diagnosis or treatment.

## Licences

Images: {", ".join(card.licences.get("images", []))}.
Weights that wrote the captions: {", ".join(card.licences.get("weights", []))}.

{conditions}

## Lineage

```json
{json.dumps(card.lineage, indent=1, default=str)}
```
"""


def _croissant(card: Card, num: int) -> dict[str, Any]:
    """Metadata in Croissant 1.0 (mlcommons.org/croissant)."""

    def column(name: str, kind: str) -> dict[str, Any]:
        return {"@type": "cr:Field", "@id": f"captions/{name}", "name": name, "dataType": kind,
                "source": {"fileSet": {"@id": "parquet-files"}, "extract": {"column": name}}}  # fmt: skip

    columns = [*((name, "sc:Text") for name in (*_TEXT, "caption")), ("image", "sc:ImageObject")]
    return {
        "@context": {"@language": "en", "@vocab": "https://schema.org/", "sc": "https://schema.org/",
                     "cr": "http://mlcommons.org/croissant/", "dct": "http://purl.org/dc/terms/",
                     "conformsTo": "dct:conformsTo", "recordSet": "cr:recordSet", "field": "cr:field",
                     "dataType": {"@id": "cr:dataType", "@type": "@vocab"}, "source": "cr:source",
                     "extract": "cr:extract", "column": "cr:column", "fileSet": "cr:fileSet",
                     "includes": "cr:includes"},
        "@type": "sc:Dataset", "conformsTo": "http://mlcommons.org/croissant/1.0", "name": card.name,
        "description": f"{num} captions of regions in medical images; pseudo-labels.", "license": card.licence,
        "distribution": [{"@type": "cr:FileSet", "@id": "parquet-files", "name": "parquet-files",
                          "encodingFormat": "application/x-parquet", "includes": "data/*.parquet"}],
        "recordSet": [{"@type": "cr:RecordSet", "@id": "captions", "name": "captions",
                       "field": [column(name, kind) for name, kind in columns]}],
    }  # fmt: skip
