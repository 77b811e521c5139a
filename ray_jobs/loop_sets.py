"""The sets of a loop: held apart, and the labelled one with captions to learn from.

    check_apart({"labelled": [...], "unlabelled": [...], "development": [...], "test": [...]})

Sets are told apart by what they hold, not by where they lie: by the images' keys, the patients' keys where there are
any, and the small preview of each picture, which a second ingest of the same picture repeats.
"""

from __future__ import annotations

import hashlib
import io
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from meddam_core import storage
from meddam_core.datasets.phantoms.captions import caption_of
from meddam_core.records import Status
from ray_jobs.dataset_files import check_finished
from ray_jobs.snapshot import shards_below

MAY_SHARE = frozenset({("labelled", "unlabelled")})
"""Sets that may hold other pictures of the same patient."""
MIN_PREVIEW_BYTES = 200
"""Smaller previews are of nothing: two black pictures are not the same picture."""
_COLUMNS = ["image_key", "patient_key", "preview"]
_SCHEMA = pa.schema(
    [("region_id", pa.int64()), ("prompt_id", pa.string()), ("text", pa.string()), ("status", pa.string())]
)


def check_apart(sets: Mapping[str, Sequence[str]]) -> dict[str, int]:
    """The number of images of each set. Raises ValueError where two share an image or a patient, or one is half made.

    Reads keys and previews, no labels and no pictures.
    """
    for uri in itertools.chain.from_iterable(sets.values()):
        check_finished(uri)
    facts = {name: _facts(uris) for name, uris in sets.items()}
    for (first, a), (second, b) in itertools.combinations(facts.items(), 2):
        for kind in ("image_key", "preview", "patient_key"):
            if kind == "patient_key" and (first, second) in MAY_SHARE:
                continue
            if shared := a[kind] & b[kind]:
                what = "patients" if kind == "patient_key" else "pictures"
                raise ValueError(
                    f"the {first} and the {second} shards share {len(shared)} {what}: a score on what was learnt from "
                    "is no score. Deal them apart with `meddam ingest ... --splits`, one folder each"
                )
    return {name: int(found["num"]) for name, found in facts.items()}


def _facts(uris: Sequence[str]) -> dict[str, Any]:
    found: dict[str, Any] = {"num": 0, **{name: set() for name in _COLUMNS}}
    for batch in _batches(uris, _COLUMNS):
        rows = batch.to_pylist()
        found["num"] += len(rows)
        for row in rows:
            preview = (row["preview"] or {}).get("bytes") or b""
            found["image_key"].add(row["image_key"])
            if row["patient_key"]:
                found["patient_key"].add(row["patient_key"])
            if len(preview) >= MIN_PREVIEW_BYTES:
                found["preview"].add(hashlib.blake2b(preview, digest_size=12).digest())
    return found


def _batches(uris: Sequence[str], columns: list[str]) -> Iterator[pa.RecordBatch]:
    for uri in uris:
        for shard in shards_below(uri):
            fs, path = storage.open_uri(shard.uri)
            with fs.open_input_file(path) as stream:
                yield from pq.ParquetFile(stream).iter_batches(256, columns=columns)


def write_truth_captions(shards: Sequence[str], out: str, prompt: str, num_wordings: int, seed: int) -> int:
    """A table of captions of labelled phantoms, made from their truth in several wordings each; returns how many.

    Raises ValueError where the shards hold no phantoms: other datasets' captions must be given.
    """
    rows = []
    for batch in _batches(shards, ["regions.list.element.region_id", "regions.list.element.labels"]):
        for image in batch.to_pylist():
            for region in image["regions"]:
                truth = {label["name"]: label["value"] for label in region["labels"]}
                if "kind" not in truth:
                    raise ValueError(
                        "only phantoms tell their own captions; give those of the labelled shards with "
                        "--labelled-caption RUN_OR_SET"
                    )
                rng = np.random.default_rng([seed, region["region_id"]])
                rows += [
                    {"region_id": region["region_id"], "prompt_id": prompt, "text": caption_of(truth, rng),
                     "status": Status.OK.value} for _ in range(num_wordings)
                ]  # fmt: skip
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA), sink, compression="zstd")
    storage.write_bytes(storage.join(out, "captions.parquet"), sink.getvalue())
    return len(rows)
