"""Several readers' boxes of one finding -> one box each place, with the readers who drew it.

    fused = fuse_boxes([ReaderBox(reader=0, box=(10, 10, 50, 50)), ReaderBox(reader=1, box=(12, 9, 52, 49))])

Weighted boxes fusion (Solovyev et al., Image Vis Comput 107:104117, 2021) with every reader's weight alike: a box joins
the fused box it overlaps most, if by at least `min_overlap` (intersection over union), which then is the mean of its
readers' boxes; otherwise it starts another.

Invariants:
- votes are readers, not boxes: one reader drawing twice at a place counts once, in votes and in the mean;
- the outcome does not depend on the order of boxes nor on how readers are named;
- every box ends up in exactly one fused box.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MIN_OVERLAP = 0.4
"""Four of five pairs of overlapping boxes of one finding in VinDr-CXR overlap by at least this much."""

Corners = tuple[float, float, float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReaderBox:
    """One reader's box. `reader` is any number that tells the readers of one image apart."""

    reader: int
    box: Corners


@dataclass(frozen=True, slots=True, kw_only=True)
class FusedBox:
    """Boxes taken for the same place."""

    box: Corners
    members: tuple[int, ...]
    """Positions of its boxes in what was given."""
    num_readers: int


def fuse_boxes(boxes: Sequence[ReaderBox], min_overlap: float = MIN_OVERLAP) -> list[FusedBox]:
    """The fused boxes, by their position (left, top). Raises ValueError for an overlap outside [0, 1)."""
    if not 0 <= min_overlap < 1:
        raise ValueError(f"min_overlap is {min_overlap}; it is an intersection over union, at least 0 and below 1")
    # large boxes first: they are the ones that smaller variants of other readers should join
    order = sorted(range(len(boxes)), key=lambda i: (-_area(boxes[i].box), boxes[i].box))
    places: list[list[int]] = []
    for i in order:
        overlaps = [_overlap(_mean(boxes, members), boxes[i].box) for members in places]
        best = int(np.argmax(overlaps)) if overlaps else -1
        if best >= 0 and overlaps[best] > 0 and overlaps[best] >= min_overlap:
            places[best].append(i)
        else:
            places.append([i])
    fused = [
        FusedBox(
            box=_mean(boxes, members),
            members=tuple(sorted(members)),
            num_readers=len({boxes[i].reader for i in members}),
        )
        for members in places
    ]
    return sorted(fused, key=lambda f: f.box)


def _mean(boxes: Sequence[ReaderBox], members: Sequence[int]) -> Corners:
    """The mean of the readers' boxes, a reader's own averaged first."""
    by_reader: dict[int, list[Corners]] = defaultdict(list)
    for i in members:
        by_reader[boxes[i].reader].append(boxes[i].box)
    each = sorted(tuple(np.mean(sorted(drawn), axis=0)) for drawn in by_reader.values())
    x0, y0, x1, y1 = (float(v) for v in np.mean(each, axis=0))
    return x0, y0, x1, y1


def _area(box: Corners) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def _overlap(a: Corners, b: Corners) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0.0) * max(height, 0.0)
    joint = _area(a) + _area(b) - shared
    return shared / joint if joint > 0 else 0.0
