"""NIfTI: a slice looks as radiologists look at it, whatever order the file stores its axes in."""

from __future__ import annotations

import gzip
import itertools

import nibabel
import numpy as np
import pytest
from numpy.typing import NDArray

from meddam_core.imaging.decode import decode
from meddam_core.imaging.limits import Limits
from meddam_core.imaging.volume import axial_slice, open_nifti
from meddam_core.imaging.windows import physical_values
from meddam_core.records import Reason, RowError

X, Y, Z = 6, 5, 4
RAS = np.random.default_rng(0).integers(-1000, 1000, (X, Y, Z)).astype(np.int16)
RAS[0, :, :] = 1999  # the patient's left-most... x grows to the right of RAS, so index 0 is the patient's left
ZOOMS = np.array([0.5, 0.75, 3.0])


def nifti(ornt: NDArray[np.int64] | None = None, values: NDArray[np.generic] = RAS) -> bytes:
    image = nibabel.Nifti1Image(values, np.diag([*ZOOMS, 1]))
    image.header["sform_code"] = 1
    if ornt is not None:
        image = image.as_reoriented(ornt)
    return bytes(image.to_bytes())


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
@pytest.mark.parametrize("flips", [(1, 1, 1), (-1, 1, 1), (1, -1, -1)])
def test_any_axis_order_gives_the_same_slice(order: tuple[int, ...], flips: tuple[int, ...]) -> None:
    data = nifti(np.array(list(zip(order, flips, strict=True))))
    for frame in range(Z):
        decoded = decode(data, frame=frame)
        assert np.array_equal(physical_values(decoded, decoded.stored), RAS[::-1, ::-1, frame].T)
        assert decoded.pixel_spacing_mm == pytest.approx((0.75, 0.5))
        assert (decoded.orientation, decoded.num_frames, decoded.frame) == ("L\\P", Z, frame)


def test_sides() -> None:
    """x grows to the patient's right in RAS? No: RAS means towards Right; screen left is the patient's right."""
    decoded = decode(nifti(), frame=0)
    values = physical_values(decoded, decoded.stored)
    assert (values[:, -1] == 1999).all()  # x = 0, the left-most of the patient, is the last column on screen


def test_a_label_map_stays_with_its_image() -> None:
    labels = (RAS > 0).astype(np.uint8)
    ornt = np.array([[1, -1], [2, 1], [0, 1]])
    image = decode(nifti(ornt), frame=2)
    volume = open_nifti(nifti(ornt, labels), Limits())
    mask = axial_slice(volume.values_XYZT[..., 0], 2)
    assert np.array_equal(mask, physical_values(image, image.stored) > 0)


def test_scaling_is_kept_as_rescale() -> None:
    image = nibabel.Nifti1Image(RAS, np.diag([*ZOOMS, 1]))
    image.header.set_slope_inter(0.5, 10)
    decoded = decode(gzip.compress(image.to_bytes()), frame=1)
    expected = RAS[::-1, ::-1, 1].T * 0.5 + 10
    assert np.array_equal(physical_values(decoded, decoded.stored), expected)


def test_unoriented_volumes_say_so() -> None:
    image = nibabel.Nifti1Image(RAS, None)
    assert decode(image.to_bytes(), frame=0).orientation is None


def test_series_of_volumes_and_single_pictures() -> None:
    series = np.stack([RAS, RAS + 1], axis=3)
    decoded = decode(nifti(values=series), frame=Z + 2)
    assert decoded.num_frames == 2 * Z
    assert np.array_equal(physical_values(decoded, decoded.stored), RAS[::-1, ::-1, 2].T + 1)
    flat = nibabel.Nifti1Image(RAS[..., 0], np.diag([*ZOOMS, 1]))
    assert decode(flat.to_bytes(), frame=0).stored.shape == (Y, X)


def test_whole_numbers_in_floats_and_real_floats() -> None:
    decoded = decode(nifti(values=RAS.astype(np.float32)), frame=0)
    assert np.array_equal(physical_values(decoded, decoded.stored), RAS[::-1, ::-1, 0].T)
    with pytest.raises(RowError) as error:
        decode(nifti(values=RAS + np.float32(0.25)), frame=0)
    assert error.value.reason == Reason.UNSUPPORTED_PIXELS


@pytest.mark.parametrize("frame", [None, -1, Z])
def test_a_slice_must_be_named(frame: int | None) -> None:
    with pytest.raises(RowError) as error:
        decode(nifti(), frame=frame)
    assert error.value.reason == Reason.BAD_ANNOTATION


def test_sizes_are_checked_before_inflating() -> None:
    bomb = gzip.compress(nifti() + bytes(30_000_000))
    with pytest.raises(RowError) as error:
        decode(bomb, frame=0, limits=Limits(max_inflated_bytes=1_000_000))
    assert error.value.reason == Reason.TOO_LARGE
    claims = bytearray(nifti())
    claims[40:48] = np.array([3, 30000, 30000, 1000], "<i2").tobytes()
    with pytest.raises(RowError) as error:
        decode(bytes(claims), frame=0)
    assert error.value.reason == Reason.TOO_LARGE


def test_cut_short() -> None:
    for data in (nifti()[:-9], gzip.compress(nifti())[:-20]):
        with pytest.raises(RowError) as error:
            decode(data, frame=0)
        assert error.value.reason == Reason.CORRUPT
