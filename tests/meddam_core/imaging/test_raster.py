"""Pictures: bit depths, colour profiles, orientation, alpha, pages, and files that aren't what they say."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pydicom
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageCms

from meddam_core.imaging.decode import decode
from meddam_core.imaging.limits import Limits
from meddam_core.imaging.render import render
from meddam_core.records import Reason, RowError

RGB = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
DEEP = np.random.default_rng(1).integers(0, 1 << 16, (20, 30), np.uint16)


def encoded(pixels: NDArray[Any] | Image.Image, fmt: str, **options: Any) -> bytes:
    out = io.BytesIO()
    (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).save(out, fmt, **options)
    return out.getvalue()


@pytest.mark.parametrize("fmt", ["PNG", "TIFF", "BMP"])
def test_lossless_colour(fmt: str) -> None:
    decoded = decode(encoded(RGB, fmt))
    assert np.array_equal(decoded.stored, RGB)
    assert (decoded.photometric, decoded.stored_bits, decoded.rescale) == ("RGB", 8, None)
    assert np.array_equal(render(decoded), RGB)


def test_lossless_webp() -> None:
    assert np.array_equal(decode(encoded(RGB, "WEBP", lossless=True)).stored, RGB)


@pytest.mark.parametrize("fmt", ["PNG", "TIFF"])
@pytest.mark.parametrize("pixels", [DEEP, (DEEP >> 8).astype(np.uint8)])
def test_lossless_grey(fmt: str, pixels: NDArray[Any]) -> None:
    decoded = decode(encoded(pixels, fmt))
    assert np.array_equal(decoded.stored, pixels)
    assert decoded.stored.dtype == pixels.dtype
    assert decoded.photometric == "MONOCHROME2"


@pytest.mark.parametrize("suffix", [".png", ".tiff"])
def test_colour_of_16_bits_keeps_them(suffix: str) -> None:
    deep = np.random.default_rng(2).integers(0, 1 << 16, (8, 9, 3), np.uint16)
    decoded = decode(cv2.imencode(suffix, deep[..., ::-1])[1].tobytes())
    assert np.array_equal(decoded.stored, deep)
    assert np.abs(render(decoded).astype(int) - deep / 257).max() <= 0.5


def test_big_endian_tiff_and_bigtiff() -> None:
    grey = (DEEP >> 8).astype(np.uint8)
    assert np.array_equal(decode(encoded(grey, "TIFF", big_tiff=True)).stored, grey)
    swapped = Image.frombytes("I;16B", (30, 20), DEEP.astype(">u2").tobytes())
    assert np.array_equal(decode(encoded(swapped, "TIFF")).stored, DEEP)


@pytest.mark.parametrize("tag", range(1, 9))
@pytest.mark.parametrize("grey", [True, False])
def test_exif_orientation(tag: int, grey: bool) -> None:
    pixels = RGB[..., 0] if grey else RGB
    exif = Image.Exif()
    exif[274] = tag
    data = encoded(pixels, "PNG", exif=exif)
    from PIL import ImageOps

    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    assert np.array_equal(decode(data).stored, expected)


def test_unreadable_exif_is_named_and_ignored() -> None:
    decoded = decode(encoded(RGB, "PNG", exif=b"Exif\0\0nonsense"))
    assert np.array_equal(decoded.stored, RGB)
    assert "unreadable exif ignored" in decoded.decoder


def test_icc_profile_is_applied() -> None:
    crayons = (Path(pydicom.__file__).parent / "data" / "test_files" / "crayons.icc").read_bytes()
    image = Image.fromarray(RGB)
    expected = ImageCms.profileToProfile(
        image, ImageCms.ImageCmsProfile(io.BytesIO(crayons)), ImageCms.createProfile("sRGB")
    )
    decoded = decode(encoded(RGB, "PNG", icc_profile=crayons))
    assert np.array_equal(decoded.stored, np.asarray(expected))
    assert not np.array_equal(decoded.stored, RGB)
    assert "icc to srgb" in decoded.decoder


def test_broken_icc_profile_is_named_and_ignored() -> None:
    decoded = decode(encoded(RGB, "PNG", icc_profile=b"not a profile" * 20))
    assert np.array_equal(decoded.stored, RGB)
    assert "unusable icc ignored" in decoded.decoder


def test_alpha_is_dropped_and_palettes_are_resolved() -> None:
    alpha = np.dstack([RGB, RGB[..., :1]])
    assert np.array_equal(decode(encoded(alpha, "PNG")).stored, RGB)
    palette = Image.fromarray(RGB).quantize(200)
    assert np.array_equal(decode(encoded(palette, "PNG")).stored, np.asarray(palette.convert("RGB")))
    mask = Image.fromarray(((RGB[..., 0] > 99) * 255).astype(np.uint8)).convert("1")
    assert np.array_equal(decode(encoded(mask, "PNG")).stored, (RGB[..., 0] > 99) * 255)
    assert decode(encoded(mask, "GIF")).stored.ndim == 2


def test_cmyk_jpeg() -> None:
    flat = np.full((16, 16, 3), (200, 60, 30), np.uint8)
    data = encoded(Image.fromarray(flat).convert("CMYK"), "JPEG", quality=100)
    assert np.abs(decode(data).stored.astype(int) - flat).max() <= 4


def test_white_is_zero_tiff() -> None:
    out = encoded(DEEP, "TIFF")
    inverted = out.replace(struct.pack("<HHIHH", 262, 3, 1, 1, 0), struct.pack("<HHIHH", 262, 3, 1, 0, 0))
    assert inverted != out
    decoded = decode(inverted)
    assert decoded.photometric == "MONOCHROME1"
    plain = decode(out)
    assert np.abs(255 - render(decoded).astype(int) - render(plain)).max() <= 1


def test_pages() -> None:
    pages = [Image.fromarray(np.roll(RGB, i, axis=0)) for i in range(3)]
    data = encoded(pages[0], "TIFF", save_all=True, append_images=pages[1:])
    decoded = decode(data, frame=2)
    assert (decoded.num_frames, decoded.frame) == (3, 2)
    assert np.array_equal(decoded.stored, np.roll(RGB, 2, axis=0))
    with pytest.raises(RowError) as error:
        decode(data, frame=3)
    assert error.value.reason == Reason.BAD_ANNOTATION


def test_floating_point_tiff() -> None:
    whole = np.array([[1.0, 1000.0]], np.float32)
    assert decode(encoded(whole, "TIFF")).stored.tolist() == [[1, 1000]]
    with pytest.raises(RowError) as error:
        decode(encoded(whole + np.float32(0.5), "TIFF"))
    assert error.value.reason == Reason.UNSUPPORTED_PIXELS


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    ihdr = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", ihdr) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("side", [20_000, 60_000, 2**31 - 1])
def test_bombs_are_refused_by_their_header(side: int) -> None:
    with pytest.raises(RowError) as error:
        decode(png_header(side, side))
    assert error.value.reason in (Reason.TOO_LARGE, Reason.CORRUPT)


def test_limits_are_the_callers() -> None:
    assert decode(encoded(RGB, "PNG"), limits=Limits(max_pixels=600)).width == 30
    for limits in (Limits(max_pixels=599), Limits(max_side_px=29), Limits(max_file_bytes=100)):
        with pytest.raises(RowError) as error:
            decode(encoded(RGB, "PNG"), limits=limits)
        assert error.value.reason == Reason.TOO_LARGE


@pytest.mark.parametrize("fmt", ["PNG", "JPEG", "TIFF", "WEBP", "BMP", "GIF"])
def test_cut_short(fmt: str) -> None:
    data = encoded(RGB, fmt)
    with pytest.raises(RowError) as error:
        decode(data[: len(data) * 2 // 3])
    assert error.value.reason == Reason.CORRUPT


@pytest.mark.parametrize("fmt", ["PNG", "JPEG"])
def test_the_content_counts_not_the_name(fmt: str) -> None:
    assert decode(encoded(RGB, fmt), name="scan.dcm").width == 30


@pytest.mark.parametrize(
    ("data", "name", "reason"),
    [
        (b"", "a.png", Reason.CORRUPT),
        (b"hello, this is a text", "notes.txt", Reason.NOT_AN_IMAGE),
        (b"hello, this is a text", "film.DCM", Reason.CORRUPT),
        (b"%PDF-1.7 ...", "report.pdf", Reason.NOT_AN_IMAGE),
        (b"PK\x03\x04" + bytes(40), "a.zip", Reason.NOT_AN_IMAGE),
        (b"Salted__" + bytes(64), "film.dcm", Reason.ENCRYPTED),
        (b"\x30\x82\x01\x00\x06\x09\x2a\x86\x48\x86\xf7\x0d\x01\x07\x03" + bytes(200), "film.dcm", Reason.ENCRYPTED),
        (zlib.compress(b"x" * 100, wbits=31), "a.gz", Reason.NOT_AN_IMAGE),
    ],
)
def test_other_files(data: bytes, name: str, reason: Reason) -> None:
    with pytest.raises(RowError) as error:
        decode(data, name=name)
    assert error.value.reason == reason


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB"])
def test_alpha_is_kept_apart_and_upright(mode: str) -> None:
    alpha = np.zeros((6, 4), np.uint8)
    alpha[1:3, 2:] = 255
    picture = Image.new("RGB" if mode in ("RGB", "P") else mode, (4, 6), (90,) * {"LA": 2, "RGBA": 4}.get(mode, 3))
    exif = Image.Exif()
    exif[274] = 6
    sink = io.BytesIO()
    if mode in ("RGBA", "LA"):
        picture.putalpha(Image.fromarray(alpha))
        picture.save(sink, "PNG", exif=exif)
    elif mode == "P":
        indexed = Image.fromarray((alpha > 0).astype(np.uint8)).convert("P")
        indexed.save(sink, "PNG", transparency=0, exif=exif)
    else:
        picture.save(sink, "PNG", exif=exif)
    decoded = decode(sink.getvalue())
    if mode == "RGB":
        assert decoded.alpha_HW is None
    else:
        assert decoded.alpha_HW is not None and decoded.alpha_HW.shape == (decoded.height, decoded.width) == (4, 6)
        assert (decoded.alpha_HW == np.rot90(alpha, -1)).all()


def test_the_quick_way_for_plain_pngs_differs_in_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole, cut short and with a bit turned over at every place: the same pixels, or the same reason."""
    pytest.importorskip("imagecodecs")
    rows = np.sort(np.random.default_rng(3).integers(0, 256, (9, 14, 4), np.uint8), axis=1)
    files = [encoded(part, "PNG") for part in (rows, rows[..., :3], rows[..., 0])]
    files += [files[0][:end] for end in range(0, len(files[0]), 7)]
    files += [files[0][:at] + bytes([files[0][at] ^ 1]) + files[0][at + 1 :] for at in range(len(files[0]))]
    quick = [_outcome(data) for data in files]
    assert quick[0][1].startswith("imagecodecs"), "the quick way was not taken"
    monkeypatch.setattr("meddam_core.imaging.raster._PNG_DECODE", None)
    assert [facts for facts, _ in quick] == [facts for facts, _ in map(_outcome, files)]


def _outcome(data: bytes) -> tuple[Any, str]:
    try:
        got = decode(data)
    except RowError as error:
        return (error.reason, error.detail), ""
    alpha = None if got.alpha_HW is None else got.alpha_HW.tolist()
    facts = (got.stored.tolist(), got.stored.dtype, alpha, got.photometric, got.stored_bits, got.modality)
    return facts, got.decoder
