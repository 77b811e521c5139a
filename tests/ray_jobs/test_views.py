"""Model input through an Arrow column and back: equal to the last bit, however the table is cut on the way."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ray_jobs.views import VIEWS_TYPE, pack, unpack

SIDE = 16


def _views(seed: int, frames: int, grey: bool) -> NDArray[np.uint8]:
    views = np.random.default_rng(seed).integers(0, 256, (frames, 8, SIDE, SIDE), np.uint8)
    if grey:
        views[:, 1] = views[:, 2] = views[:, 0]
        views[:, 5] = views[:, 6] = views[:, 4]
    return views


ROWS: list[list[NDArray[np.uint8] | None]] = [
    [_views(0, 1, True), _views(1, 1, False)], [], [None, _views(2, 8, True)], [_views(3, 8, False)], [None],
]  # fmt: skip


def _same(found: list[list[NDArray[np.uint8] | None]], wanted: list[list[NDArray[np.uint8] | None]]) -> bool:
    flat = [[None if v is None else v.tolist() for v in row] for row in found]
    return flat == [[None if v is None else v.tolist() for v in row] for row in wanted]


def test_there_and_back() -> None:
    column = pack(ROWS)
    assert column.type == VIEWS_TYPE
    column.validate(full=True)
    assert _same(unpack(pa.chunked_array([column]), SIDE), ROWS)


def test_sliced_joined_and_through_a_file_of_arrow() -> None:
    table = pa.table({"views": pa.chunked_array([pack(ROWS[:2]), pack(ROWS[2:]), pack(ROWS)])})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    read = pa.ipc.open_stream(sink.getvalue()).read_all()
    for cut in (table.slice(1, 6), read.slice(3, 5), read.slice(1, 7).combine_chunks()):
        start = {6: 1, 5: 3, 7: 1}[cut.num_rows]
        assert _same(unpack(cut["views"], SIDE), (ROWS + ROWS)[start : start + cut.num_rows])


def test_one_channel_of_a_grey_picture_travels() -> None:
    grey, colour = (pack([[_views(0, 1, g)]]).values.field("pixels").nbytes for g in (True, False))
    assert colour - grey == 4 * SIDE * SIDE


def test_nothing_at_all() -> None:
    assert unpack(pa.chunked_array([pack([])]), SIDE) == []
    assert unpack(pa.chunked_array([pack([[], []])]), SIDE) == [[], []]
