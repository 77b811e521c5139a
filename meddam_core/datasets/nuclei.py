"""Instance masks of nuclei -> regions worth a sentence: a nucleus alone says little, a nest of them does.

    regions = nuclei_regions(nuclei, size, spacing_mm=0.00025, unit="clusters")

Regions are clusters: nuclei of one type whose gaps are below `gap_px`, at least `min_nuclei` of them; or the patch as a
whole. What a region's labels say of it:
- cell_type: the type of more than 60 % of all nuclei whose centres lie in its box, else undecided;
- nuclei_density: high where nuclei cover at least 35 % of the box, low below 12 %, undecided between (our choice);
- num_nuclei: whose centres lie in the box.

Arrays: H rows, W columns of the patch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from meddam_core.datasets.base import SourceRegion
from meddam_core.records import Box, Label
from meddam_core.regions.components import components
from meddam_core.regions.masks import rle_of

MAJORITY = 0.6
DENSE, SPARSE = 0.35, 0.12
Unit = Literal["clusters", "patch"]


@dataclass(frozen=True, slots=True)
class Nuclei:
    """All nuclei of a patch."""

    instances_HW: NDArray[np.int32]
    """0 outside, 1 to N inside nuclei."""
    types: tuple[str, ...]
    """Of nuclei 1 to N; "" where the dataset has no types."""

    def centres(self) -> NDArray[np.float64]:
        """(N, 2): x and y of each nucleus; nan for a number that no pixel has."""
        num = len(self.types) + 1
        y, x = np.nonzero(self.instances_HW)
        at = self.instances_HW[y, x]
        counts = np.bincount(at, minlength=num)[1:].astype(np.float64)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.stack([np.bincount(at, v, num)[1:] / counts for v in (x, y)], axis=1)


def nuclei_of(layers: Sequence[tuple[str, NDArray[Any]]], height: int, width: int) -> Nuclei:
    """Nuclei from one instance image per type; where two overlap the later one wins."""
    instances_HW = np.zeros((height, width), np.int32)
    types: list[str] = []
    for name, layer_HW in layers:
        for value in np.unique(layer_HW):
            if value > 0:
                types.append(name)
                instances_HW[layer_HW == value] = len(types)
    return Nuclei(instances_HW, tuple(types))


def nuclei_regions(
    nuclei: Nuclei, *, unit: Unit = "clusters", min_nuclei: int = 3, gap_px: int = 16, tissue: str = ""
) -> list[SourceRegion]:
    """The regions of a patch, largest cluster first; none where there are fewer nuclei than `min_nuclei`."""
    height, width = nuclei.instances_HW.shape
    if len(nuclei.types) < min_nuclei:
        return []
    centres = nuclei.centres()
    if unit == "patch":
        return [_region(0, (0, 0, width, height), None, nuclei, centres, tissue)]
    found: list[tuple[int, Box, NDArray[np.uint8]]] = []
    of_type = np.array(["", *nuclei.types])
    for name in sorted(set(nuclei.types)):
        mask_HW = np.isin(nuclei.instances_HW, np.flatnonzero(of_type == name)) & (nuclei.instances_HW > 0)
        for part in components(mask_HW, join_px=gap_px):
            x0, y0, x1, y1 = part.box
            inside = nuclei.instances_HW[y0:y1, x0:x1][part.mask_HW > 0]
            num = len(np.unique(inside))
            if num >= min_nuclei:
                found.append((num, part.box, part.full((width, height))))
    found.sort(key=lambda f: (-f[0], f[1]))
    return [_region(i, box, mask, nuclei, centres, tissue) for i, (_, box, mask) in enumerate(found)]


def _region(
    ordinal: int, box: Box, mask_HW: NDArray[np.uint8] | None, nuclei: Nuclei, centres: NDArray[np.float64], tissue: str
) -> SourceRegion:
    x0, y0, x1, y1 = box
    x, y = centres[:, 0], centres[:, 1]
    types = Counter(nuclei.types[i] for i in np.flatnonzero((x >= x0) & (x < x1) & (y >= y0) & (y < y1)))
    num = types.total()
    covered = float((nuclei.instances_HW[y0:y1, x0:x1] > 0).mean())
    labels = [Label(name="num_nuclei", value=str(num)), Label(name="nuclei_density", value=_density(covered))]
    if any(nuclei.types):
        name, most = types.most_common(1)[0] if types else ("", 0)
        share = most / num if num else 0.0
        value = name if share > MAJORITY else "undecided"
        labels.insert(0, Label(name="cell_type", value=value, trust=round(share, 4)))
    if tissue:
        labels.append(Label(name="tissue", value=tissue))
    return SourceRegion(
        ordinal=ordinal, box=[float(v) for v in box], labels=labels,
        segmentation=None if mask_HW is None else asdict(rle_of(mask_HW)),
    )  # fmt: skip


def _density(covered: float) -> str:
    return "high" if covered >= DENSE else "low" if covered < SPARSE else "undecided"


def instances_by_contact(labels_HW: NDArray[Any]) -> NDArray[np.int32]:
    """Instances of a label image; of a plain mask (one value) its connected parts."""
    if len(np.unique(labels_HW)) > 2:
        return np.asarray(labels_HW, np.int32)
    _, parts = cv2.connectedComponents((labels_HW > 0).astype(np.uint8), connectivity=8)
    return np.asarray(parts, np.int32)
