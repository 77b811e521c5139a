"""A folder of DICOM files -> the slices of one series, in the order of their positions.

    slices = find_series([f"{root}/{patient}/{study}/{series}", f"{root}/{patient}"], series_uid)
    at = slice_at(slices, z_mm=-117.5)

Invariants:
- slices are ordered by Image Position (Patient) along the slice normal, never by file name or instance number;
- of several files at one position the one with the lowest instance number counts, as in pylidc;
- a series of several orientations is refused: its positions could not be compared.

Only headers are read here. Identifiers stay within: nothing of them is in an error.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from meddam_core import storage
from meddam_core.imaging.decode import read_identity
from meddam_core.imaging.decoded import Identity
from meddam_core.records import Reason, RowError

_HEAD_BYTES = 1 << 16
"""Enough for a CT header; where it isn't, the whole file is read."""
_SAME_PLACE_MM = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """One file of a series."""

    uri: str
    z_mm: float
    """The last coordinate of Image Position (Patient)."""
    position_mm: float
    """Along the slice normal."""
    normal: tuple[float, float, float]
    instance_number: int


@lru_cache(maxsize=2)  # the regions of a scan come one after the other
def find_series(folders: tuple[str, ...], series_uid: str) -> tuple[Slice, ...]:
    """The slices of a series in the first of `folders` that holds any, subfolders included, by position.

    Raises RowError: not_found, or bad_annotation for a series that cannot be ordered.
    """
    for folder in folders:
        found = list(_slices(folder, series_uid))
        if found:
            return tuple(_ordered(found))
    raise RowError(Reason.NOT_FOUND, "the images of the scan are not there")


def slice_at(slices: Sequence[Slice], z_mm: float, tolerance_mm: float = 0.1) -> Slice | None:
    """The slice at a z coordinate; None where there is none within the tolerance."""
    nearest = min(slices, key=lambda s: abs(s.z_mm - z_mm), default=None)
    return nearest if nearest is not None and abs(nearest.z_mm - z_mm) <= tolerance_mm else None


def _slices(folder: str, series_uid: str) -> Iterator[Slice]:
    """Files of the series below a folder. A subfolder whose first image is of another series is left at that."""
    by_folder: dict[str, list[str]] = defaultdict(list)
    for entry in storage.list_objects(folder.rstrip("/") + "/"):
        by_folder[entry.uri.rpartition("/")[0]].append(entry.uri)
    for uris in by_folder.values():
        for uri in uris:
            who = _identity(uri)
            if who is None:
                continue
            if who.series_uid != series_uid:
                break
            if who.position_mm is not None and who.slice_normal is not None and who.z_mm is not None:
                yield Slice(
                    uri=uri, z_mm=who.z_mm, position_mm=who.position_mm, normal=who.slice_normal,
                    instance_number=who.instance_number or 0,
                )  # fmt: skip


def _identity(uri: str) -> Identity | None:
    """Which slice a file is; None if it is no DICOM file, or broken: should its slice be asked for, it is missing."""
    fs, path = storage.open_uri(uri)
    with fs.open_input_file(path) as stream:
        head = bytes(stream.read(_HEAD_BYTES))
        try:
            who = read_identity(head)
            return who if who.position_mm is not None else read_identity(head + bytes(stream.read()))
        except RowError:
            return None


def _ordered(found: list[Slice]) -> Iterator[Slice]:
    if not np.allclose([s.normal for s in found], found[0].normal, atol=1e-2):
        raise RowError(Reason.BAD_ANNOTATION, "the series has slices of several orientations")
    last: float | None = None
    for entry in sorted(found, key=lambda s: (round(s.position_mm, 3), s.instance_number, s.uri)):
        if last is None or entry.position_mm - last > _SAME_PLACE_MM:
            yield entry
            last = entry.position_mm
