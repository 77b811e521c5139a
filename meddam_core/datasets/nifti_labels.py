"""NIfTI volumes with label maps: each label is a region on its axial slices.

    meddam ingest nifti-labels labelsTr --images imagesTr --names dataset.json --modality CT --out s3://bucket/organs

A label map belongs to the volume of the same name; `_0000` at a volume's end (nnU-Net's first channel) is no part of
it. Names of labels come from a JSON file: {"1": "liver"} or {"liver": 1}, on its own or under "labels"
(nnU-Net's and the Medical Segmentation Decathlon's dataset.json).

`slices=largest` takes, of each label, the slice on which it is largest; `all` every one. Slices are axial and shown as
the volume's are (meddam_core.imaging.volume): image and mask go through the same code.

Label maps are read on the driver, one at a time; the volumes themselves only by the workers.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meddam_core import storage
from meddam_core.datasets.base import Problem, Source, SourceItem, SourceRegion, read_limited
from meddam_core.datasets.dicom_regions import Slices
from meddam_core.datasets.tables import files_below, names_digest, relative, stem
from meddam_core.imaging.decode import read_volume
from meddam_core.imaging.limits import Limits
from meddam_core.imaging.volume import axial_slice
from meddam_core.records import Egress, Label, Reason, RowError
from meddam_core.regions.masks import rle_of

VERSION = 1
_SUFFIXES = (".nii", ".nii.gz")
_CHANNEL = "_0000"
_MAX_LABELS = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class NiftiLabels(Source):
    """Volumes and their label maps."""

    path: str
    """Folder of the label maps, on S3 or disk."""
    images: str
    """Folder of the volumes."""
    names: str | None = None
    """JSON file with the labels' names."""
    slices: Slices = "largest"
    modality: str = "OT"
    """DICOM code of the volumes' modality: NIfTI doesn't say it."""
    min_area_px: int = 16
    """A label covers at least this much of a slice."""
    split: str = "all"
    dataset: str = "nifti-labels"
    licence: str = "unknown"
    egress: Egress = "deny"

    def fingerprint(self) -> str:
        """Of the settings, the names of both folders' files, and the labels' names."""
        listing = names_digest(files_below(self.path, _SUFFIXES), files_below(self.images, _SUFFIXES))
        names = json.dumps(self._names(), sort_keys=True)
        return hashlib.sha256(f"{VERSION} {self!r} {listing} {names}".encode()).hexdigest()

    def items(self) -> Iterator[SourceItem]:
        """One item a slice with labels, volume by volume. Raises ValueError where there is no label map."""
        names = self._names()
        volumes = {stem(o.uri).removesuffix(_CHANNEL): o.uri for o in reversed(files_below(self.images, _SUFFIXES))}
        maps = files_below(self.path, _SUFFIXES)
        if not maps:
            raise ValueError(f"{self.path} holds no .nii or .nii.gz file; check its name")
        for entry in maps:
            key, volume = relative(entry.uri, self.path), volumes.get(stem(entry.uri))
            if volume is None:
                problem = Problem(reason=Reason.NOT_FOUND, detail="the label map has no volume of its name")
                yield SourceItem(key=key, problems=[problem])
                continue
            try:
                slices = self._slices(entry.uri)
            except RowError as error:
                yield SourceItem(key=key, problems=[Problem(reason=error.reason, detail=error.detail)])
                continue
            if not slices:
                yield SourceItem(key=key, problems=[Problem(reason=Reason.NO_REGIONS, detail="the label map is empty")])
            for number, regions in slices:
                yield SourceItem(
                    key=f"{key}#{number}", uri=volume, frame=number, split=self.split, modality=self.modality,
                    study_id=key, regions=[
                        SourceRegion(ordinal=i, segmentation=segmentation, labels=_labels(value, names))
                        for i, (value, segmentation) in enumerate(regions)
                    ],
                )  # fmt: skip

    def _slices(self, uri: str) -> list[tuple[int, list[tuple[int, Any]]]]:
        """(slice, [(label, run lengths)]) of a label map, by slice and label. Raises RowError."""
        volume = read_volume(read_limited(uri, Limits()), Limits()).values_XYZT
        if volume.shape[3] != 1:
            raise RowError(Reason.BAD_ANNOTATION, "a label map is one volume, not a series of them")
        values_XYZ = volume[..., 0]
        if values_XYZ.dtype.names or values_XYZ.dtype.kind not in "uif":
            raise RowError(Reason.BAD_ANNOTATION, "a label map holds whole numbers")
        areas: dict[int, dict[int, int]] = defaultdict(dict)
        for z in range(values_XYZ.shape[2]):
            found, counts = np.unique(values_XYZ[..., z], return_counts=True)
            if values_XYZ.dtype.kind == "f" and (found != np.rint(found)).any():
                raise RowError(Reason.BAD_ANNOTATION, "a label map holds whole numbers")
            for value, count in zip(found, counts, strict=True):
                if value > 0 and count >= self.min_area_px:
                    areas[int(value)][z] = int(count)
            if len(areas) > _MAX_LABELS:
                raise RowError(Reason.BAD_ANNOTATION, f"more than {_MAX_LABELS:,} labels: this is no label map")
        wanted: dict[int, list[int]] = defaultdict(list)
        for value, by_slice in areas.items():
            chosen = by_slice if self.slices == "all" else [max(by_slice, key=lambda z: (by_slice[z], -z))]
            for z in chosen:
                wanted[z].append(value)
        return [(z, [(v, _mask(values_XYZ, z, v)) for v in sorted(wanted[z])]) for z in sorted(wanted)]

    def _names(self) -> dict[int, str]:
        if self.names is None:
            return {}
        try:
            given = json.loads(storage.read_bytes(self.names))
            given = given.get("labels", given)
            pairs = [(k, v) if str(k).isdigit() else (v, k) for k, v in given.items()]
            return {int(value): str(name) for value, name in pairs if str(value).isdigit()}
        except FileNotFoundError:
            raise ValueError(f"there is no file {self.names}; check its name") from None
        except (ValueError, AttributeError, TypeError) as error:
            raise ValueError(f'{self.names} gives no names of labels; write {{"1": "liver", ...}}') from error


def _mask(values_XYZ: NDArray[Any], z: int, value: int) -> dict[str, Any]:
    return asdict(rle_of((axial_slice(values_XYZ, z) == value).astype(np.uint8)))


def _labels(value: int, names: dict[int, str]) -> list[Label]:
    name = names.get(value, f"label {value}")
    return [Label(name="finding", value=name), Label(name=name, value="present", trust=1.0)]
