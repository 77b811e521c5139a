"""One frame of DICOM pixel data -> stored values: uint8 or uint16, grey or RGB, lossless.

Order: bytes -> samples (native here, compressed in `codecs`) -> only the stored bits -> palette or YBR to RGB -> signed
values shifted into unsigned range. YBR is converted by DICOM's own formula (PS3.3 C.7.6.3.1.2), as pydicom does.

Arrays: H rows, W columns, C colours.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from meddam_core.imaging.codecs import DEFLATED_FRAME, RLE, Frame, FrameFormat, codec_for, with_sign
from meddam_core.imaging.decoded import Stored
from meddam_core.imaging.dicom_file import EXPLICIT_BIG, DicomFile
from meddam_core.imaging.dicom_header import Header
from meddam_core.imaging.encapsulated import frame_bytes
from meddam_core.imaging.limits import Limits
from meddam_core.records import Reason, RowError

_GREY = ("MONOCHROME1", "MONOCHROME2", "PALETTE COLOR")
_COLOUR = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_RCT", "YBR_ICT")
_BLOCK_ROWS = 64
"""Rows converted at a time: the temporaries stay in the processor's cache."""


class StoredFrame(NamedTuple):
    """Pixels as they go into a row: stored = value in the file + shift."""

    stored: Stored
    bits: int
    shift: int
    photometric: str
    decoder: str


def frame_format(header: Header, limits: Limits) -> FrameFormat:
    """Group 0028, checked. Raises RowError(corrupt, unsupported_pixels, too_large)."""
    rows, columns = _required(header, "Rows"), _required(header, "Columns")
    samples = header.integer("SamplesPerPixel") or 1
    allocated = _required(header, "BitsAllocated")
    bits = header.integer("BitsStored") or allocated
    num_frames = header.integer("NumberOfFrames")
    if num_frames is None and _is_given(header, "NumberOfFrames"):
        raise RowError(Reason.CORRUPT, "the header has no readable Number Of Frames")
    photometric = _photometric(header, samples)
    if allocated not in (1, 8, 16, 32) or samples not in (1, 3):
        raise RowError(Reason.UNSUPPORTED_PIXELS, "pixels of this number of samples or bits are not supported")
    if not 1 <= bits <= allocated:
        raise RowError(Reason.CORRUPT, "more bits stored than allocated")
    limits.check_picture(rows=rows, columns=columns, num_frames=1 if num_frames is None else num_frames)
    return FrameFormat(
        rows=rows,
        columns=columns,
        samples=samples,
        bits_allocated=allocated,
        bits_stored=bits,
        high_bit=_or(header.integer("HighBit"), bits - 1),
        signed=header.integer("PixelRepresentation") == 1,
        planar=header.integer("PlanarConfiguration") == 1,
        photometric=photometric,
        num_frames=num_frames or 1,
    )


def _or(value: int | None, default: int) -> int:
    return default if value is None else value


def _required(header: Header, keyword: str) -> int:
    value = header.integer(keyword)
    if value is None:
        words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", keyword)
        raise RowError(Reason.CORRUPT, f"the header has no readable {words}")
    return value


def _is_given(header: Header, keyword: str) -> bool:
    element = header.dataset.get_item(keyword)
    return element is not None and bool(element.value)


def _photometric(header: Header, samples: int) -> str:
    found = (header.text("PhotometricInterpretation") or ("MONOCHROME2" if samples == 1 else "RGB")).upper()
    if found not in (_GREY if samples == 1 else _COLOUR):
        raise RowError(Reason.UNSUPPORTED_PIXELS, "this photometric interpretation is not supported")
    return found


def stored_frame(file: DicomFile, header: Header, fmt: FrameFormat, limits: Limits) -> StoredFrame:
    """Frame `header.frame` as stored values. Raises RowError(corrupt, no_pixels, unsupported_codec, ...)."""
    if file.native:
        frame = _native(file, fmt, header.frame)
    else:
        if not file.undefined_length:
            raise RowError(Reason.CORRUPT, "the pixel data are not encapsulated as their transfer syntax asks")
        src = frame_bytes(file.pixels, header.frame, fmt.num_frames, _extended_offsets(header))
        frame = codec_for(file.transfer_syntax)(src, fmt, limits)
    as_allocated = file.native or file.transfer_syntax in (RLE, DEFLATED_FRAME)
    samples = _only_stored_bits(frame, fmt) if as_allocated else frame.samples
    if frame.photometric == "PALETTE COLOR":
        return StoredFrame(palette_to_rgb(samples, header, file.little_endian), 8, 0, "RGB", frame.decoder)
    if frame.photometric.startswith("YBR"):
        samples = ybr_to_rgb(samples)
    photometric = "RGB" if samples.ndim == 3 else frame.photometric
    stored, bits, shift = to_unsigned(samples, frame.bits)
    return StoredFrame(stored, bits, shift, photometric, frame.decoder)


def _extended_offsets(header: Header) -> list[int] | None:
    table = header.value("ExtendedOffsetTable")
    return [int(v) for v in np.frombuffer(table, "<u8")] if isinstance(table, bytes) and len(table) % 8 == 0 else None


# ---------------------------------------------------------------------------------------------------------------------
# native


def _native(file: DicomFile, fmt: FrameFormat, frame: int) -> Frame:
    if file.undefined_length:
        raise RowError(Reason.CORRUPT, "uncompressed pixel data of undefined length")
    subsampled = fmt.photometric == "YBR_FULL_422"
    num_samples = fmt.rows * fmt.columns * (2 if subsampled else fmt.samples)
    num_bits = num_samples * fmt.bits_allocated
    if len(file.pixels) == 0:
        raise RowError(Reason.NO_PIXELS, "the pixel data element is empty")
    if len(file.pixels) < (num_bits * fmt.num_frames + 7) // 8:
        raise RowError(Reason.CORRUPT, "the pixel data are shorter than rows x columns x frames")
    if fmt.bits_allocated == 1:
        bits_HW = _bits(file.pixels, num_samples, frame).reshape(fmt.rows, fmt.columns)
        return Frame(bits_HW, fmt.photometric, 1, "native")
    swap_words = fmt.bits_allocated == 8 and file.transfer_syntax == EXPLICIT_BIG and file.pixel_vr == "OW"
    start, length = frame * num_bits // 8, num_bits // 8
    if swap_words:
        samples = _swapped(file.pixels, start, length).view("i1" if fmt.signed else "u1")
    else:
        order = "<" if file.little_endian else ">"
        samples = np.frombuffer(file.pixels[start : start + length], fmt.dtype(order))
    if subsampled:
        return Frame(_from_422(samples, fmt), "YBR_FULL", fmt.bits_stored, "native")
    if fmt.samples == 3 and fmt.planar:
        shaped = np.moveaxis(samples.reshape(3, fmt.rows, fmt.columns), 0, 2)
    else:
        shaped = samples.reshape((fmt.rows, fmt.columns, 3)[: 3 if fmt.samples == 3 else 2])
    photometric = "RGB" if fmt.photometric in ("YBR_RCT", "YBR_ICT") else fmt.photometric
    return Frame(shaped, photometric, fmt.bits_stored, "native")


def _bits(pixels: memoryview, count: int, frame: int) -> NDArray[np.uint8]:
    """Packed one-bit pixels, least significant bit first; frames need not begin on a byte (PS3.5 8.1.1)."""
    first = frame * count
    packed = np.frombuffer(pixels[first // 8 : (first + count + 7) // 8], np.uint8)
    return np.unpackbits(packed, bitorder="little")[first % 8 : first % 8 + count]


def _swapped(pixels: memoryview, start: int, length: int) -> NDArray[np.uint8]:
    """8-bit samples that a big endian file stores as 16-bit words."""
    lead = start % 2
    end = start + length + (start + length) % 2
    words = np.frombuffer(bytes(pixels[start - lead : end]).ljust(end - start + lead, b"\0"), np.uint16)
    return words.byteswap().view(np.uint8)[lead : lead + length]


def _from_422(samples: NDArray[Any], fmt: FrameFormat) -> NDArray[Any]:
    """Y1 Y2 Cb Cr of each pixel pair -> Y Cb Cr of each pixel (PS3.3 C.7.6.3.1.2)."""
    if fmt.columns % 2 or fmt.bits_allocated != 8:
        raise RowError(Reason.UNSUPPORTED_PIXELS, "YBR_FULL_422 pixels of an odd width or of more than 8 bits")
    quads = samples.reshape(fmt.rows, fmt.columns // 2, 4)
    out = np.empty((fmt.rows, fmt.columns, 3), samples.dtype)
    out[:, 0::2, 0], out[:, 1::2, 0] = quads[..., 0], quads[..., 1]
    out[:, 0::2, 1:] = out[:, 1::2, 1:] = quads[..., 2:]
    return out


def _only_stored_bits(frame: Frame, fmt: FrameFormat) -> NDArray[Any]:
    """Without the bits that are allocated but not stored: they may hold overlays or rubbish (PS3.5 8.1.1)."""
    samples = frame.samples
    if fmt.bits_allocated == 1 or (fmt.bits_stored == fmt.bits_allocated and fmt.high_bit == fmt.bits_stored - 1):
        return samples
    native = samples.astype(samples.dtype.newbyteorder("="), copy=False)
    drop = fmt.high_bit + 1 - fmt.bits_stored
    if drop > 0 and fmt.high_bit < fmt.bits_allocated:
        native = native.view(f"u{native.dtype.itemsize}") >> drop
    return with_sign(native, fmt.bits_stored, signed=fmt.signed)


# ---------------------------------------------------------------------------------------------------------------------
# colour and range


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


def to_unsigned(samples: NDArray[Any], bits: int) -> tuple[Stored, int, int]:
    """(stored, bits, shift): values moved into uint8 or uint16 without loss, stored = samples + shift.

    Signed values of n bits are shifted by 2 ** (n - 1), the same for every slice of a series. Wider ones are shifted by
    their minimum if their range fits in 16 bits. Raises RowError(unsupported_pixels) if it doesn't.
    """
    kind, size = samples.dtype.kind, samples.dtype.itemsize
    if size > 2:
        low, high = int(samples.min()), int(samples.max())
        if high - low >= 1 << 16:
            raise RowError(Reason.UNSUPPORTED_PIXELS, "pixel values span more than 16 bits")
        shift = -low if low < 0 or high >= 1 << 16 else 0
        return (samples.astype(np.int64) + shift).astype(np.uint16), 16, shift
    bits = min(bits, 8 * size)
    unsigned = np.dtype(f"u{size}")
    shift = 1 << (bits - 1) if kind == "i" else 0
    values = samples.astype(samples.dtype.newbyteorder("="), copy=False).view(unsigned)
    stored: Any = values + unsigned.type(shift) if shift else values
    if bits < 8 * size and int(stored.max()) >> bits:  # a header that lies about its bits
        bits = 8 * size
    return np.ascontiguousarray(stored), bits, shift
