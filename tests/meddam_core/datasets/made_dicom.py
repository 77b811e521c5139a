"""DICOM files as the miniature datasets of these tests need them: real ones, written by pydicom."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, DigitalXRayImageStorageForPresentation, ExplicitVRLittleEndian, generate_uid


def ct_slice(
    hounsfield_HW: NDArray[np.int16], *, patient_id: str, study_uid: str, series_uid: str, z_mm: float, number: int,
    spacing_mm: float = 0.7, cosines: tuple[float, ...] = (1, 0, 0, 0, 1, 0),
) -> bytes:  # fmt: skip
    """One axial CT slice: signed, with padding and the soft-tissue window that hides ground glass."""
    dataset = _dataset(CTImageStorage, "CT", patient_id, study_uid, series_uid, number)
    dataset.ImagePositionPatient = [-100, -100, z_mm]
    dataset.ImageOrientationPatient = list(cosines)
    dataset.PixelSpacing = [spacing_mm, spacing_mm]
    dataset.RescaleSlope, dataset.RescaleIntercept = 1, -1024
    dataset.WindowCenter, dataset.WindowWidth = 40, 350
    dataset.PatientName = "Planted^Person"
    return _file(dataset, (hounsfield_HW + 1024).astype(np.int16), bits=16, signed=True)


def film(
    stored_HW: NDArray[np.uint16], *, image_id: str, inverted: bool, orientation: list[str] | None
) -> bytes:  # fmt: skip
    """A chest film as PhysioNet has them: 12 bits stored, hardly any header."""
    dataset = _dataset(DigitalXRayImageStorageForPresentation, "DX", image_id, generate_uid(), generate_uid(), 1)
    if orientation is not None:
        dataset.PatientOrientation = orientation
    dataset.PixelSpacing = [0.139, 0.139]
    photometric = "MONOCHROME1" if inverted else "MONOCHROME2"
    return _file(dataset, stored_HW, bits=12, signed=False, photometric=photometric)


def _dataset(sop_class: Any, modality: str, patient_id: str, study: str, series: str, number: int) -> Dataset:
    dataset = Dataset()
    dataset.SOPClassUID, dataset.SOPInstanceUID = sop_class, generate_uid()
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID = study, series
    dataset.Modality, dataset.PatientID, dataset.InstanceNumber = modality, patient_id, number
    return dataset


def _file(
    dataset: Dataset, pixels_HW: NDArray[Any], *, bits: int, signed: bool, photometric: str = "MONOCHROME2"
) -> bytes:
    dataset.Rows, dataset.Columns = pixels_HW.shape
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, photometric
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, bits, bits - 1
    dataset.PixelRepresentation = int(signed)
    if signed:
        dataset.add_new("PixelPaddingValue", "SS", -2000)
    dataset.PixelData = pixels_HW.tobytes()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()
