"""LIDC-IDRI readings -> nodules: which readings belong together, the slice to show, the mask most readers agree on.

    for nodule in nodules_of(scan): ...

Definitions (pylidc 0.2.3 for clusters and masks; the tie-breaks are ours, since readers agree equally on several slices
of nearly every nodule):
- cluster: readings whose outlines come within `tolerance` of each other, directly or through others. The distance is
  in pixel and slice indices; the tolerance starts at the slice thickness and shrinks by a tenth until no cluster has
  more than four readings, or it falls below 0.1. Larger clusters are neighbouring nodules merged: see `Nodule.merged`.
- mask of a reading: what its inclusions enclose, without their outlines, without exclusions and their outlines.
- consensus: pixels in at least half of all the cluster's readings.
- reference slice: the most readings with an inclusion on it, then the largest consensus, then the largest union, then
  the lowest index, which is the lowest z.

Arrays: H rows (y), W columns (x); N points; K slices.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from meddam_core.datasets.lidc_annotations import Contour, Reading, Scan
from meddam_core.records import Box

MAX_READERS = 4
"""Readers of a scan; a cluster of more readings is of more than one nodule."""
CONSENSUS = 0.5
_SHRINK = 0.9
_MIN_TOLERANCE = 0.1

Mask = NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True, eq=False)
class Nodule:
    """Readings of one nodule."""

    index: int
    """Which of the scan's nodules, by the mean slice index of their outlines."""
    scan: Scan
    readings: tuple[Reading, ...]

    @property
    def merged(self) -> bool:
        """Whether the readings are of several neighbouring nodules."""
        return len(self.readings) > MAX_READERS

    @cached_property
    def readers_by_slice(self) -> dict[int, int]:
        """Slice index -> number of readings with an inclusion there, ascending."""
        touched = [
            {_slice_index(self.scan, c) for c in reading.contours if c.inclusion} for reading in self.readings
        ]  # fmt: skip
        return {k: sum(k in slices for slices in touched) for k in sorted(set().union(*touched))}

    @cached_property
    def origin(self) -> tuple[int, int]:
        """(x, y) of the top left pixel of the masks: the cluster's outlines all lie within them."""
        low = np.min([c.points_N2.min(axis=0) for r in self.readings for c in r.contours], axis=0)
        return int(low[0]), int(low[1])

    @cached_property
    def extent(self) -> tuple[int, int]:
        """(width, height) of the masks, pixels."""
        high = np.max([c.points_N2.max(axis=0) for r in self.readings for c in r.contours], axis=0)
        return int(high[0]) - self.origin[0] + 1, int(high[1]) - self.origin[1] + 1

    def masks(self, k: int) -> NDArray[np.bool_]:
        """(R, H, W): what each reading takes for nodule on slice `k`; H, W by `extent`, at `origin`."""
        return np.stack([self._mask(reading, k) for reading in self.readings])

    def consensus(self, k: int) -> Mask:
        """(H, W): pixels of slice `k` in at least half of the readings."""
        return np.asarray(self.masks(k).mean(axis=0) >= CONSENSUS)

    @cached_property
    def reference_slice(self) -> int:
        """The index of the slice that shows the nodule."""
        most = max(self.readers_by_slice.values())
        areas: list[tuple[int, int, int]] = []
        for k in (k for k, readers in self.readers_by_slice.items() if readers == most):
            masks_RHW = self.masks(k)
            areas.append((int((masks_RHW.mean(axis=0) >= CONSENSUS).sum()), int(masks_RHW.any(axis=0).sum()), -k))
        return -max(areas)[2]

    def box(self, mask_HW: Mask) -> Box | None:
        """The tight box of a mask of this nodule, in pixels of the slice; None if it is empty."""
        ys, xs = np.flatnonzero(mask_HW.any(axis=1)), np.flatnonzero(mask_HW.any(axis=0))
        if not len(ys):
            return None
        x, y = self.origin
        return x + int(xs[0]), y + int(ys[0]), x + int(xs[-1]) + 1, y + int(ys[-1]) + 1

    def outline_box(self, k: int) -> Box:
        """The box of the readings' own outlines on slice `k`, which run outside the nodule."""
        on_slice = [c for r in self.readings for c in r.contours if c.inclusion and _slice_index(self.scan, c) == k]
        points_N2 = np.concatenate([c.points_N2 for c in on_slice])
        (x0, y0), (x1, y1) = points_N2.min(axis=0), points_N2.max(axis=0)
        return int(x0), int(y0), int(x1) + 1, int(y1) + 1

    def _mask(self, reading: Reading, k: int) -> Mask:
        width, height = self.extent
        mask_HW = np.zeros((height, width), bool)
        on_slice = [c for c in reading.contours if _slice_index(self.scan, c) == k]
        for contour in (c for c in on_slice if c.inclusion):
            points = contour.points_N2 - self.origin
            mask_HW |= enclosed(points, width, height)
            mask_HW[points[:, 1], points[:, 0]] = False
        for contour in (c for c in on_slice if not c.inclusion):
            points = contour.points_N2 - self.origin
            mask_HW &= ~enclosed(points, width, height)
            mask_HW[points[:, 1], points[:, 0]] = False
        return mask_HW


def nodules_of(scan: Scan) -> Iterator[Nodule]:
    """The scan's nodules, from the lowest slices up."""
    matrices = [_index_points(scan, reading) for reading in scan.readings]
    clusters = sorted(_clusters(scan, matrices), key=lambda c: float(np.mean([matrices[i][:, 2].mean() for i in c])))
    for index, cluster in enumerate(clusters):
        yield Nodule(index=index, scan=scan, readings=tuple(scan.readings[i] for i in cluster))


def _clusters(scan: Scan, matrices: Sequence[NDArray[np.int64]]) -> list[list[int]]:
    """Positions of readings by cluster, in the order of each cluster's first reading."""
    from scipy.sparse.csgraph import (
        connected_components,
    )  # here: importing it takes a second, and this module is the CLI's

    tolerance = scan.slice_thickness_mm
    distance_NN = _distances(matrices, tolerance)
    while True:
        _, names = connected_components(distance_NN <= tolerance, directed=False)
        found = [np.flatnonzero(names == name).tolist() for name in range(names.max() + 1)] if len(names) else []
        tolerance *= _SHRINK
        if all(len(cluster) <= MAX_READERS for cluster in found) or tolerance < _MIN_TOLERANCE:
            return found


def _distances(matrices: Sequence[NDArray[np.int64]], tolerance: float) -> NDArray[np.float64]:
    """(N, N): the smallest distance between two readings' outline points; inf where it is above `tolerance`."""
    from scipy.spatial.distance import cdist

    lows, highs = [m.min(axis=0) for m in matrices], [m.max(axis=0) for m in matrices]
    distance_NN = np.full((len(matrices), len(matrices)), np.inf)
    np.fill_diagonal(distance_NN, 0)
    for i in range(len(matrices)):
        for j in range(i + 1, len(matrices)):
            gap = np.maximum(np.maximum(lows[i] - highs[j], lows[j] - highs[i]), 0)
            if np.sqrt((gap**2).sum()) <= tolerance:
                distance_NN[i, j] = distance_NN[j, i] = cdist(matrices[i], matrices[j]).min()
    return distance_NN


def _index_points(scan: Scan, reading: Reading) -> NDArray[np.int64]:
    """(N, 3): all outline points of a reading as (x, y, slice index)."""
    parts = [np.insert(c.points_N2, 2, _slice_index(scan, c), axis=1) for c in reading.contours]
    return np.concatenate(parts)


def _slice_index(scan: Scan, contour: Contour) -> int:
    return int(np.abs(scan.slice_z_mm - contour.z_mm).argmin())


def enclosed(points_N2: NDArray[np.int64], width: int, height: int) -> Mask:
    """(H, W): the pixels inside a closed polygon of pixel coordinates (x, y), by the parity of crossings.

    A pixel on an edge counts as inside or outside as in matplotlib's `Path.contains_points` on (row, column) points,
    which is what pylidc asks; pixels that are polygon points themselves are no part of a nodule anyway.
    """
    column_N, row_N = points_N2[:, 0], points_N2[:, 1]
    column_1, row_1 = np.roll(column_N, -1), np.roll(row_N, -1)
    columns_W, rows_H = np.arange(width), np.arange(height)
    above_NW, above_1_NW = column_N[:, None] >= columns_W, column_1[:, None] >= columns_W
    edge, column = np.nonzero(above_NW != above_1_NW)
    # which side of the edge each row of that column lies on, in whole numbers
    left_E = (column_1[edge] - column) * (row_N[edge] - row_1[edge])
    right_EH = (row_1[edge][:, None] - rows_H) * (column_N[edge] - column_1[edge])[:, None]
    crossed_EH = (left_E[:, None] >= right_EH) == above_1_NW[edge, column][:, None]
    count_WH = np.zeros((width, height), np.int64)
    np.add.at(count_WH, column, crossed_EH)
    return np.asarray(count_WH.T % 2 == 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Diameters:
    """Sizes of one reading's outline, mm. Outlines run outside the nodule, so they are about a pixel too large."""

    longest_mm: float
    """The longest distance between two points of one outline, over all slices."""
    across_mm: float
    """The widest extent at right angles to it, on the same outline."""

    @property
    def mean_mm(self) -> float:
        """The mean of both axes, the size that the Fleischner Society's guidelines go by."""
        return (self.longest_mm + self.across_mm) / 2


def diameters(scan: Scan, reading: Reading) -> Diameters:
    """The longest in-plane diameter of a reading and the one across it, mm."""
    from scipy.spatial.distance import pdist

    best, outline = -1.0, reading.contours[0].points_N2
    for contour in reading.contours:
        longest = float(pdist(contour.points_N2).max()) if len(contour.points_N2) > 1 else 0.0
        if longest > best:
            best, outline = longest, contour.points_N2
    return Diameters(
        longest_mm=best * scan.pixel_spacing_mm, across_mm=_across(outline) * scan.pixel_spacing_mm
    )  # fmt: skip


def _across(points_N2: NDArray[np.int64]) -> float:
    """The longest straight cut through an outline at right angles to its longest diameter, pixels."""
    if len(points_N2) < 2:
        return 0.0
    distance_NN = np.linalg.norm(points_N2[:, None] - points_N2[None], axis=-1)
    first, last = np.unravel_index(int(distance_NN.argmax()), distance_NN.shape)
    axis = (points_N2[last] - points_N2[first]) / max(float(distance_NN[first, last]), 1e-9)
    along_N = np.round(points_N2 @ axis, 9)
    side_N = points_N2 @ np.array([-axis[1], axis[0]])
    along_1, side_1 = np.roll(along_N, -1), np.roll(side_N, -1)
    step_N = np.where(along_1 == along_N, 1.0, along_1 - along_N)
    share_MN = (along_N[:, None] - along_N[None, :]) / step_N[None, :]  # where the cut at point M meets edge N
    met_MN = (share_MN >= 0) & (share_MN <= 1) & (along_1 != along_N)[None, :]
    cut_MN = side_N[None, :] + share_MN * (side_1 - side_N)[None, :]
    high_M = np.maximum(np.where(met_MN, cut_MN, -np.inf).max(axis=1), side_N)
    low_M = np.minimum(np.where(met_MN, cut_MN, np.inf).min(axis=1), side_N)
    return float((high_M - low_M).max())
