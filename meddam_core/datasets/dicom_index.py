"""A folder of DICOM images by their instance UIDs and places, for objects that refer to them.

    with dicom_index("s3://bucket/ct") as index:
        image = index.find(uid)
        image = index.on_plane(frame_of_reference, point_XYZ)

Only headers are read, the first 64 KB of a file where that is enough. The index is a temporary SQLite file, so memory
doesn't grow with the folder. UIDs stay within: nothing of them is in an error or a row.
"""

from __future__ import annotations

import json
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meddam_core import storage
from meddam_core.imaging.decode import read_header
from meddam_core.imaging.dicom_header import Header
from meddam_core.records import RowError

_HEAD_BYTES = 1 << 16
_ON_PLANE_MM = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Plane:
    """Where the pixels of a picture lie in the patient (DICOM PS3.3 C.7.6.2.1.1)."""

    position_XYZ: tuple[float, float, float]
    """Centre of the first pixel, mm."""
    cosines: tuple[float, ...]
    """Directions of increasing columns (three numbers) and rows (three)."""
    spacing_mm: tuple[float, float]
    """(row, column) spacing."""

    def axes(self) -> NDArray[np.float64]:
        """(3, 3): directions of increasing columns and rows, and the normal."""
        along, down = np.array(self.cosines[:3]), np.array(self.cosines[3:])
        return np.stack([along, down, np.cross(along, down)])

    def pixels_of(self, points_N3: NDArray[np.float64]) -> NDArray[np.float64]:
        """(N, 3): column, row (pixel centres are whole numbers) and distance from the plane in mm."""
        moved = (points_N3 - np.array(self.position_XYZ)) @ self.axes().T
        return np.asarray(moved / np.array([self.spacing_mm[1], self.spacing_mm[0], 1.0]), np.float64)

    def equals(self, other: Plane) -> bool:
        """Whether two pictures of one size have each pixel in the same place, to half a pixel."""
        near = min(self.spacing_mm) / 2
        return (
            np.allclose(self.cosines, other.cosines, atol=1e-3)
            and np.allclose(self.spacing_mm, other.spacing_mm, rtol=1e-3)
            and float(np.abs(np.subtract(self.position_XYZ, other.position_XYZ)).max()) < near
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Instance:
    """One file of the folder."""

    uri: str
    size: tuple[int, int]
    """(width, height)."""
    plane: Plane | None


class DicomIndex:
    """Instances by UID and place. Made by `dicom_index`."""

    def __init__(self, path: Path) -> None:
        self._database = sqlite3.connect(path)
        self._database.executescript(
            "PRAGMA journal_mode=OFF; PRAGMA synchronous=OFF;"
            "CREATE TABLE file (uid TEXT PRIMARY KEY, frame TEXT, distance REAL, facts TEXT) WITHOUT ROWID"
        )

    def fill(self, folder: str) -> int:
        """Adds every DICOM image below a folder; returns how many. Of two with one UID the first by name counts."""
        num = 0
        for entry in storage.list_objects(folder.rstrip("/") + "/"):
            header = head_of(entry.uri)
            uid = header.text("SOPInstanceUID") if header else None
            rows, columns = (header.integer("Rows"), header.integer("Columns")) if header else (None, None)
            if header is None or uid is None or not rows or not columns:
                continue
            plane = plane_of(header)
            distance = None if plane is None else float(plane.axes()[2] @ np.array(plane.position_XYZ))
            facts = json.dumps(
                [entry.uri, columns, rows, plane and [plane.position_XYZ, plane.cosines, plane.spacing_mm]]
            )
            row = (uid, header.text("FrameOfReferenceUID"), distance, facts)
            self._database.execute("INSERT OR IGNORE INTO file VALUES (?, ?, ?, ?)", row)
            num += 1
        self._database.execute("CREATE INDEX place ON file (frame, distance)")
        return num

    def find(self, uid: str) -> Instance | None:
        """The image of that SOP instance UID."""
        row = self._database.execute("SELECT facts FROM file WHERE uid = ?", (uid,)).fetchone()
        return None if row is None else _instance(row[0])

    def on_plane(self, frame_of_reference: str, point_XYZ: NDArray[np.float64]) -> Instance | None:
        """The image whose plane a point lies in, within half a millimetre; the nearest of several."""
        best: tuple[float, Instance] | None = None
        for (facts,) in self._database.execute("SELECT facts FROM file WHERE frame = ?", (frame_of_reference,)):
            image = _instance(facts)
            if image.plane is None:
                continue
            away = abs(float(image.plane.pixels_of(point_XYZ[None])[0, 2]))
            if away <= _ON_PLANE_MM and (best is None or away < best[0]):
                best = away, image
        return best[1] if best else None

    def close(self) -> None:
        """Frees the temporary file."""
        self._database.close()


@contextmanager
def dicom_index(folder: str) -> Iterator[DicomIndex]:
    """The index of a folder and its subfolders. Raises ValueError where they hold no DICOM image."""
    with tempfile.TemporaryDirectory(prefix="meddam-index-") as place:
        index = DicomIndex(Path(place) / "index.sqlite")
        try:
            if not index.fill(folder):
                raise ValueError(f"{folder} holds no DICOM image; check its name")
            yield index
        finally:
            index.close()


def plane_of(header: Header) -> Plane | None:
    """Where a frame lies; None where the header doesn't say so in full."""
    position = header.floats("ImagePositionPatient", "PlanePositionSequence")
    cosines = header.floats("ImageOrientationPatient", "PlaneOrientationSequence")
    spacing = header.floats("PixelSpacing", "PixelMeasuresSequence")
    if len(position) != 3 or len(cosines) != 6 or len(spacing) != 2 or min(spacing) <= 0:
        return None
    axes = np.array(cosines).reshape(2, 3)
    if not np.allclose(axes @ axes.T, np.eye(2), atol=1e-2):
        return None
    return Plane(
        position_XYZ=(position[0], position[1], position[2]),
        cosines=tuple(cosines),
        spacing_mm=(spacing[0], spacing[1]),
    )


def head_of(uri: str) -> Header | None:
    """A file's header; None for a file that is no DICOM, or broken: should it be referred to, it is missing."""
    fs, path = storage.open_uri(uri)
    with fs.open_input_file(path) as stream:
        data = bytes(stream.read(_HEAD_BYTES))
        try:
            header = read_header(data)
            if header.integer("Columns") is None:
                header = read_header(data + bytes(stream.read()))
        except RowError:
            return None
    return header


def _instance(facts: str) -> Instance:
    uri, columns, rows, plane = json.loads(facts)
    return Instance(uri=uri, size=(columns, rows), plane=None if plane is None else _plane(plane))


def _plane(values: Any) -> Plane:
    position, cosines, spacing = values
    return Plane(position_XYZ=tuple(position), cosines=tuple(cosines), spacing_mm=tuple(spacing))
