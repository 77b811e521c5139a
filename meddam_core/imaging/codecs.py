"""Compressed frames -> sample arrays, one named decoder a transfer syntax, chosen here and recorded in every row.

| transfer syntax                | decoder                                   | licence |
|--------------------------------|-------------------------------------------|---------|
| JPEG 2000, HTJ2K               | pylibjpeg-openjpeg                        | MIT     |
| RLE                            | pylibjpeg-rle                             | MIT     |
| JPEG 8-bit                     | Pillow (libjpeg-turbo)                    | HPND    |
| JPEG-LS                        | pyjpegls, with the extra `jpegls`         | MIT     |
| JPEG lossless, JPEG 12-bit     | imagecodecs, with the extra `jpeg`        | BSD-3   |
| deflated, uncompressed frames  | zlib, none                                |         |

Nothing falls back to another decoder: a missing one is RowError(unsupported_codec) that names the extra. The sizes in a
codestream are compared with the DICOM header before decoding, so that a small header can't hide a huge stream.
"""

from __future__ import annotations

import importlib
import importlib.util
import io
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from meddam_core.imaging.frames import Frame, FrameFormat, as_samples, container, expect, version, with_sign
from meddam_core.imaging.jpeg2000 import decode_jpeg2000
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
ENCAPSULATED = "1.2.840.10008.1.2.1.98"
"""Uncompressed frames, one an item."""


Codec = Callable[[bytes, FrameFormat, Limits], Frame]


def codec_for(transfer_syntax: str) -> Codec:
    """The decoder of a compressed transfer syntax. Raises RowError(unsupported_codec) if there is none."""
    found = _CODECS.get(transfer_syntax)
    if found is None:
        raise RowError(Reason.UNSUPPORTED_CODEC, "the pixel data use a transfer syntax that no decoder here reads")
    return found


def _need(module: str, extra: str, what: str) -> Any:
    if importlib.util.find_spec(module) is None:
        raise RowError(Reason.UNSUPPORTED_CODEC, f"{what} pixel data need the extra: pip install 'meddam[{extra}]'")
    return importlib.import_module(module)


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
    expect(fmt, rows=sof.rows, columns=sof.columns, samples=len(sof.component_ids))
    if sof.bits != 8 or sof.process == 0xC3:
        return _jpeg_deep(src, fmt, sof)
    image = Image.open(io.BytesIO(src), formats=("JPEG",))
    photometric = _colour(sof, fmt)
    if fmt.samples == 3 and sof.stores_ybr is not False:
        image.draft("YCbCr", image.size)  # the components as they are stored; colour is converted by DICOM's formula
    samples = as_samples(image.tobytes(), "u1", fmt)
    if fmt.signed:
        samples = samples.view("i1")
    return Frame(samples, photometric, 8, f"{version('pillow')} libjpeg")


def _jpeg_ls(src: bytes, fmt: FrameFormat, limits: Limits) -> Frame:
    sof = _sof(src)
    expect(fmt, rows=sof.rows, columns=sof.columns, samples=len(sof.component_ids))
    jpeg_ls = _need("jpeg_ls", "jpegls", "JPEG-LS")
    raw, info = jpeg_ls.decode_pixel_data(src)
    planar = info["components"] > 1 and info["interleave_mode"] == 0
    samples = as_samples(raw, f"<u{container(sof.bits)}", fmt, planar=planar)
    if fmt.signed:  # JPEG-LS knows no sign
        samples = with_sign(samples, sof.bits, signed=True)
    return Frame(samples, _colour(sof, fmt), sof.bits, version("pyjpegls"))


def _jpeg_deep(src: bytes, fmt: FrameFormat, sof: _Sof) -> Frame:
    """Lossless JPEG of 2 to 16 bits and 12-bit JPEG."""
    imagecodecs = _need("imagecodecs", "jpeg", "Lossless and 12-bit JPEG")
    raw_colours = imagecodecs.JPEG8.CS.YCbCr if fmt.samples == 3 else imagecodecs.JPEG8.CS.GRAYSCALE
    raw = imagecodecs.jpeg8_decode(src, colorspace=raw_colours, outcolorspace=raw_colours)
    samples = as_samples(np.ascontiguousarray(raw).reshape(-1), raw.dtype.str, fmt)
    if fmt.signed:  # JPEG knows no sign
        samples = with_sign(samples, sof.bits, signed=True)
    return Frame(samples, _colour(sof, fmt), sof.bits, f"{version('imagecodecs')} libjpeg-turbo")


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
    samples = as_samples(raw, fmt.dtype().str, fmt, planar=True)
    photometric = "YBR_FULL" if fmt.photometric == "YBR_FULL_422" else fmt.photometric
    return Frame(samples, photometric, fmt.bits_stored, version("pylibjpeg-rle"))


def _deflated(src: bytes, fmt: FrameFormat, limits: Limits) -> Frame:
    num_bytes = fmt.num_samples * fmt.bits_allocated // 8
    raw = inflate(src, wbits=-15, limits=limits, enough=num_bytes)[:num_bytes]
    samples = as_samples(raw, fmt.dtype().str, fmt, planar=fmt.planar)
    return Frame(samples, fmt.photometric, fmt.bits_stored, "zlib")


def _uncompressed(src: bytes, fmt: FrameFormat, limits: Limits) -> Frame:
    if fmt.bits_allocated % 8 or fmt.photometric == "YBR_FULL_422":
        raise RowError(Reason.UNSUPPORTED_PIXELS, "encapsulated pixels of this layout are not supported")
    num_bytes = fmt.num_samples * fmt.bits_allocated // 8
    samples = as_samples(src[:num_bytes], fmt.dtype().str, fmt, planar=fmt.planar)
    return Frame(samples, fmt.photometric, fmt.bits_stored, "native")


_CODECS: dict[str, Codec] = {
    JPEG_BASELINE: _jpeg,
    JPEG_EXTENDED: _jpeg,
    JPEG_LOSSLESS: _jpeg,
    JPEG_LOSSLESS_SV1: _jpeg,
    **dict.fromkeys(JPEG_LS, _jpeg_ls),
    **dict.fromkeys((*JPEG_2000, *HTJ2K), decode_jpeg2000),
    RLE: _rle,
    DEFLATED_FRAME: _deflated,
    ENCAPSULATED: _uncompressed,
}
