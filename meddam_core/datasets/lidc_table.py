"""The region table of LIDC-IDRI, from the readings alone: a row a nodule, without pixels.

    rows = region_rows(read_database(None), min_readers=3)

For a nodule: its series and slice, the boxes on it, sizes, and for each of the nine attributes the readers' grades,
their median and their modes. Ids of patients and series are the ones under which TCIA publishes the data.

| column                                  | what it holds                                                              |
|-----------------------------------------|----------------------------------------------------------------------------|
| patient_id, scan_id, study_uid, series_uid | of the public collection                                                |
| nodule_index                            | of the scan's clusters, from the lowest up                                 |
| n_readers, merged                       | readings in the cluster; whether they are more than readers (neighbours)   |
| slice_k, slice_z, n_slices              | reference slice: index from the lowest z, z in mm; slices of the scan      |
| readers_on_slice, readers_nonempty      | readings with an inclusion there, and with any pixel left inside it        |
| consensus_area_px, union_area_px        | pixels on that slice in at least half of the readings, and in any          |
| consensus_bbox_*                        | tight box of the consensus, half-open: the region; empty if none           |
| union_bbox_*, contour_bbox_*            | of the union; of the outlines, which run outside the nodule                |
| pixel_spacing, slice_thickness, slice_spacing | mm; the last is the median step between slices                       |
| diameter_mm_median                      | median over readers of the longest in-plane diameter                       |
| mean_diameter_mm_median                 | median over readers of the mean of the longest and the one across it       |
| annotation_ids, per_reader_area_px, *_values | by reading, in this order, separated by ";"                           |
| *_median, *_modes                       | of the grades; several modes are separated by ";"                          |
| is_from_initial_399                     | 1: spiculation and lobulation may be on another scale                      |
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from meddam_core.datasets.lidc_annotations import GRADES, read_scans
from meddam_core.datasets.lidc_nodules import Nodule, diameters, nodules_of
from meddam_core.records import Box

MIN_READERS = 3

_CORNERS = ("x0", "y0", "x1", "y1")
_BOXES = ("consensus", "union", "contour")
_TEXT = ("patient_id", "study_uid", "series_uid", "annotation_ids", "per_reader_area_px")
_FLOATS = (
    "slice_z", "pixel_spacing", "slice_thickness", "slice_spacing", "diameter_mm_median", "mean_diameter_mm_median",
)  # fmt: skip
_ORDER = (
    "patient_id", "scan_id", "study_uid", "series_uid", "nodule_index", "n_readers", "merged", "slice_k", "slice_z",
    "n_slices", "readers_on_slice", "readers_nonempty", "consensus_area_px", "union_area_px", "pixel_spacing",
    "slice_thickness", "slice_spacing", "annotation_ids", "is_from_initial_399", "per_reader_area_px",
    *(f"{name}_bbox_{corner}" for name in _BOXES for corner in _CORNERS),
    "diameter_mm_median", "mean_diameter_mm_median",
)  # fmt: skip


def _type(name: str) -> pa.DataType:
    if name in _TEXT:
        return pa.string()
    return pa.float64() if name in _FLOATS else pa.int64()


SCHEMA = pa.schema(
    [(name, _type(name)) for name in _ORDER]
    + [
        (f"{name}_{what}", pa.float64() if what == "median" else pa.string())
        for name in GRADES
        for what in ("values", "median", "modes")
    ]
)


def region_rows(database: bytes, *, min_readers: int = MIN_READERS, merged: bool = False) -> Iterator[dict[str, Any]]:
    """The table's rows, scan by scan, as `SCHEMA` has them.

    merged: whether clusters of more readings than readers, which are several nodules, are listed too.
    """
    for scan in read_scans(database):
        for nodule in nodules_of(scan):
            if len(nodule.readings) >= min_readers and (merged or not nodule.merged):
                yield region_row(nodule)


def region_row(nodule: Nodule) -> dict[str, Any]:
    """One row of the table."""
    scan, k = nodule.scan, nodule.reference_slice
    masks_RHW = nodule.masks(k)
    consensus_HW, union_HW = nodule.consensus(k), np.asarray(masks_RHW.any(axis=0))
    areas = [int(mask.sum()) for mask in masks_RHW]
    sizes = [diameters(scan, reading) for reading in nodule.readings]
    boxes = (nodule.box(consensus_HW), nodule.box(union_HW), nodule.outline_box(k))
    return {
        "patient_id": scan.patient_id,
        "scan_id": scan.scan_id,
        "study_uid": scan.study_uid,
        "series_uid": scan.series_uid,
        "nodule_index": nodule.index,
        "n_readers": len(nodule.readings),
        "merged": int(nodule.merged),
        "slice_k": k,
        "slice_z": float(scan.slice_z_mm[k]),
        "n_slices": len(scan.slice_z_mm),
        "readers_on_slice": nodule.readers_by_slice[k],
        "readers_nonempty": sum(area > 0 for area in areas),
        "consensus_area_px": int(consensus_HW.sum()),
        "union_area_px": int(union_HW.sum()),
        "pixel_spacing": scan.pixel_spacing_mm,
        "slice_thickness": scan.slice_thickness_mm,
        "slice_spacing": float(np.median(np.diff(scan.slice_z_mm))) if len(scan.slice_z_mm) > 1 else None,
        "annotation_ids": _joined(reading.reading_id for reading in nodule.readings),
        "is_from_initial_399": int(scan.is_from_initial),
        "per_reader_area_px": _joined(areas),
        **{key: value for name, box in zip(_BOXES, boxes, strict=True) for key, value in _box_columns(name, box)},
        "diameter_mm_median": statistics.median(size.longest_mm for size in sizes),
        "mean_diameter_mm_median": statistics.median(size.mean_mm for size in sizes),
        **{key: value for name in GRADES for key, value in _grade_columns(nodule, name)},
    }


def _box_columns(name: str, box: Box | None) -> Iterator[tuple[str, int | None]]:
    for corner, value in zip(_CORNERS, box or (None,) * 4, strict=True):
        yield f"{name}_bbox_{corner}", value


def _grade_columns(nodule: Nodule, name: str) -> Iterator[tuple[str, Any]]:
    grades = [reading.grades[name] for reading in nodule.readings]
    yield f"{name}_values", _joined(grades)
    yield f"{name}_median", float(statistics.median(grades))
    yield f"{name}_modes", _joined(modes(grades))


def modes(grades: Sequence[int]) -> list[int]:
    """The grades given most often, ascending."""
    counts = Counter(grades)
    return sorted(grade for grade, count in counts.items() if count == max(counts.values()))


def _joined(values: Any) -> str:
    return ";".join(str(value) for value in values)
