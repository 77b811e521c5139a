"""What a model learns from: a region's views, what is known about it, and the captions it may be given.

    for example in examples_of(image, size=384): ...             # renders; one example a region
    write_views("views-000.parquet", examples)                   # once, where rendering would take longer than learning
    read_views("views-000.parquet")

Views are made by the path of captioning (meddam_core.captioner.RegionPreparer): a model is asked as it was taught.

Arrays: 8 channels (full RGB and mask, focal RGB and mask), S pixels a side.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from meddam_core import storage
from meddam_core.captioner import RegionPreparer, ViewRules
from meddam_core.records import Image, RowError

_SCHEMA_FIELDS = [
    ("region_id", pa.int64()), ("image_id", pa.int64()), ("split", pa.string()), ("modality", pa.string()),
    ("labels", pa.string()), ("views", pa.large_binary()),
]  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Example:
    """One region as training sees it."""

    region_id: int
    image_id: int
    split: str
    modality: str
    labels: Mapping[str, str]
    """By name, where trusted; phantoms make captions from them."""
    views_8SS: NDArray[np.uint8]
    captions: Sequence[tuple[str, str]] = field(default_factory=tuple)
    """(prompt id, text) of each caption that the region may be given; empty where they are made from the labels."""


def examples_of(image: Image, size: int, *, captioned: frozenset[int] | None = None) -> Iterator[Example]:
    """The regions of an image row; those that cannot be rendered are left out, and those not in `captioned`.

    Raises RowError where the image as a whole cannot be rendered.
    """
    for prepared in RegionPreparer(ViewRules(size=size)).prepare(image):
        region = prepared.region
        if prepared.views_N8SS is None or (captioned is not None and region.region_id not in captioned):
            continue
        if len(prepared.views_N8SS) != 1:
            continue  # clips are described, not learnt from
        yield Example(
            region_id=region.region_id, image_id=image.image_id, split=image.split, modality=image.modality,
            labels={label.name: label.value for label in region.labels}, views_8SS=prepared.views_N8SS[0],
        )  # fmt: skip


def examples_of_images(
    images: Iterable[Image], size: int, captioned: frozenset[int] | None = None
) -> tuple[list[Example], int]:
    """The examples of several images, and the number of images that could not be rendered."""
    found: list[Example] = []
    failed = 0
    for image in images:
        try:
            found += examples_of(image, size, captioned=captioned)
        except RowError:
            failed += 1
    return found, failed


def view_schema(size: int) -> pa.Schema:
    """The Arrow schema of a table of views of side `size`."""
    return pa.schema(
        [pa.field(name, kind, nullable=False) for name, kind in _SCHEMA_FIELDS],
        metadata={b"meddam.schema": b"Views", b"meddam.view_size": str(size).encode()},
    )


def views_table(examples: Sequence[Example], size: int) -> pa.Table:
    """Examples as an Arrow table of `view_schema`."""
    rows = [
        {"region_id": e.region_id, "image_id": e.image_id, "split": e.split, "modality": e.modality,
         "labels": json.dumps(dict(e.labels)), "views": e.views_8SS.tobytes()}
        for e in examples
    ]  # fmt: skip
    return pa.Table.from_pylist(rows, schema=view_schema(size))


def write_views(uri: str, examples: Sequence[Example], size: int) -> None:
    """Puts a file of prepared examples in one step. Raises OSError where the place cannot be written."""
    sink = io.BytesIO()
    pq.write_table(views_table(examples, size), sink, compression="zstd", use_dictionary=False)
    storage.write_bytes(uri, sink.getvalue())


def read_views(uri: str) -> list[Example]:
    """The examples of a file of views. Raises ValueError where it is something else."""
    table = pq.read_table(io.BytesIO(storage.read_bytes(uri)))
    metadata = table.schema.metadata or {}
    if metadata.get(b"meddam.schema") != b"Views":
        raise ValueError(f"{uri} holds no prepared views; make them again by removing the folder")
    size = int(metadata[b"meddam.view_size"])
    return [example_of_row(row, size) for row in table.to_pylist()]


def example_of_row(row: Mapping[str, object], size: int) -> Example:
    """One example from a row of the table."""
    views = np.frombuffer(row["views"], np.uint8).reshape(8, size, size)  # type: ignore[call-overload]
    rest = {k: v for k, v in row.items() if k not in ("views", "labels")}
    return Example(views_8SS=views, labels=json.loads(str(row["labels"])), **rest)  # type: ignore[arg-type]
