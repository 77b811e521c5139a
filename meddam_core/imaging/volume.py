"""NIfTI volumes (.nii, .nii.gz) -> one axial slice as it is shown on screen.

The volume is brought into canonical orientation (RAS+), then cut across its third axis; the slice is laid out as
radiologists look at it: image left is the patient's right, image top is anterior ("L\\\\P", as a standard axial DICOM
slice). `axial_slice` does the same to a label map, so that image and mask stay together.

Arrays: X, Y, Z of the canonical volume; H rows, W columns of the slice.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from typing import Any

import nibabel
import numpy as np
from numpy.typing import NDArray

from meddam_core.imaging.decoded import Decoded
from meddam_core.imaging.frames import to_unsigned
from meddam_core.imaging.limits import Limits, inflate
from meddam_core.records import Reason, Rescale, RowError

_HEADER_BYTES = 540
"""Enough for the NIfTI-1 (348) and the NIfTI-2 header."""
_FILE_ORDER = np.array([[0, 1], [1, 1], [2, 1]])
_MM = {"meter": 1000.0, "mm": 1.0, "micron": 0.001}


def decode_nifti(data: bytes, *, frame: int | None, limits: Limits) -> Decoded:
    """Slice `frame` of a NIfTI volume; of a series of volumes, slice + number of slices x volume. Raises RowError."""
    if frame is None:
        raise RowError(Reason.BAD_ANNOTATION, "a NIfTI volume needs a slice number: name the frame")
    volume = open_nifti(data, limits)
    num_slices = volume.values_XYZT.shape[2]
    num_frames = num_slices * volume.values_XYZT.shape[3]
    limits.check_picture(rows=1, columns=1, num_frames=num_frames)
    if not 0 <= frame < num_frames:
        raise RowError(Reason.BAD_ANNOTATION, f"frame {frame} of a volume with {num_frames} slices")
    values_XYZ = volume.values_XYZT[..., frame // num_slices]
    pixels = _samples(axial_slice(values_XYZ, frame % num_slices))
    stored, bits, shift = to_unsigned(pixels, 8 * pixels.dtype.itemsize)
    colour = stored.ndim == 3
    intercept = volume.intercept - volume.slope * shift
    return Decoded(
        stored=stored,
        stored_bits=bits,
        rescale=None if colour else Rescale(slope=volume.slope, intercept=intercept),
        photometric="RGB" if colour else "MONOCHROME2",
        decoder=f"nibabel {nibabel.__version__}",
        pixel_spacing_mm=volume.spacing_mm,
        orientation="L\\P" if volume.oriented else None,
        num_frames=num_frames,
        frame=frame,
    )


@dataclass(frozen=True, slots=True)
class Volume:
    """A NIfTI volume in canonical orientation, as a view of the file's own values."""

    values_XYZT: NDArray[Any]
    """Values as they are in the file, not yet scaled; T is 1 for a single volume."""
    slope: float
    intercept: float
    spacing_mm: tuple[float, float] | None
    """(row, column) spacing of an axial slice."""
    oriented: bool
    """Whether the file says how the patient lies; without that, axes are taken in file order."""


def open_nifti(data: bytes, limits: Limits) -> Volume:
    """The volume in .nii or .nii.gz `data`; sizes are checked before reading. Raises RowError."""
    if data[:2] == b"\x1f\x8b":
        data = inflate(data, wbits=31, limits=limits)
    kind: Any = nibabel.Nifti2Header if data[4:8] == b"n+2\x00" else nibabel.Nifti1Header
    header = kind.from_fileobj(io.BytesIO(data[:_HEADER_BYTES]), check=True)
    shape, dtype = header.get_data_shape(), header.get_data_dtype()
    if not 2 <= len(shape) <= 7 or min(shape) < 1 or bytes(header["magic"]).startswith(b"ni1"):
        raise RowError(Reason.NOT_AN_IMAGE, "a NIfTI file without a picture of its own")
    num_bytes, start = math.prod(shape) * dtype.itemsize, int(header["vox_offset"])
    limits.check_inflated(num_bytes)
    if start < 0 or start + num_bytes > len(data):
        raise RowError(Reason.CORRUPT, "the volume is shorter than its header says")
    shape_XYZT = (*shape[:3], *(1,) * (3 - len(shape)), math.prod(shape[3:]))
    values = np.ndarray(shape_XYZT, dtype, buffer=data, offset=start, order="F")
    affine = header.get_best_affine()
    oriented = bool(header["qform_code"] or header["sform_code"]) and bool(np.isfinite(affine).all())
    axes = nibabel.io_orientation(affine) if oriented else _FILE_ORDER  # type: ignore[no-untyped-call]
    if np.isnan(axes).any():
        raise RowError(Reason.CORRUPT, "the volume's orientation is not a rotation")
    canonical = nibabel.apply_orientation(values, axes)  # type: ignore[no-untyped-call]
    limits.check_picture(rows=canonical.shape[1], columns=canonical.shape[0])
    slope, intercept = header.get_slope_inter()
    return Volume(canonical, *_scaling(slope, intercept), _spacing(header, axes), oriented)


def axial_slice(volume_XYZ: NDArray[Any], index: int) -> NDArray[Any]:
    """(H, W): slice `index` of a canonical volume as shown on screen, left is the patient's right, top is anterior."""
    return volume_XYZ[::-1, ::-1, index].swapaxes(0, 1)


def _samples(values_HW: NDArray[Any]) -> NDArray[Any]:
    """(H, W) integers, or (H, W, 3) uint8 for NIfTI's RGB types, C-contiguous."""
    if values_HW.dtype.names:
        return np.stack([values_HW[name] for name in ("R", "G", "B")], axis=-1)
    if values_HW.dtype.kind == "f":
        if not np.isfinite(values_HW).all() or (values_HW != np.rint(values_HW)).any():
            raise RowError(Reason.UNSUPPORTED_PIXELS, "floating-point pixels don't fit in 16 bits")
        values_HW = values_HW.astype(np.int64)
    if values_HW.dtype.kind not in "ui":
        raise RowError(Reason.UNSUPPORTED_PIXELS, "pixels of this kind are not supported")
    return np.ascontiguousarray(values_HW)


def _scaling(slope: float | None, intercept: float | None) -> tuple[float, float]:
    """NIfTI's scl_slope of 0 or nan means: not scaled; nibabel gives None for it."""
    return (1.0, 0.0) if slope is None or intercept is None else (float(slope), float(intercept))


def _spacing(header: Any, axes: NDArray[Any]) -> tuple[float, float] | None:
    zooms = [float(z) for z in header.get_zooms()[:3]]
    by_axis = {int(axis): zooms[i] for i, (axis, _) in enumerate(axes[: len(zooms)])}
    row, column = by_axis.get(1, 0.0), by_axis.get(0, 0.0)
    unit = _MM.get(header.get_xyzt_units()[0], 1.0)
    row, column = row * unit, column * unit
    return (row, column) if all(1e-5 < z < 1000 for z in (row, column)) else None
