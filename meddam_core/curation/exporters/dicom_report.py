"""DICOM: for each image a Secondary Capture, a Segmentation of its regions, and a Structured Report (TID 1500).

    OUT/IMAGE/image.dcm, regions.seg.dcm, report.sr.dcm

Shards hold no headers of the source, on purpose, so the picture comes along as a Secondary Capture, under identifiers
made from its image id: a report never points into a hospital's archive by accident. Each region is a segment and a
measurement group that refers to it; the caption is the group's comment. Needs highdicom.

Source: DICOM PS3.16 TID 1500 and TID 1410; PS3.3 A.8.1 (Secondary Capture), A.51 (Segmentation).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meddam_core import __version__
from meddam_core.curation.exporters.item import Card, Item
from meddam_core.curation.exporters.llava import write_card
from meddam_core.records import Caption
from meddam_core.regions.geometry import box_mask
from meddam_core.regions.masks import mask_of

_MANUFACTURER = "MedDAM on Ray"


def write_dicom(items: Iterable[Item], out: Path, card: Card) -> int:
    """Three files an image. Returns the number of captions. Raises ValueError where pictures are left out."""
    num = 0
    for item in items:
        folder = out / item.name
        folder.mkdir(parents=True, exist_ok=True)
        image, segmentation, report = dicom_objects(item, card)
        for name, dataset in (("image", image), ("regions.seg", segmentation), ("report.sr", report)):
            dataset.save_as(folder / f"{name}.dcm", enforce_file_format=True)
        num += len(item.captions)
    write_card(out, card, num)
    return num


def dicom_objects(item: Item, card: Card) -> tuple[Any, Any, Any]:
    """(Secondary Capture, Segmentation, Comprehensive 3D SR) of an image, as pydicom datasets."""
    if item.picture_HWC is None:
        raise ValueError("a DICOM report needs the picture that it speaks of; leave --no-pixels away")
    regions: dict[int, list[Caption]] = {}
    for caption in item.captions:
        regions.setdefault(caption.region_id, []).append(caption)
    image = _secondary_capture(item)
    firsts = [captions[0] for captions in regions.values()]
    segmentation = _segmentation(image, firsts)
    return image, segmentation, _report(image, segmentation, list(regions.values()), card)


def _uid(*parts: object) -> str:
    """The same for the same parts."""
    from pydicom.uid import generate_uid

    return str(generate_uid(entropy_srcs=[str(p) for p in parts]))


def _secondary_capture(item: Item) -> Any:
    from highdicom.sc import SCImage

    first = item.captions[0]
    assert item.picture_HWC is not None
    spacing = first.pixel_spacing_mm
    image: Any = SCImage(
        pixel_array=np.ascontiguousarray(item.picture_HWC), photometric_interpretation="RGB", bits_allocated=8,
        coordinate_system="PATIENT", study_instance_uid=_uid(item.name, "study"), series_number=1,
        series_instance_uid=_uid(item.name, "series"), sop_instance_uid=_uid(item.name, "image"), instance_number=1,
        manufacturer=_MANUFACTURER, patient_id=(first.patient_key or item.name)[:64],
        patient_orientation=("L", "F"),
        pixel_spacing=None if spacing is None else (spacing[0], spacing[1]),
    )  # fmt: skip
    image.PatientOrientation = None  # captions do not say how the picture lies, and highdicom asks for something
    image.Laterality = None
    return image


def _mask(caption: Caption) -> NDArray[np.uint8]:
    return box_mask(caption.box, (caption.width, caption.height)) if caption.mask is None else mask_of(caption.mask)


def _segmentation(image: Any, captions: Sequence[Caption]) -> Any:
    from highdicom import AlgorithmIdentificationSequence, PixelMeasuresSequence
    from highdicom.seg import Segmentation, SegmentDescription
    from pydicom.sr.codedict import codes

    algorithm = AlgorithmIdentificationSequence(
        name="MedDAM regions", version=__version__, family=codes.DCM.ArtificialIntelligence
    )
    described = [
        SegmentDescription(
            segment_number=i, segment_label=f"region {i}",
            segmented_property_category=codes.SCT.MorphologicallyAbnormalStructure,
            segmented_property_type=codes.SCT.Lesion, algorithm_type="SEMIAUTOMATIC",
            algorithm_identification=algorithm,
        )
        for i in range(1, len(captions) + 1)
    ]  # fmt: skip
    known = captions[0].pixel_spacing_mm
    spacing = (1.0, 1.0) if known is None else (float(known[0]), float(known[1]))
    masks_1HWR = np.stack([_mask(c) for c in captions], axis=-1)[None]
    segmentation: Any = Segmentation(
        source_images=[image], pixel_array=masks_1HWR, segmentation_type="BINARY", segment_descriptions=described,
        series_instance_uid=_uid(image.SOPInstanceUID, "seg-series"), series_number=2,
        sop_instance_uid=_uid(image.SOPInstanceUID, "seg"), instance_number=1, manufacturer=_MANUFACTURER,
        manufacturer_model_name="MedDAM", software_versions=__version__, device_serial_number="0",
        omit_empty_frames=False,
        pixel_measures=PixelMeasuresSequence(pixel_spacing=spacing, slice_thickness=1.0),
    )  # fmt: skip
    segmentation.PatientOrientation = None
    return segmentation


def _report(image: Any, segmentation: Any, regions: Sequence[Sequence[Caption]], card: Card) -> Any:
    from highdicom.sr import (
        Comprehensive3DSR,
        DeviceObserverIdentifyingAttributes,
        MeasurementReport,
        ObservationContext,
        ObserverContext,
        PlanarROIMeasurementsAndQualitativeEvaluations,
        ReferencedSegmentationFrame,
        RelationshipTypeValues,
        TextContentItem,
        TrackingIdentifier,
    )
    from pydicom.sr.codedict import codes

    observer = ObserverContext(
        observer_type=codes.DCM.Device,
        observer_identifying_attributes=DeviceObserverIdentifyingAttributes(
            uid=_uid("meddam", regions[0][0].model), name="MedDAM",
            model_name=regions[0][0].model.rpartition("/")[2][:64],
        ),
    )  # fmt: skip
    groups = []
    for number, captions in enumerate(regions, start=1):
        group = PlanarROIMeasurementsAndQualitativeEvaluations(
            tracking_identifier=TrackingIdentifier(
                uid=_uid(image.SOPInstanceUID, number), identifier=f"region {number}"
            ),
            referenced_segment=ReferencedSegmentationFrame.from_segmentation(segmentation, segment_number=number),
            finding_type=codes.SCT.Lesion,
        )  # fmt: skip
        _point_once(group[0], segmentation)
        for caption in captions:
            comment = TextContentItem(
                name=codes.DCM.Comment, value=caption.text or "", relationship_type=RelationshipTypeValues.CONTAINS
            )
            group[0].ContentSequence.append(comment)
        groups.append(group)
    content = MeasurementReport(
        observation_context=ObservationContext(observer_device_context=observer),
        procedure_reported=codes.LN.CTUnspecifiedBodyRegion
        if image.Modality == "CT" and hasattr(codes.LN, "CTUnspecifiedBodyRegion")
        else codes.SCT.ImagingProcedure,
        imaging_measurements=groups, title=codes.DCM.ImagingMeasurementReport,
    )  # fmt: skip
    report = Comprehensive3DSR(
        evidence=[image, segmentation], content=content[0], series_number=3,
        series_instance_uid=_uid(image.SOPInstanceUID, "sr-series"), sop_instance_uid=_uid(image.SOPInstanceUID, "sr"),
        instance_number=1, manufacturer=_MANUFACTURER, is_complete=True, is_final=False, is_verified=False,
    )  # fmt: skip
    report.SeriesDescription = f"Pseudo-labels, not for diagnosis. {card.licence}"[:64]
    return report


def _point_once(group: Any, segmentation: Any) -> None:
    """A reference names a segmentation's frame or its segment, and no frame of a picture that has one (C.18.4)."""
    for content in group.ContentSequence:
        for target in content.get("ReferencedSOPSequence", ()):
            of_segment = target.ReferencedSOPInstanceUID == segmentation.SOPInstanceUID
            surplus = "ReferencedSegmentNumber" if of_segment else "ReferencedFrameNumber"
            if surplus in target:
                delattr(target, surplus)
