"""Compressed frames -> sample arrays, one named decoder a transfer syntax, chosen here and recorded in every row.

| transfer syntax                | decoder                                   | licence |
|--------------------------------|-------------------------------------------|---------|
| JPEG 2000, HTJ2K               | pylibjpeg-openjpeg                        | MIT     |
| RLE                            | pylibjpeg-rle                             | MIT     |
| JPEG 8-bit                     | Pillow (libjpeg-turbo)                    | HPND    |
| JPEG-LS                        | pyjpegls, with the extra `jpegls`         | MIT     |
| JPEG lossless, JPEG 12-bit     | imagecodecs, with the extra `jpeg`        | BSD-3   |
| deflated frames                | zlib                                      |         |

Nothing falls back to another decoder: a missing one is RowError(unsupported_codec) that names the extra. The sizes in a
codestream are compared with the DICOM header before decoding, so that a small header can't hide a huge stream.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import io
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from meddam_core.imaging.limits import Limits, inflate
from meddam_core.records import Reason, RowError

JPEG_BASELINE = "1.2.840.10008.1.2.4.50"
JPEG_EXTENDED = "1.2.840.10008.1.2.4.51"
JPEG_LOSSLESS = "1.2.840.10008.1.2.4.57"
JPEG_LOSSLESS_SV1 = "1.2.840.10008.1.2.4.70"
JPEG_LS = ("1.2.840.10008.1.2.4.80", "1.2.840.10008.1.2.4.81")
JPEG_2000 = ("1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.4.91")
HTJ2K = ("1.2.840.10008.1.2.4.201", "1.2.840.10008.1.2.4.202", "1.2.840.10008.1.2.4.203")
RLE = "1.2.840.10008.1.2.5"
DEFLATED_FRAME = "1.2.840.10008.1.2.8.1"


@dataclass(frozen=True, slots=True, kw_only=True)
class FrameFormat:
    """Group 0028 of a DICOM header: how one frame's samples are laid out."""

    rows: int
    columns: int
    samples: int
    bits_allocated: int
    bits_stored: int
    high_bit: int
    signed: bool
    planar: bool
    photometric: str
    num_frames: int

    @property
    def num_samples(self) -> int:
        return self.rows * self.columns * self.samples

    def dtype(self, order: str = "<") -> np.dtype[Any]:
        """The type of one sample in native pixel data; bits_allocated 1 is packed and has none."""
        return np.dtype(f"{order}{'i' if self.signed else 'u'}{self.bits_allocated // 8}")


@dataclass(frozen=True, slots=True)
class Frame:
    """One decoded frame, before colour conversion and sign shift."""

    samples: NDArray[Any]
    """(H, W) or (H, W, 3), a signed or unsigned integer type."""
    photometric: str
    """What the samples are now: a decoder may already have turned YBR into RGB."""
    bits: int
    decoder: str


Codec = Callable[[bytes, FrameFormat, Limits], Frame]


def codec_for(transfer_syntax: str) -> Codec:
    """The decoder of a compressed transfer syntax. Raises RowError(unsupported_codec) if there is none."""
    found = _CODECS.get(transfer_syntax)
    if found is None:
        raise RowError(Reason.UNSUPPORTED_CODEC, "the pixel data use a transfer syntax that no decoder here reads")
    return found


@cache
def _version(distribution: str) -> str:
    return f"{distribution} {importlib.metadata.version(distribution)}"


def _need(module: str, extra: str, what: str) -> Any:
    if importlib.util.find_spec(module) is None:
        raise RowError(Reason.UNSUPPORTED_CODEC, f"{what} pixel data need the extra: pip install 'meddam[{extra}]'")
    return importlib.import_module(module)


def _container(bits: int) -> int:
    return 1 if bits <= 8 else 2 if bits <= 16 else 4


def _expect(fmt: FrameFormat, *, rows: int, columns: int, samples: int) -> None:
    if (rows, columns, samples) != (fmt.rows, fmt.columns, fmt.samples):
        raise RowError(Reason.CORRUPT, "the compressed picture has another size than the header says")


def _array(
    raw: bytes | bytearray | NDArray[Any], dtype: str, fmt: FrameFormat, *, planar: bool = False
) -> NDArray[Any]:
    """Decoded bytes as (H, W) or (H, W, samples). Raises RowError(corrupt) if their number is wrong."""
    flat = np.frombuffer(raw, dtype=dtype)
    if flat.size != fmt.num_samples:
        raise RowError(Reason.CORRUPT, "the decoder gave another number of pixels than the header says")
    if fmt.samples == 1:
        return flat.reshape(fmt.rows, fmt.columns)
    if planar:
        return np.moveaxis(flat.reshape(fmt.samples, fmt.rows, fmt.columns), 0, 2)
    return flat.reshape(fmt.rows, fmt.columns, fmt.samples)


# ---------------------------------------------------------------------------------------------------------------------
# JPEG 2000


@dataclass(frozen=True, slots=True)
class _Siz:
    rows: int
    columns: int
    samples: int
    bits: int
    signed: bool


def _siz(src: bytes) -> _Siz:
    """The SIZ segment of a JPEG 2000 codestream (ISO/IEC 15444-1 A.5.1), bare or wrapped in JP2."""
    at = src.find(b"\xff\x4f\xff\x51", 0, 4096)
    if at < 0 or len(src) < at + 43:
        raise RowError(Reason.CORRUPT, "the JPEG 2000 codestream has no header")
    x1, y1, x0, y0 = struct.unpack_from(">4I", src, at + 8)
    samples, depth = struct.unpack_from(">HB", src, at + 40)
    return _Siz(y1 - y0, x1 - x0, samples, (depth & 0x7F) + 1, bool(depth & 0x80))


def _jpeg2000(src: bytes, fmt: FrameFormat, limits: Limits) -> Frame:
    siz = _siz(src)
    _expect(fmt, rows=siz.rows, columns=siz.columns, samples=siz.samples)
    if siz.bits > 16:
        raise RowError(Reason.UNSUPPORTED_PIXELS, f"pixels of {siz.bits} bits don't fit in 16")
    openjpeg = importlib.import_module("openjpeg.utils")
    raw = openjpeg.decode_pixel_data(src, version=2)
    samples = _array(raw, f"<{'i' if siz.signed else 'u'}{_container(siz.bits)}", fmt)
    if siz.signed != fmt.signed:  # the DICOM header decides; the same bits are read again with its sign
        samples = with_sign(samples, siz.bits, signed=fmt.signed)
    photometric = "RGB" if fmt.photometric in ("YBR_RCT", "YBR_ICT") else fmt.photometric
    return Frame(samples, photometric, siz.bits, _version("pylibjpeg-openjpeg"))


def with_sign(samples: NDArray[Any], bits: int, *, signed: bool) -> NDArray[Any]:
    """The low `bits` bits of every sample, read as signed or unsigned; the rest of the container is ignored."""
    size = samples.dtype.itemsize
    shift = 8 * size - bits
    view = samples.view(f"{'i' if signed else 'u'}{size}")
    if shift == 0:
        return view
    kept: NDArray[Any] = (view << shift) >> shift if signed else view & np.array((1 << bits) - 1, view.dtype)
    return kept


# ---------------------------------------------------------------------------------------------------------------------
# JPEG and JPEG-LS


@dataclass(frozen=True, slots=True)
class _Sof:
    process: int
    """The marker's second byte: C0 baseline, C1 extended, C2 progressive, C3 lossless, F7 JPEG-LS."""
    bits: int
    rows: int
    columns: int
    component_ids: tuple[int, ...]
    adobe_transform: int | None
    jfif: bool

    @property
    def stores_ybr(self) -> bool | None:
        """Whether the codestream itself says that it holds YCbCr; None where it doesn't say."""
        if self.adobe_transform is not None:
            return self.adobe_transform == 1
        if self.component_ids in ((82, 71, 66), (114, 103, 98)):
            return False
        return True if self.jfif else None


def _sof(src: bytes) -> _Sof:
    """The frame header of a JPEG or JPEG-LS codestream and what its application markers say about colour."""
    at, adobe, jfif = 2, None, False
    while at + 4 <= len(src):
        if src[at] != 0xFF:
            break
        marker = src[at + 1]
        if marker == 0xFF:
            at += 1
            continue
        length = struct.unpack_from(">H", src, at + 2)[0]
        body = src[at + 4 : at + 2 + length]
        if marker in (0xC0, 0xC1, 0xC2, 0xC3, 0xF7) and len(body) >= 6:
            bits, rows, columns, count = struct.unpack_from(">BHHB", body)
            return _Sof(marker, bits, rows, columns, tuple(body[6 : 6 + 3 * count : 3]), adobe, jfif)
        if marker == 0xEE and body[:5] == b"Adobe" and len(body) >= 12:
            adobe = body[11]
        jfif = jfif or (marker == 0xE0 and body[:4] == b"JFIF")
        if marker == 0xDA:
            break
        at += 2 + length
    raise RowError(Reason.CORRUPT, "the JPEG codestream has no frame header")


def _colour(sof: _Sof, fmt: FrameFormat) -> str:
    """The photometric interpretation of the raw components: the codestream's word counts over the header's."""
    if fmt.samples == 1:
        return fmt.photometric
    ybr = sof.stores_ybr
    if ybr is None:
        ybr = fmt.photometric.startswith("YBR")
    return "YBR_FULL" if ybr else "RGB"


def _jpeg(src: bytes, fmt: FrameFormat, limits: Limits) -> Frame:
    sof = _sof(src)
    _expect(fmt, rows=sof.rows, columns=sof.columns, samples=len(sof.component_ids))
    if sof.bits != 8 or sof.process == 0xC3:
        return _jpeg_deep(src, fmt, sof)
    image = Image.open(io.BytesIO(src), formats=("JPEG",))
    photometric = _colour(sof, fmt)
    if fmt.samples == 3 and sof.stores_ybr is not False:
        image.draft("YCbCr", image.size)  # the components as they are stored; colour is converted by DICOM's formula
    samples = _array(image.tobytes(), "u1", fmt)
    if fmt.signed:
        samples = samples.view("i1")
    return Frame(samples, photometric, 8, f"{_version('pillow')} libjpeg")


def _jpeg_ls(src: bytes, fmt: FrameFormat, limits: Limits) -> Frame:
    sof = _sof(src)
    _expect(fmt, rows=sof.rows, columns=sof.columns, samples=len(sof.component_ids))
    jpeg_ls = _need("jpeg_ls", "jpegls", "JPEG-LS")
    raw, info = jpeg_ls.decode_pixel_data(src)
    planar = info["components"] > 1 and info["interleave_mode"] == 0
    samples = _array(raw, f"<u{_container(sof.bits)}", fmt, planar=planar)
    if fmt.signed:  # JPEG-LS knows no sign
        samples = with_sign(samples, sof.bits, signed=True)
    return Frame(samples, _colour(sof, fmt), sof.bits, _version("pyjpegls"))


def _jpeg_deep(src: bytes, fmt: FrameFormat, sof: _Sof) -> Frame:
    """Lossless JPEG of 2 to 16 bits and 12-bit JPEG."""
    imagecodecs = _need("imagecodecs", "jpeg", "Lossless and 12-bit JPEG")
    raw_colours = imagecodecs.JPEG8.CS.YCbCr if fmt.samples == 3 else imagecodecs.JPEG8.CS.GRAYSCALE
    raw = imagecodecs.jpeg8_decode(src, colorspace=raw_colours, outcolorspace=raw_colours)
    samples = _array(np.ascontiguousarray(raw).reshape(-1), raw.dtype.str, fmt)
    if fmt.signed:  # JPEG knows no sign
        samples = with_sign(samples, sof.bits, signed=True)
    return Frame(samples, _colour(sof, fmt), sof.bits, f"{_version('imagecodecs')} libjpeg-turbo")


# ---------------------------------------------------------------------------------------------------------------------
# RLE and deflate


def _rle(src: bytes, fmt: FrameFormat, limits: Limits) -> Frame:
    if fmt.bits_allocated % 8:
        raise RowError(Reason.UNSUPPORTED_PIXELS, "RLE pixel data of less than 8 bits a sample")
    rle = importlib.import_module("rle.utils")
    try:
        raw = rle.decode_pixel_data(
            src, version=2, rows=fmt.rows, columns=fmt.columns, bits_allocated=fmt.bits_allocated, byteorder="<"
        )
    except BaseException as panic:  # segments too long end in a Rust panic, which is no Exception
        if type(panic).__name__ != "PanicException":
            raise
        raise RowError(Reason.CORRUPT, "the run lengths don't fit the picture") from None
    samples = _array(raw, fmt.dtype().str, fmt, planar=True)
    photometric = "YBR_FULL" if fmt.photometric == "YBR_FULL_422" else fmt.photometric
    return Frame(samples, photometric, fmt.bits_stored, _version("pylibjpeg-rle"))


def _deflated(src: bytes, fmt: FrameFormat, limits: Limits) -> Frame:
    num_bytes = fmt.num_samples * fmt.bits_allocated // 8
    raw = inflate(src, wbits=-15, limits=limits, enough=num_bytes)[:num_bytes]
    samples = _array(raw, fmt.dtype().str, fmt, planar=fmt.planar)
    return Frame(samples, fmt.photometric, fmt.bits_stored, "zlib")


_CODECS: dict[str, Codec] = {
    JPEG_BASELINE: _jpeg,
    JPEG_EXTENDED: _jpeg,
    JPEG_LOSSLESS: _jpeg,
    JPEG_LOSSLESS_SV1: _jpeg,
    **dict.fromkeys(JPEG_LS, _jpeg_ls),
    **dict.fromkeys((*JPEG_2000, *HTJ2K), _jpeg2000),
    RLE: _rle,
    DEFLATED_FRAME: _deflated,
}
