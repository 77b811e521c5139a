"""Miniature copies of datasets, made from a seed: synthetic pixels in the real folder layouts and file formats."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pydicom
from numpy.typing import NDArray
from PIL import Image as PilImage
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import UID, ExplicitVRLittleEndian

from meddam_core.datasets.phantoms import Options, make_phantom
from meddam_core.datasets.skincon import EXCLUDED, concepts

CT_CLASS, SEG_CLASS, RTSTRUCT_CLASS = (
    UID("1.2.840.10008.5.1.4.1.1.2"),
    UID("1.2.840.10008.5.1.4.1.1.66.4"),
    UID("1.2.840.10008.5.1.4.1.1.481.3"),
)
ROOT = "1.2.826.0.1.3680043.8.498"
PATIENT = "MUSTERMANN^ERIKA"


def disc(size: tuple[int, int], centre: tuple[float, float], radius: float) -> NDArray[np.uint8]:
    """(H, W) uint8, 1 within a circle; size and centre are (width, height) and (x, y)."""
    y, x = np.mgrid[0 : size[1], 0 : size[0]]
    return (np.hypot(x - centre[0], y - centre[1]) <= radius).astype(np.uint8)


def save(path: Path, pixels: NDArray[Any], **options: Any) -> Path:
    """A picture file by its suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    PilImage.fromarray(pixels).save(path, **options)
    return path


def table(path: Path, rows: list[dict[str, Any]]) -> Path:
    """A CSV file with the first row's columns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def skincon(folder: Path, num: int = 8) -> tuple[Path, Path, Path]:
    """(concept table, Fitzpatrick17k's table, folder of photographs). Of `num`, 1 is excluded, 1 wrongly labelled, 1
    listed but not there; one is rotated by EXIF, one in Adobe RGB's gamut of a JPEG with another suffix."""
    rows, skins = [], []
    for i in range(num):
        name = f"{i:032x}"
        phantom = make_phantom("skin", 5, i, Options(size=512, max_lesions=1))
        marks: dict[str, Any] = {c: int((i + j) % 7 == 0) for j, c in enumerate(concepts())}
        rows.append({"": i, "ImageID": f"{name}.jpg", **marks, EXCLUDED: int(i == 2)})
        skins.append(
            {"md5hash": name, "fitzpatrick_scale": -1 if i == 4 else 1 + i % 6, "fitzpatrick_centaur": 1,
             "label": "acne", "nine_partition_label": "inflammatory", "three_partition_label": "non-neoplastic",
             "qc": "3 Wrongly labelled" if i == 3 else "", "url": "http://example.org", "url_alphanum": "x"}
        )  # fmt: skip
        if i == 5:
            continue
        suffix = ".png" if i == 6 else ".jpg"
        path = folder / "images" / f"{name}{suffix}"
        pixels = phantom.stored
        if i == 1:
            path.parent.mkdir(parents=True, exist_ok=True)
            exif = PilImage.Exif()
            exif[274] = 6
            PilImage.fromarray(np.rot90(pixels)).save(path, quality=95, exif=exif)
        else:
            save(path, pixels, **({} if i == 6 else {"quality": 95}))
    return (
        table(folder / "annotations_fitzpatrick17k.csv", rows),
        table(folder / "fitzpatrick17k.csv", skins),
        folder / "images",
    )


def idrid(folder: Path) -> Path:
    """Two photographs for training, one for testing, with lesions' masks, and one that is only graded."""
    size = (240, 180)
    spots = {"MA": [((60, 60), 5)], "HE": [((150, 120), 9), ((60, 150), 8)], "EX": [((165, 120), 7)]}
    groups = {"MA": "1. Microaneurysms", "HE": "2. Haemorrhages", "EX": "3. Hard Exudates", "OD": "5. Optic Disc"}
    for number, place in ((1, "a. Training Set"), (2, "a. Training Set"), (55, "b. Testing Set")):
        name = f"IDRiD_{number:02d}"
        eye = np.zeros((size[1], size[0], 3), np.uint8)
        eye[...] = (150, 60, 20)
        discs = {"OD": [((200, 90), 15)], **({"MA": spots["MA"]} if number == 2 else spots)}
        for kind, places in discs.items():
            mask = np.zeros(size[::-1], np.uint8)
            for centre, radius in places:
                mask |= disc(size, centre, radius)
            eye[mask > 0] = {"MA": (90, 10, 10), "HE": (100, 0, 0), "EX": (240, 230, 120), "OD": (250, 220, 150)}[kind]
            where = folder / "A. Segmentation" / "2. All Segmentation Groundtruths" / place / groups[kind]
            red = np.zeros((*size[::-1], 4), np.uint8)  # as published: red on transparent black
            red[mask > 0] = (255, 0, 0, 255)
            save(where / f"{name}_{kind}.tif", mask * 76 if number == 1 else red)
        save(folder / "A. Segmentation" / "1. Original Images" / place / f"{name}.jpg", eye, quality=95)
    grading = folder / "B. Disease Grading"
    save(grading / "1. Original Images" / "a. Training Set" / "IDRiD_001.jpg", np.full((90, 120, 3), 90, np.uint8))
    table(
        grading / "2. Groundtruths" / "a. IDRiD_Disease Grading_Training Labels.csv",
        [{"Image name": "IDRiD_001", "Retinopathy grade": 3, "Risk of macular edema ": 2}],
    )
    return folder


def nuclei_patch(seed: int, side: int = 96) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """(picture, instances): nine nuclei in a nest and two far away."""
    rng = np.random.default_rng(seed)
    picture = np.full((side, side, 3), (230, 190, 215), np.uint8)
    instances = np.zeros((side, side), np.int64)
    places = [(14 + 13 * i, 14 + 13 * j) for i in range(3) for j in range(3)] + [(80, 80), (85, 20)]
    for number, place in enumerate(places, start=1):
        inside = disc((side, side), place, 4.5) > 0
        instances[inside] = number
        picture[inside] = (90 + rng.integers(0, 20), 50, 140)
    return picture, instances


def pannuke(folder: Path, num: int = 3) -> Path:
    """Two folds of 64-pixel patches in PanNuke's arrays; the last patch of a fold has no nuclei."""
    for fold in (1, 2):
        images = np.zeros((num, 96, 96, 3))
        masks = np.zeros((num, 96, 96, 6))
        for i in range(num):
            picture, instances = nuclei_patch(10 * fold + i)
            images[i] = picture
            if i < num - 1:
                masks[i, ..., 0] = np.where(instances <= 7, instances, 0)
                masks[i, ..., 1] = np.where(instances > 7, instances, 0)
            masks[i, ..., 5] = masks[i, ..., :5].sum(axis=-1) == 0
        for kind, array in (("images", images), ("masks", masks)):
            path = folder / f"Fold {fold}" / kind / f"fold{fold}" / f"{kind}.npy"
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, array)
        types = np.array(["Breast", "Colon", "Liver"][:num])
        np.save(folder / f"Fold {fold}" / "images" / f"fold{fold}" / "types.npy", types)
    return folder


def nuinsseg(folder: Path) -> Path:
    """Two organs; one picture lacks its label image."""
    for organ, number in (("human bladder", 1), ("mouse spleen", 2)):
        picture, instances = nuclei_patch(number)
        save(folder / organ / "tissue images" / f"{organ.replace(' ', '_')}_01.png", picture)
        save(folder / organ / "label masks" / f"{organ.replace(' ', '_')}_01.tif", instances.astype(np.int32))
    save(folder / "human bladder" / "tissue images" / "human_bladder_02.png", picture)
    return folder


def ct_series(folder: Path, num: int = 5, rows: int = 48, columns: int = 64, patient: str = "P1") -> list[FileDataset]:
    """Axial slices, 2.5 mm apart, non-square pixels; names don't tell the order."""
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for z in range(num):
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = CT_CLASS, UID(f"{ROOT}.1.{z + 1}")
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        ds = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)
        ds.SOPClassUID, ds.SOPInstanceUID, ds.Modality = CT_CLASS, meta.MediaStorageSOPInstanceUID, "CT"
        ds.PatientName, ds.PatientID, ds.StudyInstanceUID = PATIENT, patient, f"{ROOT}.8"
        ds.SeriesInstanceUID, ds.FrameOfReferenceUID, ds.InstanceNumber = f"{ROOT}.7", f"{ROOT}.9", num - z
        ds.ImagePositionPatient, ds.ImageOrientationPatient = [-20.0, -30.0, 2.5 * z], [1, 0, 0, 0, 1, 0]
        ds.PixelSpacing, ds.Rows, ds.Columns = [1.5, 0.5], rows, columns
        ds.BitsAllocated = ds.BitsStored = 16
        ds.HighBit, ds.PixelRepresentation, ds.SamplesPerPixel = 15, 0, 1
        ds.PhotometricInterpretation, ds.RescaleSlope, ds.RescaleIntercept = "MONOCHROME2", 1, -1024
        pixels = np.random.default_rng(z).integers(900, 1200, (rows, columns), dtype=np.uint16)
        ds.PixelData = pixels.tobytes()
        ds.save_as(folder / f"{(z * 3) % num}-{z}.dcm", enforce_file_format=True)
        made.append(ds)
    return made


def seg_object(
    path: Path, series: list[FileDataset], masks_FHW: list[NDArray[np.uint8]], names: list[str], **extra: Any
) -> Path:
    """A binary SEG: frame f is segment f % len(names) + 1 on slice f // len(names), with its references."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = SEG_CLASS, UID(f"{ROOT}.2.1")
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)
    ds.SOPClassUID, ds.SOPInstanceUID, ds.Modality = SEG_CLASS, meta.MediaStorageSOPInstanceUID, "SEG"
    ds.PatientName, ds.PatientID, ds.SegmentationType = PATIENT, "P1", "BINARY"
    ds.FrameOfReferenceUID = f"{ROOT}.9"
    ds.Rows, ds.Columns = masks_FHW[0].shape
    ds.NumberOfFrames, ds.SamplesPerPixel, ds.PhotometricInterpretation = len(masks_FHW), 1, "MONOCHROME2"
    ds.BitsAllocated = ds.BitsStored = 1
    ds.HighBit = ds.PixelRepresentation = 0
    ds.SegmentSequence = []
    for number, name in enumerate(names, start=1):
        segment, code = Dataset(), Dataset()
        segment.SegmentNumber, segment.SegmentLabel, segment.SegmentAlgorithmType = number, name, "MANUAL"
        code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning = "T-D0050", "SRT", name
        segment.SegmentedPropertyTypeCodeSequence = [code]
        ds.SegmentSequence.append(segment)
    frames = []
    for f in range(len(masks_FHW)):
        source, derivation, identified, plane, frame = Dataset(), Dataset(), Dataset(), Dataset(), Dataset()
        image = series[f // len(names)]
        source.ReferencedSOPClassUID, source.ReferencedSOPInstanceUID = CT_CLASS, image.SOPInstanceUID
        derivation.SourceImageSequence = [source]
        identified.ReferencedSegmentNumber = f % len(names) + 1
        plane.ImagePositionPatient = extra.get("position") or image.ImagePositionPatient
        frame.DerivationImageSequence = [derivation] if extra.get("references", True) else []
        frame.SegmentIdentificationSequence, frame.PlanePositionSequence = [identified], [plane]
        frames.append(frame)
    ds.PerFrameFunctionalGroupsSequence = frames
    shared, oriented, measured = Dataset(), Dataset(), Dataset()
    oriented.ImageOrientationPatient = series[0].ImageOrientationPatient
    measured.PixelSpacing = series[0].PixelSpacing
    shared.PlaneOrientationSequence, shared.PixelMeasuresSequence = [oriented], [measured]
    ds.SharedFunctionalGroupsSequence = [shared]
    bits = np.packbits(np.concatenate([m.ravel() for m in masks_FHW]), bitorder="little").tobytes()
    ds.PixelData = bits + b"\0" * (len(bits) % 2)
    path.parent.mkdir(parents=True, exist_ok=True)
    ds.save_as(path, enforce_file_format=True)
    return path


def rtstruct(
    path: Path,
    series: list[FileDataset],
    rois: dict[str, dict[int, list[NDArray[np.float64]]]],
    references: bool = True,
) -> Path:
    """A structure set: for each name, by slice, contours (N, 2) of column and row."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = RTSTRUCT_CLASS, UID(f"{ROOT}.3.1")
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)
    ds.SOPClassUID, ds.SOPInstanceUID, ds.Modality = RTSTRUCT_CLASS, meta.MediaStorageSOPInstanceUID, "RTSTRUCT"
    ds.PatientName, ds.PatientID = PATIENT, "P1"
    ds.StructureSetROISequence, ds.ROIContourSequence = [], []
    for number, (name, slices) in enumerate(rois.items(), start=1):
        roi, contours = Dataset(), Dataset()
        roi.ROINumber, roi.ROIName, roi.ReferencedFrameOfReferenceUID = number, name, f"{ROOT}.9"
        contours.ReferencedROINumber, contours.ContourSequence = number, []
        for z, drawn in slices.items():
            image = series[z]
            for points in drawn:
                item, reference = Dataset(), Dataset()
                reference.ReferencedSOPClassUID, reference.ReferencedSOPInstanceUID = CT_CLASS, image.SOPInstanceUID
                if references:
                    item.ContourImageSequence = [reference]
                item.ContourGeometricType, item.NumberOfContourPoints = "CLOSED_PLANAR", len(points)
                x0, y0, z0 = (float(v) for v in image.ImagePositionPatient)
                row_mm, column_mm = (float(v) for v in image.PixelSpacing)
                placed = np.stack(
                    [x0 + points[:, 0] * column_mm, y0 + points[:, 1] * row_mm, np.full(len(points), z0)], axis=1
                )
                item.ContourData = [f"{v:.6g}" for v in placed.ravel()]
                contours.ContourSequence.append(item)
        ds.StructureSetROISequence.append(roi)
        ds.ROIContourSequence.append(contours)
    path.parent.mkdir(parents=True, exist_ok=True)
    ds.save_as(path, enforce_file_format=True)
    return path


def nifti_labels(folder: Path) -> tuple[Path, Path, Path]:
    """(label maps, volumes, names) in nnU-Net's layout; the volume's axes are not those of the screen."""
    volume = np.random.default_rng(0).integers(-100, 200, (40, 30, 6)).astype(np.int16)
    labels = np.zeros((40, 30, 6), np.uint8)
    labels[5:15, 10:20, 1], labels[4:20, 8:24, 2], labels[30:36, 3:9, 2] = 1, 1, 2
    volume[labels == 1], volume[labels == 2] = 900, 1500
    affine = np.diag([-0.8, -0.9, 3.0, 1.0])  # LPS: as most scanners' files are
    for name, values in (
        ("imagesTr/liver_000_0000", volume),
        ("labelsTr/liver_000", labels),
        ("labelsTr/lost", labels),
    ):
        path = folder / f"{name}.nii.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        image = nibabel.Nifti1Image(values, affine)  # type: ignore[no-untyped-call]
        nibabel.save(image, path)  # type: ignore[no-untyped-call]
    (folder / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "liver": 1, "tumour": 2}}))
    return folder / "labelsTr", folder / "imagesTr", folder / "dataset.json"


def webdataset(path: Path, mode: str = "w") -> Path:
    """A tar of five samples: JSON, mask file, class, nothing, broken JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture, mask = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8), disc((60, 40), (20, 20), 8)

    def encoded(pixels: NDArray[Any], kind: str = "PNG") -> bytes:
        sink = io.BytesIO()
        PilImage.fromarray(pixels).save(sink, kind)
        return sink.getvalue()

    line = {"box": [5, 5, 30, 30], "labels": {"finding": "polyp"}, "split": "test", "patient_id": "P7", "caption": "x"}
    files = {
        "a/000.jpg": encoded(picture, "JPEG"), "a/000.json": json.dumps(line).encode(),
        "a/001.png": encoded(picture), "a/001.cls": b"adenoma\n", "a/001.mask.png": encoded(mask * 255),
        "a/002.png": encoded(picture), "a/002.cls": b"3",
        "a/003.png": encoded(picture), "a/003.json": b"{broken",
        "a/004.json": b"{}",
    }  # fmt: skip
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def tiled_tiff(path: Path, pixels_HWC: NDArray[np.uint8], mpp: float = 0.25) -> Path:
    """A tiled TIFF, as slide scanners' exports are, with its resolution; OpenSlide reads it as a generic slide."""
    import tifffile

    path.parent.mkdir(parents=True, exist_ok=True)
    per_cm = 10_000 / mpp
    tifffile.imwrite(
        path, pixels_HWC, tile=(256, 256), photometric="rgb", resolution=(per_cm, per_cm), resolutionunit="CENTIMETER"
    )
    return path


def planted() -> list[str]:
    """What names the patient in these files and may be nowhere in what is made of them."""
    return ["MUSTERMANN", ROOT]


def is_dicom(path: Path) -> bool:
    """Whether pydicom reads it: the miniatures must be real files."""
    return bool(pydicom.dcmread(path).SOPClassUID)
