"""What is shown: bone brighter than air, films the same way up in grey, presets, padding, previews."""

from __future__ import annotations

import dataclasses
import io
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PilImage

from meddam_core import records
from meddam_core.imaging.decode import decode
from meddam_core.imaging.deidentify import image_fields
from meddam_core.imaging.png import decode_png, encode_png, preview_jpeg
from meddam_core.imaging.render import render, render_shared, render_stored, resolve_window
from meddam_core.imaging.windows import PRESETS, THREE_WINDOW, default_window, physical_values, window_curve
from meddam_core.records import Reason, RowError, Window
from tests.meddam_core.imaging.dicom_files import bundled, ct_phantom, dicom

HU = ct_phantom(128)
BONE, SOFT, LUNG, AIR, PADDING = (v == HU for v in (1000, 40, -800, -1000, -2000))


def ct(**elements: Any) -> bytes:
    given = {"RescaleSlope": 1, "RescaleIntercept": -1024, "PixelPaddingValue": -976, **elements}
    return dicom((HU + 1024).astype(np.int16), **given)


def row(decoded: Any, **fields: Any) -> records.Image:
    return records.Image(image_id=1, image_key="k", dataset="test", **{**image_fields(decoded), **fields})


@pytest.mark.parametrize("window", [None, THREE_WINDOW, *PRESETS])
@pytest.mark.parametrize("slope", [1, -1, 0.5])
def test_bone_is_brighter_than_air(window: str | None, slope: float) -> None:
    decoded = decode(dicom((HU / slope).astype(np.int16), RescaleSlope=slope, RescaleIntercept=0))
    image_HWC = render(decoded, window)
    for channel in range(3):
        assert image_HWC[BONE][:, channel].min() > image_HWC[AIR][:, channel].max()


@pytest.mark.parametrize("name", ["CT_small.dcm", "J2K_pixelrep_mismatch.dcm"])
def test_bone_is_brighter_than_air_in_real_slices(name: str) -> None:
    decoded = decode(bundled(name))
    hu = physical_values(decoded, decoded.stored)
    for window in (None, THREE_WINDOW, "lung", "soft_tissue", "bone"):
        image_HWC = render(decoded, window)
        assert image_HWC[hu > 700].min() > image_HWC[hu < -800].max()


def test_levels_of_a_linear_window() -> None:
    """PS3.3 C.11.2.1.2.1: black up to c - 0.5 - (w - 1) / 2, white from c - 0.5 + (w - 1) / 2."""
    lung = render(decode(ct()), "lung")[..., 0]
    assert set(lung[SOFT]) == {round(255 * (((40 + 600.5) / 1499) + 0.5)) if 40 < 149 else 255}
    assert set(lung[AIR]) == {round(255 * ((-1000 + 600.5) / 1499 + 0.5))}
    assert set(lung[PADDING]) == {0}


def test_three_windows_in_three_colours() -> None:
    image_HWC = render(decode(ct()), THREE_WINDOW)
    for channel, name in enumerate(("lung", "soft_tissue", "bone")):
        assert np.array_equal(image_HWC[..., channel], render(decode(ct()), name)[..., 0])


@pytest.mark.parametrize("window", [None, (2000, 1500)])
def test_a_monochrome1_film_equals_its_monochrome2_twin(window: tuple[int, int] | None) -> None:
    film = np.random.default_rng(0).normal(2000, 300, (50, 60)).clip(0, 4095).astype(np.uint16)
    header: dict[str, Any] = {"Modality": "DX", "BitsStored": 12, "HighBit": 11}
    two, one = dict(header), dict(header)
    if window:
        center, width = window
        two.update(WindowCenter=center, WindowWidth=width)
        one.update(WindowCenter=4096 - center, WindowWidth=width)  # mirrored about the window's half-open middle
    bright = render(decode(dicom(film, **two)))
    dark = render(decode(dicom(4095 - film, PhotometricInterpretation="MONOCHROME1", **one)))
    assert np.array_equal(bright, dark)
    assert bright.std() > 30


def test_a_row_renders_as_its_source() -> None:
    for name in ("CT_small.dcm", "examples_palette.dcm", "examples_overlay.dcm", "SC_rgb_rle_16bit.dcm"):
        decoded = decode(bundled(name))
        assert np.array_equal(render(row(decoded)), render(decoded))
        assert np.array_equal(render_shared(row(decoded)), render(decoded))
        shown = np.asarray(PilImage.open(io.BytesIO(row(decoded).preview.bytes or b"")))
        assert max(shown.shape) <= 256


def test_a_part_looks_as_in_the_whole() -> None:
    decoded = decode(bundled("examples_overlay.dcm"))
    part = render_stored(decoded.stored, decoded, box=(100, 50, 180, 90))
    assert np.array_equal(part, render(decoded)[50:90, 100:180])


def test_presets_need_hu() -> None:
    decoded = decode(bundled("MR_small.dcm"))
    for window in ("lung", THREE_WINDOW):
        with pytest.raises(RowError) as error:
            render(decoded, window)
        assert error.value.reason == Reason.UNSUPPORTED_PIXELS
    with pytest.raises(ValueError, match="soft_tissue"):
        render(decode(ct()), "lungs")


def test_colour_passes_through_every_window() -> None:
    decoded = decode(bundled("examples_rgb_color.dcm"))
    assert np.array_equal(render(decoded, "lung"), decoded.stored)
    assert resolve_window(decoded.stored, decoded, "lung") is None


@pytest.mark.parametrize(
    ("elements", "source"),
    [
        ({"WindowCenter": -600, "WindowWidth": 1600}, "header"),
        ({}, "preset:soft_tissue"),
        ({"Modality": "MR"}, "percentile"),
        ({"Modality": "MR", "WindowCenter": 900, "WindowWidth": 2000}, "header"),
        ({"Modality": "MR", "WindowCenter": 40000, "WindowWidth": 10}, "percentile"),
        ({"Modality": "MR", "WindowCenter": 15000, "WindowWidth": 60000}, "percentile"),
    ],
)
def test_default_window_and_its_source(elements: dict[str, Any], source: str) -> None:
    decoded = decode(ct(**elements))
    window = default_window(decoded.stored, decoded)
    assert window is not None
    assert window.source == source
    assert row(decoded).window == window


def test_percentiles_leave_padding_out() -> None:
    decoded = decode(ct(Modality="MR"))
    window = default_window(decoded.stored, decoded)
    assert window is not None
    assert window.center - window.width / 2 == pytest.approx(-1000)
    image_HWC = render(decoded)
    assert set(image_HWC[PADDING].ravel()) == {0}


@pytest.mark.parametrize("fill", [0, 1, 4095])
def test_flat_pictures_do_not_fail(fill: int) -> None:
    flat = np.full((4, 4), fill, np.uint16)
    assert render(decode(dicom(flat, Modality="MR"))).shape == (4, 4, 3)
    assert render(decode(dicom(flat, Modality="MR", PixelPaddingValue=fill))).max() == 0


def test_eight_bits_are_shown_as_stored() -> None:
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    assert np.array_equal(render(decode(dicom(ramp, Modality="US")))[..., 0], ramp)


@given(
    center=st.floats(-5000, 5000),
    width=st.floats(1, 10000),
    function=st.sampled_from(["LINEAR", "LINEAR_EXACT", "SIGMOID"]),
)
@settings(max_examples=200, deadline=None)
def test_window_functions_rise_from_0_to_1(center: float, width: float, function: Any) -> None:
    x = np.linspace(center - 20 * width - 1, center + 20 * width + 1, 201)
    shown = window_curve(x, Window(center=center, width=width, function=function))
    assert (np.diff(shown) >= 0).all()
    assert shown[0] == pytest.approx(0, abs=1e-9)
    assert shown[-1] == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
def test_window_functions_as_pydicom(function: Any) -> None:
    from pydicom.pixels import apply_windowing

    from tests.meddam_core.imaging.dicom_files import dataset

    values = np.arange(-200, 300, dtype=np.int16).reshape(20, 25)
    ds = dataset(values, WindowCenter=37, WindowWidth=113, VOILUTFunction=function)
    ds.file_meta = None  # type: ignore[assignment]
    low, high = -(2**15), 2**15 - 1
    expected = (apply_windowing(values, ds) - low) / (high - low)
    shown = window_curve(values, Window(center=37, width=113, function=function))
    assert np.allclose(shown, expected, atol=1e-12)


def test_widths_the_standard_forbids() -> None:
    for window in (Window(center=0, width=0.5), Window(center=0, width=0, function="SIGMOID")):
        with pytest.raises(ValueError, match="width"):
            window_curve(np.zeros(3), window)


# ---------------------------------------------------------------------------------------------------------------------
# PNG and preview


@given(seed=st.integers(0, 1000), deep=st.booleans(), colour=st.booleans(), h=st.integers(1, 40), w=st.integers(1, 40))
@settings(max_examples=60, deadline=None)
def test_png_is_lossless(seed: int, deep: bool, colour: bool, h: int, w: int) -> None:
    dtype = np.uint16 if deep else np.uint8
    shape = (h, w, 3) if colour else (h, w)
    pixels: Any = np.random.default_rng(seed).integers(0, np.iinfo(dtype).max + 1, shape, dtype)
    data = encode_png(pixels)
    again = decode_png(data)
    assert again.dtype == dtype
    assert np.array_equal(again, pixels)
    chunks, at = [], 8
    while at < len(data):
        chunks.append(data[at + 4 : at + 8])
        at += 12 + int.from_bytes(data[at : at + 4], "big")
    assert set(chunks) == {b"IHDR", b"IDAT", b"IEND"}
    if not (deep and colour):  # Pillow cuts those to 8 bits
        assert np.array_equal(np.asarray(PilImage.open(io.BytesIO(data))), pixels)


def test_png_of_other_arrays_is_refused() -> None:
    for pixels in (np.zeros((2, 2), np.int16), np.zeros((2, 2, 4), np.uint8), np.zeros(4, np.uint8)):
        with pytest.raises(ValueError, match="PNG holds"):
            encode_png(pixels)  # type: ignore[arg-type]


def test_broken_stored_pictures() -> None:
    data = encode_png(np.arange(600, dtype=np.uint16).reshape(20, 30))
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 0xFF
    for broken in (b"", b"JPEG", data[:-5], data[: len(data) // 2], bytes(flipped)):
        with pytest.raises(RowError) as error:
            decode_png(broken)
        assert error.value.reason == Reason.CORRUPT
    with pytest.raises(RowError) as error:
        render(row(decode(ct()), image=records.EncodedImage(bytes=None)))
    assert error.value.reason == Reason.NO_PIXELS


@pytest.mark.parametrize(("shape", "size"), [((10, 20), (20, 10)), ((512, 1024), (256, 128)), ((3000, 1), (1, 256))])
def test_preview_size(shape: tuple[int, int], size: tuple[int, int]) -> None:
    with PilImage.open(io.BytesIO(preview_jpeg(np.zeros((*shape, 3), np.uint8)))) as preview:
        assert preview.size == size
        assert preview.format == "JPEG"


def test_windows_of_a_recipe_are_trusted() -> None:
    decoded = decode(ct())
    wide = dataclasses.replace(decoded, window=Window(center=0, width=60000, source="recipe"))
    assert default_window(wide.stored, wide) == wide.window
