"""JPEG 2000 and HTJ2K frames, whole or only a part of them, by OpenJPEG in pylibjpeg-openjpeg's wheel.

A part is decoded from the code blocks it needs: a ninth of a film takes about a fifth of the whole film's time, and its
pixels are those of the whole. The Python package has no call for it, so OpenJPEG's own (opj_set_decode_area, the same
since 2.1) is reached through the symbols that the wheel's library exports; where a wheel doesn't export them, the whole
frame is decoded and cut.
"""

from __future__ import annotations

import ctypes
import importlib.util
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from openjpeg.utils import decode_pixel_data

from meddam_core.imaging.frames import Frame, FrameFormat, as_samples, container, expect, version, with_sign
from meddam_core.imaging.limits import Limits
from meddam_core.records import Box, Reason, RowError

_START = b"\xff\x4f\xff\x51"
"""The first two markers of a codestream: SOC, SIZ."""


@dataclass(frozen=True, slots=True)
class Siz:
    """The SIZ segment of a codestream (ISO/IEC 15444-1 A.5.1)."""

    rows: int
    columns: int
    samples: int
    bits: int
    signed: bool
    origin: tuple[int, int]
    """(x, y) of the first pixel on the codestream's reference grid."""
    at: int
    """Where in the data the codestream begins: a JP2 wrapper may stand before it."""


def siz(src: bytes) -> Siz:
    """The sizes in a codestream, bare or wrapped in JP2. Raises RowError(corrupt)."""
    at = src.find(_START, 0, 4096)
    if at < 0 or len(src) < at + 43:
        raise RowError(Reason.CORRUPT, "the JPEG 2000 codestream has no header")
    x1, y1, x0, y0 = struct.unpack_from(">4I", src, at + 8)
    samples, depth = struct.unpack_from(">HB", src, at + 40)
    return Siz(y1 - y0, x1 - x0, samples, (depth & 0x7F) + 1, bool(depth & 0x80), (x0, y0), at)


def decode_jpeg2000(src: bytes, fmt: FrameFormat, limits: Limits) -> Frame:
    """A whole frame. Raises RowError(corrupt, unsupported_pixels)."""
    header = _checked(src, fmt)
    raw = decode_pixel_data(src, version=2)
    samples = as_samples(raw, f"<{'i' if header.signed else 'u'}{container(header.bits)}", fmt)
    return _frame(samples, header, fmt)


def decode_jpeg2000_part(src: bytes, fmt: FrameFormat, box: Box) -> Frame | None:
    """The pixels of a frame within `box`; None where this OpenJPEG can't do it. Raises RowError(corrupt, ...)."""
    header = _checked(src, fmt)
    library = _library()
    if library is None:
        return None
    samples = _decode_area(library, src[header.at :], header, box)
    return None if samples is None else _frame(samples, header, fmt)


def _checked(src: bytes, fmt: FrameFormat) -> Siz:
    header = siz(src)
    expect(fmt, rows=header.rows, columns=header.columns, samples=header.samples)
    if header.bits > 16:
        raise RowError(Reason.UNSUPPORTED_PIXELS, f"pixels of {header.bits} bits don't fit in 16")
    return header


def _frame(samples: NDArray[Any], header: Siz, fmt: FrameFormat) -> Frame:
    if header.signed != fmt.signed:  # the DICOM header decides; the same bits are read again with its sign
        samples = with_sign(samples, header.bits, signed=fmt.signed)
    photometric = "RGB" if fmt.photometric in ("YBR_RCT", "YBR_ICT") else fmt.photometric
    return Frame(samples, photometric, header.bits, version("pylibjpeg-openjpeg"))


# ---------------------------------------------------------------------------------------------------------------------
# OpenJPEG's C interface (openjpeg.h, unchanged in its layout since 2.1)


class _Component(ctypes.Structure):
    _fields_ = (
        *(
            (name, ctypes.c_uint32)
            for name in ["dx", "dy", "w", "h", "x0", "y0", "prec", "bpp", "sgnd", "resno_decoded", "factor"]
        ),
        ("data", ctypes.POINTER(ctypes.c_int32)),
        ("alpha", ctypes.c_uint16),
    )


class _Image(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_uint32) for name in ["x0", "y0", "x1", "y1", "numcomps"]),
        ("color_space", ctypes.c_int),
        ("comps", ctypes.POINTER(_Component)),
        ("icc_profile_buf", ctypes.c_void_p),
        ("icc_profile_len", ctypes.c_uint32),
    )


_Pointer = ctypes.c_void_p
_ImagePointer = ctypes.POINTER(_Image)
_Read = ctypes.CFUNCTYPE(ctypes.c_ssize_t, _Pointer, ctypes.c_size_t, _Pointer)
_Skip = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64, _Pointer)
_Seek = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int64, _Pointer)
_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "opj_create_decompress": (_Pointer, [ctypes.c_int]),
    "opj_set_default_decoder_parameters": (None, [_Pointer]),
    "opj_setup_decoder": (ctypes.c_int, [_Pointer, _Pointer]),
    "opj_stream_create": (_Pointer, [ctypes.c_size_t, ctypes.c_int]),
    "opj_stream_set_read_function": (None, [_Pointer, _Read]),
    "opj_stream_set_skip_function": (None, [_Pointer, _Skip]),
    "opj_stream_set_seek_function": (None, [_Pointer, _Seek]),
    "opj_stream_set_user_data_length": (None, [_Pointer, ctypes.c_uint64]),
    "opj_read_header": (ctypes.c_int, [_Pointer, _Pointer, ctypes.POINTER(_ImagePointer)]),
    "opj_set_decode_area": (ctypes.c_int, [_Pointer, _ImagePointer, *[ctypes.c_int32] * 4]),
    "opj_decode": (ctypes.c_int, [_Pointer, _Pointer, _ImagePointer]),
    "opj_stream_destroy": (None, [_Pointer]),
    "opj_destroy_codec": (None, [_Pointer]),
    "opj_image_destroy": (None, [_ImagePointer]),
}
_CODESTREAM = 0
_PARAMETER_BYTES = 1 << 15
"""More than opj_dparameters_t takes (two file names of 4,096 and some numbers)."""
_STREAM_BUFFER_BYTES = 1 << 20


@cache
def _library() -> Any:
    """OpenJPEG as the extension module carries it; None if its functions are not exported."""
    spec = importlib.util.find_spec("_openjpeg")
    if spec is None or spec.origin is None:
        return None
    library = ctypes.CDLL(spec.origin)
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(library, name, None)
        if function is None:
            return None
        function.restype, function.argtypes = result, arguments
    return library


@contextmanager
def _stream(library: Any, src: bytes) -> Iterator[Any]:
    """An OpenJPEG input stream over bytes."""
    start = ctypes.cast(ctypes.c_char_p(src), _Pointer).value or 0
    at = 0

    def read(buffer: int, num_bytes: int, _data: Any) -> int:
        nonlocal at
        count = min(num_bytes, len(src) - at)
        if count <= 0:
            return -1
        ctypes.memmove(buffer, start + at, count)
        at += count
        return count

    def skip(num_bytes: int, _data: Any) -> int:
        nonlocal at
        at += num_bytes
        return num_bytes

    def seek(position: int, _data: Any) -> int:
        nonlocal at
        at = position
        return 1

    callbacks = _Read(read), _Skip(skip), _Seek(seek)  # must live as long as the stream
    stream = library.opj_stream_create(_STREAM_BUFFER_BYTES, 1)
    library.opj_stream_set_read_function(stream, callbacks[0])
    library.opj_stream_set_skip_function(stream, callbacks[1])
    library.opj_stream_set_seek_function(stream, callbacks[2])
    library.opj_stream_set_user_data_length(stream, len(src))
    try:
        yield stream
    finally:
        library.opj_stream_destroy(stream)


def _decode_area(library: Any, src: bytes, header: Siz, box: Box) -> NDArray[Any] | None:
    """(h, w) or (h, w, samples) of the pixels within `box`; None for subsampled components."""
    x, y = header.origin
    codec = library.opj_create_decompress(_CODESTREAM)
    image = _ImagePointer()
    parameters = ctypes.create_string_buffer(_PARAMETER_BYTES)
    library.opj_set_default_decoder_parameters(parameters)
    try:
        with _stream(library, src) as stream:
            done = (
                library.opj_setup_decoder(codec, parameters)
                and library.opj_read_header(stream, codec, ctypes.byref(image))
                and library.opj_set_decode_area(codec, image, box[0] + x, box[1] + y, box[2] + x, box[3] + y)
                and library.opj_decode(codec, stream, image)
            )
        if not done:
            raise RowError(Reason.CORRUPT, "the JPEG 2000 codestream can't be decoded")
        return _samples(image.contents, header, box)
    finally:
        library.opj_image_destroy(image)
        library.opj_destroy_codec(codec)


def _samples(image: Any, header: Siz, box: Box) -> NDArray[Any] | None:
    components = [image.comps[i] for i in range(image.numcomps)]
    if any((c.dx, c.dy) != (1, 1) for c in components):
        return None
    shape = box[3] - box[1], box[2] - box[0]
    if any((c.h, c.w) != shape or not c.data for c in components) or len(components) != header.samples:
        raise RowError(Reason.CORRUPT, "the JPEG 2000 codestream holds another picture than its header says")
    dtype = np.dtype(f"{'i' if header.signed else 'u'}{container(header.bits)}")
    planes = [np.ctypeslib.as_array(c.data, shape).astype(dtype) for c in components]
    return planes[0] if len(planes) == 1 else np.stack(planes, axis=-1)
