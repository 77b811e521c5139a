"""At most so many regions an image, chosen with a seed, spread over labels and positions.

    chosen = sample_regions(boxes, kinds, size=(3000, 2500), max_regions=5, seed=0, image_key="train/0001")

The paper's Section 2.2: "we sample up to five regions per image where applicable ... regions are randomly selected to
balance anatomical locations and pathology types".

Invariants:
- the choice depends on the seed, the image and the regions themselves; not on their order, and not on other images;
- each next region is the one whose pathology type and place were chosen least so far; ties are drawn by lot.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence

from meddam_core.records import Box, Label

GRID = 3
"""Positions are the cells of a GRID x GRID raster that hold the regions' centres."""


def sample_regions(
    boxes: Sequence[Box],
    kinds: Sequence[str],
    size: tuple[int, int],
    max_regions: int | None,
    seed: int,
    image_key: str,
) -> list[int]:
    """Indices of the regions to keep, ascending. `kinds` are the regions' pathology types (see `kind_of`).

    `max_regions=None` keeps all. Raises ValueError for a maximum below 1.
    """
    if max_regions is not None and max_regions < 1:
        raise ValueError(f"max_regions is {max_regions}; it must be at least 1, or left out to keep all regions")
    if max_regions is None or len(boxes) <= max_regions:
        return list(range(len(boxes)))
    left = {i: _draw(seed, image_key, box, kind) for i, (box, kind) in enumerate(zip(boxes, kinds, strict=True))}
    cells = [_cell(box, size) for box in boxes]
    num_kind: Counter[str] = Counter()
    num_cell: Counter[tuple[int, int]] = Counter()
    chosen: list[int] = []
    while len(chosen) < max_regions:
        best = min(left, key=lambda i: (num_kind[kinds[i]] + num_cell[cells[i]], num_kind[kinds[i]], left[i], i))
        del left[best]
        num_kind[kinds[best]] += 1
        num_cell[cells[best]] += 1
        chosen.append(best)
    return sorted(chosen)


def kind_of(labels: Sequence[Label]) -> str:
    """The pathology type of a region: its `finding`, or else the names of what is present, or ""."""
    finding = next((label.value for label in labels if label.name == "finding"), None)
    return finding or ", ".join(sorted({label.name for label in labels if label.value == "present"}))


def _draw(seed: int, image_key: str, box: Box, kind: str) -> bytes:
    text = "\0".join([str(seed), image_key, ",".join(map(str, box)), kind])
    return hashlib.sha256(text.encode()).digest()


def _cell(box: Box, size: tuple[int, int]) -> tuple[int, int]:
    return tuple(min(GRID * (box[a] + box[a + 2]) // (2 * size[a]), GRID - 1) for a in (0, 1))  # type: ignore[return-value]
