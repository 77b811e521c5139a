"""Compressed frames out of DICOM's encapsulated Pixel Data (PS3.5 A.4).

Strict where pydicom is lenient: an item that runs past the end of the data is corrupt, never a shorter frame, so that a
truncated file can't become a picture with a grey lower half.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from meddam_core.records import Reason, RowError

_ITEM = 0xE000FFFE
_DELIMITER = 0xE0DDFFFE
_END_OF_IMAGE = b"\xff\xd9"

Span = tuple[int, int]
"""(start, end) of a fragment's value."""


def frame_bytes(data: memoryview, frame: int, num_frames: int, extended_offsets: Sequence[int] | None = None) -> bytes:
    """The compressed bytes of frame number `frame`.

    data: the value of Pixel Data, from the first item on. Raises RowError(corrupt).
    """
    table, fragments, base = _items(data)
    starts = list(extended_offsets) if extended_offsets else list(table)
    if len(starts) > frame and len(starts) >= num_frames and (num_frames > 1 or len(fragments) > 1):
        spans = _by_offsets(fragments, starts, frame, base)
    else:
        spans = _by_count(data, fragments, frame, num_frames)
    if not spans:
        raise RowError(Reason.CORRUPT, "the compressed frame is missing")
    return b"".join(bytes(data[start:end]) for start, end in spans)


def _items(data: memoryview) -> tuple[tuple[int, ...], list[Span], int]:
    """The basic offset table, the fragments, and where the first fragment's item begins."""
    at = 0
    spans: list[Span] = []
    while at + 8 <= len(data):
        tag, length = struct.unpack_from("<II", data, at)
        if tag == _DELIMITER:
            break
        if tag != _ITEM or at + 8 + length > len(data):
            raise RowError(Reason.CORRUPT, "the compressed pixel data are cut short or broken")
        spans.append((at + 8, at + 8 + length))
        at += 8 + length
    if not spans or spans[-1][1] == 0:
        raise RowError(Reason.NO_PIXELS, "the pixel data element is empty")
    table_start, table_end = spans[0]
    count = (table_end - table_start) // 4
    table = struct.unpack_from(f"<{count}I", data, table_start)
    if len(spans) == 1:
        raise RowError(Reason.NO_PIXELS, "the pixel data element has no frames")
    return table, spans[1:], table_end


def _by_offsets(fragments: list[Span], starts: list[int], frame: int, base: int) -> list[Span]:
    first = base + starts[frame]
    last = base + starts[frame + 1] if frame + 1 < len(starts) else None
    return [s for s in fragments if s[0] - 8 >= first and (last is None or s[0] - 8 < last)]


def _by_count(data: memoryview, fragments: list[Span], frame: int, num_frames: int) -> list[Span]:
    """Without a usable offset table: one fragment a frame, or frames that end at an end-of-image marker."""
    if num_frames == 1:
        return fragments
    if len(fragments) == num_frames:
        return fragments[frame : frame + 1]
    number, spans = 0, []
    for start, end in fragments:
        spans.append((start, end))
        if _END_OF_IMAGE in bytes(data[max(start, end - 10) : end]):
            if number == frame:
                return spans
            number, spans = number + 1, []
    return spans if number == frame else []
