"""Model input as an Arrow column, on its way from the actors that prepare it to those that describe it.

It is nearly all that moves through a run, a megabyte a region, so it is copied once on the way in and not at all on the
way out; and of a grey picture, whose three channels are equal, one channel travels.

Arrays: N frames, 8 channels (R, G, B, mask of the full view, then of the focal crop), S the model's input side.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

Views = NDArray[np.uint8]
"""(N, 8, S, S) of one region."""

_GREY = [0, 3, 4, 7]
_CELL = pa.struct([("num_frames", pa.int32()), ("grey", pa.bool_()), ("pixels", pa.large_binary())])
VIEWS_TYPE = pa.list_(_CELL)
"""One entry a region; num_frames is 0 where a region could not be prepared."""


def pack(rows: Sequence[Sequence[Views | None]]) -> pa.ListArray:
    """The column of a batch: for each row the views of its regions."""
    regions = [views for row in rows for views in row]
    grey = [views is not None and _is_grey(views) for views in regions]
    parts = [
        np.empty(0, np.uint8) if views is None else (views[:, _GREY] if is_grey else views).reshape(-1)
        for views, is_grey in zip(regions, grey, strict=True)
    ]
    ends = np.cumsum([0, *(len(p) for p in parts)], dtype=np.int64)
    pixels = np.concatenate(parts) if parts else np.empty(0, np.uint8)
    cells = pa.StructArray.from_arrays(
        [
            pa.array([0 if views is None else len(views) for views in regions], pa.int32()),
            pa.array(grey, pa.bool_()),
            pa.Array.from_buffers(pa.large_binary(), len(parts), [None, pa.py_buffer(ends), pa.py_buffer(pixels)]),
        ],
        fields=list(_CELL),
    )
    starts = np.cumsum([0, *(len(row) for row in rows)], dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(starts), cells)


def unpack(column: pa.ChunkedArray, side: int) -> list[list[Views | None]]:
    """For each row the views of its regions, those of colour pictures without a copy."""
    rows: list[list[Views | None]] = []
    for chunk in column.chunks:
        cells = chunk.values
        frames = cells.field("num_frames").to_numpy()
        grey = cells.field("grey").to_numpy(zero_copy_only=False)
        pixels = cells.field("pixels")
        _, ends_buffer, data = pixels.buffers()
        ends = np.frombuffer(ends_buffer, np.int64)[pixels.offset : pixels.offset + len(pixels) + 1]
        flat = np.frombuffer(data, np.uint8) if data is not None else np.empty(0, np.uint8)
        starts = chunk.offsets.to_numpy()
        rows += [
            [_views(flat[ends[i] : ends[i + 1]], int(frames[i]), bool(grey[i]), side) for i in range(first, last)]
            for first, last in itertools.pairwise(starts)
        ]
    return rows


def _is_grey(views: Views) -> bool:
    return all(np.array_equal(views[:, a], views[:, b]) for a, b in ((0, 1), (0, 2), (4, 5), (4, 6)))


def _views(pixels: NDArray[np.uint8], num_frames: int, grey: bool, side: int) -> Views | None:
    if not num_frames:
        return None
    if not grey:
        return pixels.reshape(num_frames, 8, side, side)
    one = pixels.reshape(num_frames, 4, side, side)
    views = np.empty((num_frames, 8, side, side), np.uint8)
    views[:, 0:3], views[:, 3], views[:, 4:7], views[:, 7] = one[:, :1], one[:, 1], one[:, 2:3], one[:, 3]
    return views
