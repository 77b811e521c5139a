"""DICOM files made for tests, and those that pydicom's wheel carries."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence
from pydicom.uid import UID, ExplicitVRLittleEndian

SHARED = Path(__file__).parents[3].parent / "shared" / "data" / "real"
CT_CLASS = "1.2.840.10008.5.1.4.1.1.2"
PHI = {
    "PatientName": "Quxzyname^Testperson",
    "PatientID": "QUXZYID-4711",
    "PatientBirthDate": "19410203",
    "StudyDate": "20190405",
    "AccessionNumber": "QUXZYACC99",
    "InstitutionName": "Quxzy Hospital",
    "ReferringPhysicianName": "Quxzyref^Doctor",
    "StudyInstanceUID": "1.2.826.0.1.3680043.8.498.1111111",
    "SeriesInstanceUID": "1.2.826.0.1.3680043.8.498.2222222",
    "SOPInstanceUID": "1.2.826.0.1.3680043.8.498.3333333",
    "StudyDescription": "Quxzydescription",
}


def bundled(name: str) -> bytes:
    """A file of pydicom's wheel; nothing is downloaded."""
    path = get_testdata_file(name, download=False)
    assert isinstance(path, str), name
    return Path(path).read_bytes()


def dataset(pixels: NDArray[Any] | None, **elements: Any) -> Dataset:
    """A dataset with consistent group 0028 for `pixels` (F, H, W) or (H, W[, 3]); `elements` override."""
    ds = Dataset()
    ds.SOPClassUID = CT_CLASS
    ds.Modality = "CT"
    for keyword, value in PHI.items():
        setattr(ds, keyword, value)
    if pixels is not None:
        colour = pixels.ndim >= 3 and pixels.shape[-1] == 3
        spatial = pixels.shape[:-1] if colour else pixels.shape
        ds.Rows, ds.Columns = spatial[-2:]
        if len(spatial) == 3:
            ds.NumberOfFrames = spatial[0]
        ds.SamplesPerPixel = 3 if colour else 1
        if colour:
            ds.PlanarConfiguration = 0
        ds.PhotometricInterpretation = "RGB" if colour else "MONOCHROME2"
        ds.BitsAllocated = ds.BitsStored = 8 * pixels.dtype.itemsize
        ds.HighBit = ds.BitsStored - 1
        ds.PixelRepresentation = int(pixels.dtype.kind == "i")
        ds.PixelData = pixels.tobytes()
        ds["PixelData"].VR = "OW" if pixels.dtype.itemsize > 1 else "OB"
    for keyword, value in elements.items():
        setattr(ds, keyword, value)
    return ds


def file_bytes(ds: Dataset, syntax: str = ExplicitVRLittleEndian, frames: list[bytes] | None = None) -> bytes:
    """A whole file. frames: compressed ones, which become the encapsulated pixel data."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = UID(syntax)
    meta.MediaStorageSOPClassUID = ds.get("SOPClassUID", CT_CLASS)
    meta.MediaStorageSOPInstanceUID = PHI["SOPInstanceUID"]
    if frames is not None:
        ds.PixelData = encapsulate(frames)
        ds["PixelData"].VR = "OB"
        ds["PixelData"].is_undefined_length = True
    whole = FileDataset(None, ds, file_meta=meta, preamble=b"\0" * 128)  # type: ignore[arg-type]
    out = io.BytesIO()
    whole.save_as(out, enforce_file_format=True)
    return out.getvalue()


def dicom(pixels: NDArray[Any] | None, **elements: Any) -> bytes:
    """An uncompressed file of `pixels`."""
    return file_bytes(dataset(pixels, **elements))


def item(**elements: Any) -> Sequence:
    """A sequence of one item."""
    ds = Dataset()
    for keyword, value in elements.items():
        setattr(ds, keyword, value)
    return Sequence([ds])


def ct_phantom(side: int = 64) -> NDArray[np.int16]:
    """HU of a round body in air, with lung and bone, in a scanner's circle of padding (-2000)."""
    y, x = np.mgrid[:side, :side] - side / 2
    r = np.hypot(x, y) / side
    hu = np.where(r < 0.38, 40, -1000)
    hu = np.where(np.hypot(x - side * 0.15, y) / side < 0.12, -800, hu)
    hu = np.where(np.hypot(x + side * 0.15, y) / side < 0.06, 1000, hu)
    return np.where(r > 0.48, -2000, hu).astype(np.int16)
