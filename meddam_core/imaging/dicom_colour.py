"""DICOM's colour spaces -> RGB, 8 bits: YBR by the standard's formula, palettes by their tables.

Arrays: H rows, W columns, C colours.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from meddam_core.imaging.dicom_header import Header
from meddam_core.records import Reason, RowError

_BLOCK_ROWS = 64
"""Rows converted at a time: the temporaries stay in the processor's cache."""


def ybr_to_rgb(ybr_HWC: NDArray[Any]) -> NDArray[np.uint8]:
    """YBR_FULL -> RGB, uint8 (PS3.3 C.7.6.3.1.2). Raises RowError(unsupported_pixels) for more than 8 bits."""
    if ybr_HWC.dtype.itemsize != 1:
        raise RowError(Reason.UNSUPPORTED_PIXELS, "YBR pixels of more than 8 bits")
    source = ybr_HWC.view(np.uint8) if ybr_HWC.dtype != np.uint8 else ybr_HWC
    matrix = np.array([[1, 1, 1], [0, -0.114 * 1.772 / 0.587, 1.772], [1.402, -0.299 * 1.402 / 0.587, 0]], np.float32)
    out = np.empty(source.shape, np.uint8)
    for top in range(0, len(source), _BLOCK_ROWS):
        block = source[top : top + _BLOCK_ROWS].astype(np.float32)
        block -= np.array([0, 128, 128], np.float32)
        rgb = block @ matrix
        rgb += 0.5
        out[top : top + _BLOCK_ROWS] = np.clip(np.floor(rgb, out=rgb), 0, 255, out=rgb)
    return out


def palette_to_rgb(index_HW: NDArray[Any], header: Header, little_endian: bool) -> NDArray[np.uint8]:
    """Palette indices -> RGB, uint8; palettes of 16 bits keep their upper 8 (PS3.3 C.7.6.3.1.5-6, C.7.9)."""
    channels = [_palette(header, colour, little_endian) for colour in ("Red", "Green", "Blue")]
    size = min(len(c) for c in channels)
    table = np.stack([c[:size] for c in channels], axis=1)
    if table.max(initial=0) > 255:  # entries of 8 bits may be stored in 16, whatever the descriptor says
        table >>= 8
    first = _descriptor(header, "Red")[1]
    if index_HW.dtype.kind == "i" and first >> 15:
        first -= 1 << 16
    at = np.clip(index_HW.astype(np.int32) - first, 0, size - 1)
    return table.astype(np.uint8)[at]


def _descriptor(header: Header, colour: str) -> list[int]:
    """(number of entries, first mapped value, bits of an entry)"""
    values = [int(v) for v in header.floats(f"{colour}PaletteColorLookupTableDescriptor")]
    if len(values) != 3 or values[2] not in (8, 16):
        raise RowError(Reason.CORRUPT, "the colour palette is missing or broken")
    return [values[0] & 0xFFFF or 1 << 16, values[1], values[2]]


def _palette(header: Header, colour: str, little_endian: bool) -> NDArray[np.int64]:
    size, _, bits = _descriptor(header, colour)
    order = "<" if little_endian else ">"
    plain = header.value(f"{colour}PaletteColorLookupTableData")
    segmented = header.value(f"Segmented{colour}PaletteColorLookupTableData")
    if isinstance(plain, bytes):
        kind = f"{order}u2" if len(plain) >= 2 * size else "u1"
        width = int(kind[-1])
        entries = np.frombuffer(plain[: len(plain) // width * width], kind).astype(np.int64)[:size]
    elif isinstance(segmented, bytes):
        raw = np.frombuffer(segmented, "u1" if bits == 8 else f"{order}u2")
        entries = np.array(_segments(raw.tolist(), size), np.int64)[:size]
    else:
        entries = np.empty(0, np.int64)
    if len(entries) == 0:
        raise RowError(Reason.CORRUPT, "the colour palette is missing or broken")
    return entries


def _segments(data: list[int], size: int) -> list[int]:
    """Segmented palette data, expanded (PS3.3 C.7.9.2); indirect segments are refused."""
    out: list[int] = []
    at = 0
    while at + 2 < len(data) and len(out) < size:
        opcode, length = data[at], data[at + 1]
        if opcode == 0:
            out += data[at + 2 : at + 2 + length]
            at += 2 + length
        elif opcode == 1 and out:
            steps = np.linspace(out[-1], data[at + 2], length + 1)[1:]
            out += np.rint(steps).astype(int).tolist()
            at += 3
        else:
            raise RowError(Reason.UNSUPPORTED_PIXELS, "the colour palette has segments of an unsupported kind")
    return out
