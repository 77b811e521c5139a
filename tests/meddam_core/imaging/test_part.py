"""A part of a picture has the pixels of the whole, however the file is compressed."""

from __future__ import annotations

import io

import numpy as np
import pytest
from openjpeg.utils import encode_array
from PIL import Image
from pydicom.uid import JPEG2000Lossless

from meddam_core.imaging import jpeg2000
from meddam_core.imaging.decode import decode
from meddam_core.imaging.render import render, render_stored
from meddam_core.records import Box, Reason, RowError
from tests.meddam_core.imaging.dicom_files import bundled, dataset, file_bytes

NAMES = (
    "CT_small.dcm", "MR_small_RLE.dcm", "MR_small_jp2klossless.dcm", "MR_small_bigendian.dcm", "examples_jpeg2k.dcm",
    "J2K_pixelrep_mismatch.dcm", "GDCMJ2K_TextGBR.dcm", "JPEG2000.dcm", "examples_palette.dcm", "liver_1frame.dcm",
    "examples_ybr_color.dcm", "SC_ybr_full_422_uncompressed.dcm", "SC_rgb_small_odd_big_endian.dcm", "693_J2KI.dcm",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("where", [(0.0, 0.0, 1.0, 1.0), (0.3, 0.1, 0.9, 0.5), (0.5, 0.5, 0.5, 0.5)])
def test_a_part_of_every_kind(name: str, where: tuple[float, float, float, float]) -> None:
    whole = decode(bundled(name))
    x0, y0 = int(where[0] * whole.width), int(where[1] * whole.height)
    box = x0, y0, max(x0 + 1, int(where[2] * whole.width)), max(y0 + 1, int(where[3] * whole.height))
    part = decode(bundled(name), box=box)
    expected = whole.stored[box[1] : box[3], box[0] : box[2]]
    if "J2KI" in name:  # irreversible wavelets: the last bit may round the other way
        assert np.abs(part.stored.astype(int) - expected).max() <= 1
    else:
        assert np.array_equal(part.stored, expected)
    assert (part.rescale, part.window, part.padding, part.stored_bits) == (
        whole.rescale,
        whole.window,
        whole.padding,
        whole.stored_bits,
    )


def test_a_part_of_a_film_in_tiles_of_code_blocks() -> None:
    film = np.random.default_rng(0).integers(0, 4096, (500, 700), np.uint16)
    ds = dataset(film, Modality="DX", BitsStored=12, HighBit=11, WindowCenter=2000, WindowWidth=3000)
    data = file_bytes(ds, JPEG2000Lossless, [bytes(encode_array(film, bits_stored=12, photometric_interpretation=2))])
    assert jpeg2000._library() is not None, "this wheel's OpenJPEG exports its functions"
    box = (123, 77, 301, 402)
    part = decode(data, box=box)
    assert np.array_equal(part.stored, film[77:402, 123:301])
    whole = decode(data)
    assert np.array_equal(render(part, "header"), render_stored(whole.stored, whole, "header", box=box))


def test_without_exported_functions_the_whole_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = decode(bundled("examples_jpeg2k.dcm"), box=(10, 20, 50, 60)).stored
    monkeypatch.setattr(jpeg2000, "_library", lambda: None)
    assert np.array_equal(decode(bundled("examples_jpeg2k.dcm"), box=(10, 20, 50, 60)).stored, expected)


@pytest.mark.parametrize(
    ("box", "reason"),
    [
        ((0, 0, 129, 10), Reason.BOX_OUTSIDE),
        ((-1, 0, 10, 10), Reason.BOX_OUTSIDE),
        ((5, 5, 5, 10), Reason.BOX_EMPTY),
        ((9, 5, 5, 10), Reason.BOX_EMPTY),
    ],
)
def test_boxes_that_are_no_part(box: Box, reason: Reason) -> None:
    out = io.BytesIO()
    Image.new("L", (128, 128)).save(out, "PNG")
    for data in (bundled("CT_small.dcm"), out.getvalue()):
        with pytest.raises(RowError) as error:
            decode(data, box=box)
        assert error.value.reason == reason


def test_damaged_codestreams_end_in_a_reason() -> None:
    data = bundled("MR_small_jp2klossless.dcm")
    start = data.index(b"\xff\x4f\xff\x51")
    rng = np.random.default_rng(0)
    for _ in range(300):
        damaged = bytearray(data)
        for at in rng.integers(start, len(data), 5):
            damaged[at] = rng.integers(256)
        try:
            part = decode(bytes(damaged), box=(5, 5, 50, 40))
        except RowError:
            continue
        assert part.stored.shape == (35, 45)
