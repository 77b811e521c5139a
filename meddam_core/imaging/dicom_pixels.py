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

from meddam_core.imaging.codecs import DEFLATED_FRAME, ENCAPSULATED, HTJ2K, JPEG_2000, RLE, codec_for
from meddam_core.imaging.decoded import Stored
from meddam_core.imaging.dicom_colour import palette_to_rgb, ybr_to_rgb
from meddam_core.imaging.dicom_file import EXPLICIT_BIG, DicomFile
from meddam_core.imaging.dicom_header import Header
from meddam_core.imaging.encapsulated import frame_bytes
from meddam_core.imaging.frames import Frame, FrameFormat, to_unsigned, with_sign
from meddam_core.imaging.jpeg2000 import decode_jpeg2000_part
from meddam_core.imaging.limits import Limits
from meddam_core.records import Box, Reason, RowError

_GREY = ("MONOCHROME1", "MONOCHROME2", "PALETTE COLOR")
_AS_ALLOCATED = (RLE, DEFLATED_FRAME, ENCAPSULATED)
"""Compressed syntaxes whose samples come with all allocated bits, stored or not."""
_COLOUR = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_RCT", "YBR_ICT")


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


def stored_frame(
    file: DicomFile, header: Header, fmt: FrameFormat, limits: Limits, box: Box | None = None
) -> StoredFrame:
    """Frame `header.frame` as stored values, or only the part within `box`.

    Raises RowError(corrupt, no_pixels, unsupported_codec, ...).
    """
    frame = _native(file, fmt, header.frame) if file.native else _compressed(file, header, fmt, limits, box)
    samples = frame.samples
    if box is not None and samples.shape[:2] == (fmt.rows, fmt.columns):
        samples = samples[box[1] : box[3], box[0] : box[2]]
    if file.native or file.transfer_syntax in _AS_ALLOCATED:
        samples = _only_stored_bits(samples, fmt)
    if frame.photometric == "PALETTE COLOR":
        return StoredFrame(palette_to_rgb(samples, header, file.little_endian), 8, 0, "RGB", frame.decoder)
    if frame.photometric.startswith("YBR"):
        samples = ybr_to_rgb(samples)
    photometric = "RGB" if samples.ndim == 3 else frame.photometric
    stored, bits, shift = to_unsigned(samples, frame.bits)
    return StoredFrame(stored, bits, shift, photometric, frame.decoder)


def _compressed(file: DicomFile, header: Header, fmt: FrameFormat, limits: Limits, box: Box | None) -> Frame:
    if not file.undefined_length:
        raise RowError(Reason.CORRUPT, "the pixel data are not encapsulated as their transfer syntax asks")
    decode = codec_for(file.transfer_syntax)
    src = frame_bytes(file.pixels, header.frame, fmt.num_frames, _extended_offsets(header))
    part = None
    if box is not None and file.transfer_syntax in (*JPEG_2000, *HTJ2K):
        part = decode_jpeg2000_part(src, fmt, box)
    return part or decode(src, fmt, limits)


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


def _only_stored_bits(samples: NDArray[Any], fmt: FrameFormat) -> NDArray[Any]:
    """Without the bits that are allocated but not stored: they may hold overlays or rubbish (PS3.5 8.1.1)."""
    if fmt.bits_allocated == 1 or (fmt.bits_stored == fmt.bits_allocated and fmt.high_bit == fmt.bits_stored - 1):
        return samples
    native = samples.astype(samples.dtype.newbyteorder("="), copy=False)
    drop = fmt.high_bit + 1 - fmt.bits_stored
    if drop > 0 and fmt.high_bit < fmt.bits_allocated:
        native = native.view(f"u{native.dtype.itemsize}") >> drop
    return with_sign(native, fmt.bits_stored, signed=fmt.signed)
