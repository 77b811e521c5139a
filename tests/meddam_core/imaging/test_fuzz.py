"""Any bytes give a picture or a RowError, never another exception: bundled files, cut, flipped and mixed."""

from __future__ import annotations

import gzip
import io
from functools import cache

import nibabel
import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from meddam_core.imaging.decode import decode
from meddam_core.imaging.limits import Limits
from meddam_core.imaging.render import render
from meddam_core.records import RowError
from tests.meddam_core.imaging.dicom_files import bundled

DICOM = (
    "CT_small.dcm", "MR_small_RLE.dcm", "MR_small_jp2klossless.dcm", "MR_small_bigendian.dcm", "MR_small_implicit.dcm",
    "SC_rgb_small_odd_jpeg.dcm", "SC_rgb_rle_16bit_2frame.dcm", "JPEGLSNearLossless_16.dcm", "SC_rgb_jpeg_gdcm.dcm",
    "rtdose_rle.dcm", "image_dfl.dcm", "SC_ybr_full_422_uncompressed.dcm", "reportsi.dcm", "badVR.dcm", "no_meta.dcm",
)  # fmt: skip
RASTER = ("PNG", "JPEG", "TIFF", "WEBP", "BMP", "GIF")
LIMITS = Limits(max_pixels=4_000_000, max_inflated_bytes=64_000_000)


@cache
def source(name: str) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (24, 31, 3), np.uint8)
    if name in RASTER:
        out = io.BytesIO()
        Image.fromarray(pixels).save(out, name)
        return out.getvalue()
    if name.startswith("nifti"):
        data = bytes(nibabel.Nifti1Image(pixels[..., :3].astype(np.int16), np.diag([-1, 2, 3, 1])).to_bytes())
        return gzip.compress(data, mtime=0) if name.endswith("gz") else data
    return bundled(name)


def outcome(data: bytes, frame: int | None) -> None:
    try:
        decoded = decode(data, name="x.dcm", frame=frame, limits=LIMITS)
    except RowError:
        return
    assert decoded.stored.dtype in (np.uint8, np.uint16)
    assert render(decoded).shape == (decoded.height, decoded.width, 3)


@given(
    name=st.sampled_from((*DICOM, *RASTER, "nifti", "nifti.gz")),
    cut=st.one_of(st.none(), st.floats(0, 1)),
    flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255), st.booleans()), max_size=12),
    frame=st.sampled_from([None, 0, 1, 999]),
)
@settings(max_examples=700, deadline=None)
@example(name="MR_small_RLE.dcm", cut=0.97, flips=[], frame=None)
def test_damaged_files(name: str, cut: float | None, flips: list[tuple[float, int, bool]], frame: int | None) -> None:
    data = bytearray(source(name))
    if cut is not None:
        del data[int(len(data) * cut) :]
    for where, value, in_header in flips:
        if data:
            data[int(where * (min(len(data), 1500) if in_header else len(data)))] = value
    outcome(bytes(data), frame)


@given(
    st.binary(max_size=600),
    st.sampled_from([b"", b"\0" * 128 + b"DICM", b"\x89PNG\r\n\x1a\n", b"II*\0", b"\xff\xd8\xff"]),
)
@settings(max_examples=300, deadline=None)
def test_noise(noise: bytes, head: bytes) -> None:
    outcome(head + noise, None)


def test_run_lengths_that_make_the_rle_decoder_panic() -> None:
    """The decoder's panic is no Exception, and would end a worker."""
    data = bytearray(bundled("MR_small_RLE.dcm"))
    at = data.index(b"\x02\x00\x00\x00\x40\x00\x00\x00")  # two segments, the first at 64
    for shift in range(64, 4000, 7):
        damaged = bytearray(data)
        damaged[at + shift] = 0x81  # the longest run
        damaged[at + shift + 2] = 0x7F
        outcome(bytes(damaged), None)
