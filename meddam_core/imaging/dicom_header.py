"""Typed, allow-listed facts out of a DICOM header. Nothing else of a header ever leaves this package.

Every accessor returns None for a value that is missing or not of its type, never the value as text: header text may
hold a name. Multi-frame objects keep many facts in functional groups; `Header` looks there first (PS3.3 C.7.6.16).
Sources: PS3.3 10.7 (spacing), C.7.6.1.1.1 (patient orientation), C.11.2 (VOI).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from pydicom.dataset import Dataset

from meddam_core.imaging.decoded import Identity
from meddam_core.records import Rescale, Window

MODALITIES = frozenset({
    "AR", "ASMT", "AU", "BDUS", "BI", "BMD", "CFM", "CR", "CT", "CTPROTOCOL", "DG", "DMS", "DX", "ECG", "EPS", "ES",
    "FID", "GM", "HC", "HD", "IO", "IOL", "IVOCT", "IVUS", "KER", "KO", "LEN", "LS", "MG", "MR", "NM", "OAM", "OCT",
    "OP", "OPM", "OPT", "OPTBSV", "OPTENF", "OPV", "OSS", "OT", "PLAN", "PR", "PT", "PX", "REG", "RESP", "RF", "RG",
    "RTDOSE", "RTIMAGE", "RTINTENT", "RTPLAN", "RTRAD", "RTRECORD", "RTSEGANN", "RTSTRUCT", "RWV", "SEG", "SM", "SMR",
    "SR", "SRF", "STAIN", "TEXTUREMAP", "TG", "US", "VA", "XA", "XC", "XAPROTOCOL",
})  # fmt: skip
"""Defined terms of Modality (PS3.3 C.7.3.1.1.1)."""
PROJECTIONS = frozenset({"CR", "DX", "IO", "MG", "PX", "RF", "RG", "XA"})
"""Modalities whose pixel spacing may be that of the detector plane (PS3.3 10.7.1)."""
_FUNCTIONS = ("LINEAR", "LINEAR_EXACT", "SIGMOID")
_DIRECTION = re.compile(r"[LRAPHF]{1,3}")
_AXES = ("LR", "PA", "HF")
_OBLIQUE = 0.3
"""A direction letter is written for a component of the direction cosine above this (about 17 degrees)."""
_CM = 3
"""Physical Units code for centimetres (PS3.3 C.8.5.5.1.15)."""

Pair = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Header:
    """A dataset seen from one of its frames."""

    dataset: Dataset = field(repr=False)
    frame: int

    def value(self, keyword: str, group: str | None = None) -> Any:
        """The value of `keyword`: the frame's functional group, the shared one, or the dataset; None if unreadable."""
        for dataset in self.places(group):
            found = _read(dataset, keyword)
            if found is not None and found != "":
                return found
        return None

    def items(self, keyword: str) -> list[Dataset]:
        """The items of a top-level sequence; empty if there is none."""
        return _items(self.dataset, keyword)

    def places(self, group: str | None) -> list[Dataset]:
        """Where a fact of functional group `group` may stand, the most specific first, the dataset itself last."""
        if group is None:
            return [self.dataset]
        per_frame = _items(self.dataset, "PerFrameFunctionalGroupsSequence")
        places = per_frame[self.frame : self.frame + 1] + _items(self.dataset, "SharedFunctionalGroupsSequence")[:1]
        return [item for place in places for item in _items(place, group)[:1]] + [self.dataset]

    def floats(self, keyword: str, group: str | None = None) -> list[float]:
        """The finite numbers of `keyword`; empty if there is none or one of them is no number."""
        value = self.value(keyword, group)
        values = [] if value is None else list(value) if _is_multi(value) else [value]
        try:
            numbers = [float(v) for v in values]
        except (TypeError, ValueError):
            return []
        return numbers if all(math.isfinite(n) for n in numbers) else []

    def integer(self, keyword: str) -> int | None:
        """The whole number `keyword`, its first value where it has several; None if it is not one."""
        numbers = self.floats(keyword)
        return int(numbers[0]) if numbers and numbers[0].is_integer() else None

    def text(self, keyword: str) -> str | None:
        """The text of `keyword`. For comparison with known terms, or for hashing: never to be passed on."""
        value = self.value(keyword)
        return str(value).strip() or None if isinstance(value, str) else None


def _read(dataset: Dataset, keyword: str) -> Any:
    """pydicom converts values when they are asked for, and raises a dozen kinds of error on broken ones."""
    try:
        return dataset.get(keyword)
    except Exception:  # noqa: BLE001 - an unreadable value is an absent value; required ones are checked by the caller
        return None


def _items(dataset: Dataset, keyword: str) -> list[Dataset]:
    value = _read(dataset, keyword)
    return [v for v in value if isinstance(v, Dataset)] if _is_multi(value) else []


def _is_multi(value: Any) -> bool:
    return hasattr(value, "__iter__") and not isinstance(value, str | bytes)


def modality(header: Header) -> str:
    """The modality code, "OT" for anything that is not a defined term."""
    found = header.text("Modality")
    return found if found in MODALITIES else "OT"


def burned_in(header: Header) -> bool | None:
    return {"YES": True, "NO": False}.get(header.text("BurnedInAnnotation") or "")


def rescale(header: Header) -> Rescale | None:
    """Rescale Slope and Intercept; None where the header has none, or a slope of 0."""
    group = "PixelValueTransformationSequence"
    slope, intercept = header.floats("RescaleSlope", group), header.floats("RescaleIntercept", group)
    if not slope or not intercept or slope[0] == 0:
        return None
    return Rescale(slope=slope[0], intercept=intercept[0])


def window(header: Header) -> Window | None:
    """The first window of the header, if it is one that the standard allows (PS3.3 C.11.2.1.2)."""
    group = "FrameVOILUTSequence"
    centers, widths = header.floats("WindowCenter", group), header.floats("WindowWidth", group)
    name = str(header.value("VOILUTFunction", group) or "LINEAR").strip()
    if not centers or not widths or name not in _FUNCTIONS:
        return None
    if widths[0] <= 0 or (name == "LINEAR" and widths[0] < 1):
        return None
    return Window(center=centers[0], width=widths[0], function=name)  # type: ignore[arg-type]  # checked above


def spacings_mm(header: Header, modality: str) -> tuple[Pair | None, Pair | None]:
    """((row, column) spacing in the patient, the same in the detector plane), in mm; None where unknown.

    On projection films Pixel Spacing may only repeat the detector's (PS3.3 10.7.1.1): it counts as the patient's when
    it is marked as calibrated or differs from Imager Pixel Spacing.
    """
    given = _pair(header.floats("PixelSpacing", "PixelMeasuresSequence"))
    if modality == "US":
        return given or _ultrasound_spacing(header), None
    if modality not in PROJECTIONS:
        return given, None
    detector = _pair(header.floats("ImagerPixelSpacing"))
    calibrated = header.text("PixelSpacingCalibrationType") in ("GEOMETRY", "FIDUCIAL")
    if given and (calibrated or (detector and not np.allclose(given, detector, rtol=1e-3))):
        return given, detector
    return None, detector or given


def _pair(values: list[float]) -> Pair | None:
    if len(values) != 2 or not all(1e-5 < v < 1000 for v in values):
        return None
    return values[0], values[1]


def _ultrasound_spacing(header: Header) -> Pair | None:
    """From the 2-D tissue regions of an ultrasound picture, where all agree (PS3.3 C.8.5.5)."""
    found = set()
    for item in header.items("SequenceOfUltrasoundRegions"):
        region = Header(item, 0)
        if region.integer("RegionSpatialFormat") != 1:
            continue
        if {region.integer("PhysicalUnitsXDirection"), region.integer("PhysicalUnitsYDirection")} != {_CM}:
            return None
        step = region.floats("PhysicalDeltaY") + region.floats("PhysicalDeltaX")
        found.add(_pair([round(abs(s) * 10, 9) for s in step]))
    return found.pop() if len(found) == 1 else None


def orientation(header: Header) -> str | None:
    """Patient directions of increasing columns and rows: "L\\\\P" on a standard axial slice."""
    cosines = _cosines(header)
    if cosines is not None:
        return "\\".join(_letters(axis) for axis in cosines)
    value = header.value("PatientOrientation")
    parts = [str(v).strip() for v in value] if _is_multi(value) else []
    return "\\".join(parts) if len(parts) == 2 and all(_DIRECTION.fullmatch(p) for p in parts) else None


def _cosines(header: Header) -> np.ndarray[Any, Any] | None:
    """(2, 3): unit directions of increasing columns and of increasing rows."""
    values = np.array(header.floats("ImageOrientationPatient", "PlaneOrientationSequence"))
    if values.shape != (6,):
        return None
    axes = values.reshape(2, 3)
    orthonormal = np.allclose(axes @ axes.T, np.eye(2), atol=1e-2)
    return axes if orthonormal else None


def _letters(direction: np.ndarray[Any, Any]) -> str:
    order = np.argsort(-np.abs(direction), kind="stable")
    strong = [i for i in order if abs(direction[i]) > _OBLIQUE]
    return "".join(_AXES[i][0 if direction[i] > 0 else 1] for i in strong)


def padding(header: Header, *, signed: bool, bits_allocated: int) -> tuple[int, int] | None:
    """The pixel padding values (lowest, highest) in the pixels' own representation (PS3.3 C.7.5.1.1.2).

    Writers get the sign wrong: LIDC stores -2000 as the unsigned 63536 beside signed pixels. The bits are read again
    with the pixels' sign.
    """
    first = header.integer("PixelPaddingValue")
    if first is None:
        return None
    last = header.integer("PixelPaddingRangeLimit")
    ends = [_same_bits(v, signed, bits_allocated) for v in (first, first if last is None else last)]
    return min(ends), max(ends)


def _same_bits(value: int, signed: bool, bits: int) -> int:
    low = value & ((1 << bits) - 1)
    return low - (1 << bits) if signed and low >> (bits - 1) else low


def identity(header: Header) -> Identity:
    """Who and which slice: to be hashed or dropped by the caller."""
    cosines = _cosines(header)
    position = header.floats("ImagePositionPatient", "PlanePositionSequence")
    normal = None if cosines is None else np.cross(cosines[0], cosines[1])
    return Identity(
        patient_id=header.text("PatientID"),
        study_uid=header.text("StudyInstanceUID"),
        series_uid=header.text("SeriesInstanceUID"),
        instance_uid=header.text("SOPInstanceUID"),
        instance_number=header.integer("InstanceNumber"),
        frame_of_reference_uid=header.text("FrameOfReferenceUID"),
        position_mm=float(normal @ np.array(position)) if normal is not None and len(position) == 3 else None,
        z_mm=position[2] if len(position) == 3 else None,
        slice_normal=None if normal is None else (float(normal[0]), float(normal[1]), float(normal[2])),
    )
