"""DICOM segmentations (SEG) and structure sets (RTSTRUCT) as regions of the images they refer to.

    meddam ingest dicom-seg segmentations --images ct --out s3://bucket/organs
    meddam ingest rtstruct plans --images ct --slices all --out s3://bucket/targets

Each segment or structure is a region on the image it names by SOP instance UID, or that lies in its plane where it
names none. `slices=largest` takes, of each structure, the image on which it is largest; `all` every one.

Notes:
- a segmentation's pixels must lie where the image's do (to half a pixel); otherwise the region is a reject;
- names of segments and structures are free text that people type: one that repeats a word of the patient's, physician's
  or institution's identifiers, or holds a long number, is replaced by its number in the object;
- masks are made on the driver, object by object: memory holds one object.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from meddam_core.datasets.base import Problem, Source, SourceItem, SourceRegion, read_limited
from meddam_core.datasets.dicom_index import DicomIndex, Instance, dicom_index, plane_of
from meddam_core.datasets.grouping import grouped
from meddam_core.datasets.tables import files_below, names_digest, relative
from meddam_core.imaging.decode import decode, read_header
from meddam_core.imaging.dicom_header import Header
from meddam_core.imaging.limits import Limits
from meddam_core.records import Egress, Label, Reason, Rle, RowError
from meddam_core.regions.contours import area_of_contours, mask_of_contours
from meddam_core.regions.masks import rle_of

VERSION = 1
Kind = Literal["SEG", "RTSTRUCT"]
Slices = Literal["largest", "all"]
_IDENTIFIERS = (
    "PatientName", "PatientID", "OtherPatientIDs", "OtherPatientNames", "AccessionNumber", "PatientBirthDate",
    "ReferringPhysicianName", "OperatorsName", "PhysiciansOfRecord", "PerformingPhysicianName", "InstitutionName",
    "ReviewerName", "StudyID", "StudyDate", "StructureSetDate",
)  # fmt: skip
_WORD = re.compile(r"[^\W_]{3,}")
_LONG_NUMBER = re.compile(r"\d{5,}")
_MAX_NAME = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class DicomRegions(Source):
    """Segmentations or structure sets, and the images they refer to."""

    path: str
    """Folder of the SEG or RTSTRUCT files, on S3 or disk."""
    images: str
    """Folder of the images they refer to."""
    kind: Kind
    slices: Slices = "largest"
    dataset: str = "dicom-regions"
    licence: str = "unknown"
    egress: Egress = "deny"

    def fingerprint(self) -> str:
        """Of the settings and the names and sizes of both folders' files."""
        listing = names_digest(files_below(self.path, ("",)), files_below(self.images, ("",)))
        return hashlib.sha256(f"{VERSION} {self!r} {listing}".encode()).hexdigest()

    def items(self) -> Iterator[SourceItem]:
        """One item an image with regions. Raises ValueError where the folders hold none."""
        with dicom_index(self.images) as index, grouped() as groups:
            found = False
            for entry in files_below(self.path, ("",)):
                read = self._read(entry.uri, index)
                if read is None:
                    continue
                found = True
                for place in read:
                    groups.add(place.group, place.value)
            if not found:
                raise ValueError(f"{self.path} holds no {self.kind} object; check its name")
            for name, values in groups:
                uri, _, frame = name.rpartition("#")
                yield _item(relative(uri, self.images), uri, int(frame) if frame else None, values)

    def _read(self, uri: str, index: DicomIndex) -> list[_Place] | None:
        """The regions of one object; None where the file is of another kind."""
        try:
            data = read_limited(uri, Limits())
            header = read_header(data)
            if header.text("Modality") != self.kind:
                return None
            read = _segments(data, header, index) if self.kind == "SEG" else _structures(header, index)
        except RowError as error:
            if error.reason is Reason.NOT_AN_IMAGE:
                return None
            return [_Place(group=f"{uri}#", problem=error)]
        return read if self.slices == "all" else _largest(read)


@dataclass(slots=True, kw_only=True)
class _Place:
    """A region on one image, or why there is none."""

    group: str
    """`URI#frame` of the image."""
    owner: int = 0
    """Number of the segment or structure within its object."""
    area: float = 0.0
    labels: list[dict[str, Any]] = field(default_factory=list)
    mask: Rle | None = None
    contours: list[NDArray[np.float64]] = field(default_factory=list)
    size: tuple[int, int] = (0, 0)
    problem: RowError | None = None

    @property
    def value(self) -> dict[str, Any]:
        """As it is kept until all objects are read."""
        if self.problem is not None:
            return {"reason": self.problem.reason.value, "detail": self.problem.detail}
        mask = self.mask or rle_of(mask_of_contours(self.contours, self.size))
        return {"segmentation": asdict(mask), "labels": self.labels}


def _item(key: str, uri: str, frame: int | None, values: list[dict[str, Any]]) -> SourceItem:
    regions: list[SourceRegion] = []
    problems: list[Problem] = []
    for ordinal, value in enumerate(values):
        if "reason" in value:
            problems.append(Problem(reason=Reason(value["reason"]), detail=value["detail"], region=ordinal))
            continue
        labels = [Label(**label) for label in value["labels"]]
        regions.append(SourceRegion(ordinal=ordinal, segmentation=value["segmentation"], labels=labels))
    if not regions and problems:
        problems = [Problem(reason=problems[0].reason, detail=problems[0].detail)]
    key = key if frame is None else f"{key}#{frame}"
    return SourceItem(key=key, uri=uri, frame=frame, regions=regions, problems=problems)


def _largest(places: list[_Place]) -> list[_Place]:
    """Of each structure the image on which it is largest, the first of equals."""
    best: dict[int, _Place] = {}
    for place in places:
        if place.problem is None and (place.owner not in best or place.area > best[place.owner].area):
            best[place.owner] = place
    return [*(p for p in places if p.problem is not None), *best.values()]


# --- SEG (PS3.3 A.51, C.8.20)


def _segments(data: bytes, header: Header, index: DicomIndex) -> list[_Place]:
    kind = header.text("SegmentationType") or "BINARY"
    labels = {
        Header(s, 0).integer("SegmentNumber") or 0: _segment_labels(s, header) for s in header.items("SegmentSequence")
    }
    num_frames = header.integer("NumberOfFrames") or 1
    per_frame = header.items("PerFrameFunctionalGroupsSequence")
    places: list[_Place] = []
    for number in range(num_frames):
        frame = Header(header.dataset, number)
        picture = decode(data, frame=number)
        if kind == "LABELMAP":
            masks = [(n, picture.stored == n) for n in labels if n]
        else:
            segment = _item_integer(frame, "SegmentIdentificationSequence", "ReferencedSegmentNumber", per_frame)
            half = (header.integer("MaximumFractionalValue") or 255) / 2 if kind == "FRACTIONAL" else 0
            masks = [(segment, picture.stored > half)]
        masks = [(n, m) for n, m in masks if m.any()]
        if not masks:
            continue
        group, problem = _image_of_frame(frame, index, (picture.width, picture.height))
        places += [
            _Place(
                group=group, owner=n, area=float(m.sum()), labels=labels.get(n, []), mask=rle_of(m.astype(np.uint8)),
                problem=problem,
            )
            for n, m in masks
        ]  # fmt: skip
    return places


def _image_of_frame(frame: Header, index: DicomIndex, size: tuple[int, int]) -> tuple[str, RowError | None]:
    """`URI#frame` of the image that a frame of a segmentation lies on, or what is wrong with it."""
    plane = plane_of(frame)
    uid, of_frame = _source(frame)
    image = index.find(uid) if uid else None
    if image is None and not uid and plane is not None:
        image = index.on_plane(frame.text("FrameOfReferenceUID") or "", np.array(plane.position_XYZ))
    if image is None:
        return "#", RowError(Reason.NOT_FOUND, "the image that the segmentation refers to is not there")
    group = f"{image.uri}#{'' if of_frame is None else of_frame}"
    if image.size != size:
        detail = f"the segmentation is {size[0]} x {size[1]}, its image {image.size[0]} x {image.size[1]}"
        return group, RowError(Reason.MASK_SIZE, detail)
    if plane is not None and image.plane is not None and not plane.equals(image.plane):
        return group, RowError(Reason.BAD_ANNOTATION, "the segmentation lies on another grid than its image")
    return group, None


def _source(frame: Header) -> tuple[str | None, int | None]:
    """(SOP instance UID, frame from 0 or None) of a segmentation frame's source image."""
    for derivation in _group_items(frame, "DerivationImageSequence"):
        for source in Header(derivation, 0).items("SourceImageSequence"):
            of_frame = Header(source, 0).integer("ReferencedFrameNumber")
            return Header(source, 0).text("ReferencedSOPInstanceUID"), None if of_frame is None else of_frame - 1
    return None, None


def _group_items(frame: Header, keyword: str) -> list[Any]:
    per_frame = frame.items("PerFrameFunctionalGroupsSequence")[frame.frame : frame.frame + 1]
    for place in [*per_frame, *frame.items("SharedFunctionalGroupsSequence")[:1]]:
        if found := Header(place, 0).items(keyword):
            return found
    return []


def _item_integer(frame: Header, sequence: str, keyword: str, per_frame: list[Any]) -> int:
    found = _group_items(frame, sequence)
    number = Header(found[0], 0).integer(keyword) if found else None
    return number if number is not None else 1 if len(per_frame) <= 1 else 0


def _segment_labels(segment: Any, header: Header) -> list[dict[str, Any]]:
    item = Header(segment, 0)
    number = item.integer("SegmentNumber") or 0
    coded = [Header(c, 0).text("CodeMeaning") for c in item.items("SegmentedPropertyTypeCodeSequence")]
    name = safe_name(coded[0] if coded and coded[0] else item.text("SegmentLabel"), header, f"segment {number}")
    labels = [{"name": "finding", "value": name}, {"name": name, "value": "present"}]
    own = safe_name(item.text("SegmentLabel"), header, "")
    return [*labels, {"name": "segment", "value": own}] if own and own != name else labels


# --- RTSTRUCT (PS3.3 A.19, C.8.8.5, C.8.8.6)


def _structures(header: Header, index: DicomIndex) -> list[_Place]:
    names: dict[int, tuple[str, str]] = {}
    for entry in header.items("StructureSetROISequence"):
        item = Header(entry, 0)
        number = item.integer("ROINumber") or 0
        name = safe_name(item.text("ROIName"), header, f"structure {number}")
        names[number] = name, item.text("ReferencedFrameOfReferenceUID") or ""
    places: list[_Place] = []
    for entry in header.items("ROIContourSequence"):
        number = Header(entry, 0).integer("ReferencedROINumber") or 0
        name, frame_of_reference = names.get(number, (f"structure {number}", ""))
        places += _structure(Header(entry, 0), number, name, frame_of_reference, index)
    return places


def _structure(roi: Header, number: int, name: str, frame_of_reference: str, index: DicomIndex) -> list[_Place]:
    """A structure's regions, one an image."""
    labels = [{"name": "finding", "value": name}, {"name": name, "value": "present"}]
    found: dict[str, _Place] = {}
    for entry in roi.items("ContourSequence"):
        contour = Header(entry, 0)
        if contour.text("ContourGeometricType") not in ("CLOSED_PLANAR", "CLOSEDPLANAR_XOR"):
            continue  # points and open lines enclose nothing
        points = np.array(contour.floats("ContourData"))
        if len(points) < 9 or len(points) % 3:
            problem = RowError(Reason.BAD_ANNOTATION, "a contour has fewer than three points")
            found.setdefault("#broken", _Place(group="#", owner=number, problem=problem))
            continue
        image = _image_of_contour(contour, points.reshape(-1, 3), frame_of_reference, index)
        if image is None or image.plane is None:
            problem = RowError(
                Reason.NOT_FOUND, "the image that a contour lies on is not there, or says not where it lies"
            )
            found.setdefault("#lost", _Place(group="#", owner=number, problem=problem))
            continue
        group = f"{image.uri}#"
        place = found.setdefault(group, _Place(group=group, owner=number, labels=labels, size=image.size))
        place.contours.append(image.plane.pixels_of(points.reshape(-1, 3))[:, :2])
        place.area = area_of_contours(place.contours)
    return list(found.values())


def _image_of_contour(
    contour: Header, points_N3: NDArray[np.float64], frame_of_reference: str, index: DicomIndex
) -> Instance | None:
    for reference in contour.items("ContourImageSequence"):
        uid = Header(reference, 0).text("ReferencedSOPInstanceUID")
        if uid:
            return index.find(uid)
    return index.on_plane(frame_of_reference, points_N3[0])


def safe_name(text: str | None, header: Header, otherwise: str) -> str:
    """A name that people typed, unless it may tell who the patient is."""
    name = " ".join((text or "").split())[:_MAX_NAME]
    if not name or _LONG_NUMBER.search(name):
        return otherwise
    words = {w.casefold() for w in _WORD.findall(name.replace("_", " "))}
    for keyword in _IDENTIFIERS:
        value = str(header.value(keyword) or "")
        if words & {w.casefold() for w in _WORD.findall(value.replace("_", " "))}:
            return otherwise
    return name
