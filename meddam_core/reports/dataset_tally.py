"""Counts over the rows of image shards, in bounded memory whatever their number.

    tally = DatasetTally()
    for batch in shard_batches(uri, TALLY_COLUMNS): tally.add(batch)

Invariants:
- every figure of a dataset page is a sum over rows that were added here; nothing is estimated;
- counters hold at most MAX_NAMES labels and MAX_VALUES values of each; what is beyond is counted as such. Patients
  are kept as 8-byte numbers, sorted arrays of those seen in each split: enough to say whether splits share one.

Axes: regions are flat over the rows of a batch; `owner` says which row a region is of.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

ROW_COLUMNS = (
    "image_id", "patient_key", "study_key", "dataset", "split", "recipe", "modality", "width", "height", "stored_bits",
    "photometric", "decoder", "pixel_spacing_mm", "orientation", "burned_in_annotation", "frame", "licence", "egress",
)  # fmt: skip
_LABEL_LEAVES = tuple(f"list.element.{leaf}" for leaf in ("name", "value", "trust"))
TALLY_COLUMNS = (
    *ROW_COLUMNS,
    *(f"regions.list.element.{leaf}" for leaf in ("region_id", "box", "source", "confidence")),
    *(f"regions.list.element.labels.{leaf}" for leaf in _LABEL_LEAVES),
    "regions.list.element.mask.size.list.element",
    *(f"labels.{leaf}" for leaf in _LABEL_LEAVES),
    "frames.list.element.path",
)
"""Parquet leaves that are read: neither pictures nor masks."""

MAX_NAMES = 2000
MAX_VALUES = 200
STATES = ("present", "undecided", "absent")
SIZE_BINS_PER_OCTAVE = 4
TRUST_BINS = 10
OTHER = "(further values)"


@dataclass(slots=True)
class LabelCounts:
    """What is known under one label name."""

    values: Counter[str] = field(default_factory=Counter)
    num_trusted: int = 0
    """Labels that say how many readers agree."""
    sum_trust: float = 0.0
    num_unanimous: int = 0

    @property
    def total(self) -> int:
        """Labels of this name."""
        return sum(self.values.values())

    @property
    def is_state(self) -> bool:
        """Whether its values are present, undecided or absent, and no terms."""
        return set(self.values) <= set(STATES)


@dataclass(slots=True)
class DatasetTally:
    """Counters of everything a dataset page shows."""

    num_images: int = 0
    num_regions: int = 0
    num_without_regions: int = 0
    rows: dict[str, Counter[Any]] = field(default_factory=dict)
    """Images by value, for each of a few columns."""
    groups: Counter[tuple[str, str, str, str]] = field(default_factory=Counter)
    """(images or regions, dataset, modality, split)."""
    regions_per_image: Counter[int] = field(default_factory=Counter)
    sources: Counter[str] = field(default_factory=Counter)
    """Regions by where they come from."""
    confidence: dict[str, Counter[int]] = field(default_factory=dict)
    """Regions by source and tenth of their confidence."""
    side_px: Counter[int] = field(default_factory=Counter)
    """Regions by bin of their longer side: SIZE_BINS_PER_OCTAVE bins a doubling."""
    side_mm: Counter[int] = field(default_factory=Counter)
    area_share: Counter[int] = field(default_factory=Counter)
    """Regions by bin of the share of the picture that their box covers."""
    image_side_px: Counter[int] = field(default_factory=Counter)
    num_masks: int = 0
    """Regions that have a mask."""
    num_with_frames: int = 0
    """Images with context frames."""
    trust: Counter[int] = field(default_factory=Counter)
    """Labels of regions and images by tenth of their trust."""
    labels: dict[str, dict[str, LabelCounts]] = field(default_factory=lambda: {"region": {}, "image": {}})
    num_names_left_out: int = 0
    """Labels whose name came after MAX_NAMES others."""
    patients: dict[str, _Distinct] = field(default_factory=dict)
    """By split."""
    studies: _Distinct = field(default_factory=lambda: _Distinct())

    def add(self, rows: pa.Table) -> None:
        """Counts a table with the TALLY_COLUMNS."""
        regions = rows["regions"].combine_chunks()
        lengths = np.asarray(pc.fill_null(pc.list_value_length(regions), 0))
        self.num_images += len(rows)
        self.num_regions += int(lengths.sum())
        self.num_without_regions += int((lengths == 0).sum())
        self.num_with_frames += len(rows) - rows["frames"].null_count
        self.regions_per_image.update(_counted(lengths))
        self._add_rows(rows, lengths)
        owner = np.repeat(np.arange(len(rows)), lengths)
        self._add_regions(rows, pc.list_flatten(regions), owner)
        self._add_labels("region", pc.list_flatten(pc.struct_field(pc.list_flatten(regions), "labels")))
        self._add_labels("image", pc.list_flatten(rows["labels"].combine_chunks()))
        self._add_patients(rows)

    @property
    def num_patients(self) -> int | None:
        """Patients in all; None where rows name none."""
        if not any(len(p.numbers()) for p in self.patients.values()):
            return None
        return len(np.unique(np.concatenate([p.numbers() for p in self.patients.values()])))

    @property
    def num_shared_patients(self) -> int:
        """Patients that occur in more than one split."""
        each = [p.numbers() for p in self.patients.values()]
        return sum(len(p) for p in each) - len(np.unique(np.concatenate(each))) if each else 0

    def _add_rows(self, rows: pa.Table, lengths: NDArray[np.int64]) -> None:
        for name in ("recipe", "stored_bits", "photometric", "decoder", "burned_in_annotation", "licence", "egress"):
            self._count(name, rows[name])
        for name, values in (("spacing", rows["pixel_spacing_mm"]), ("orientation", rows["orientation"])):
            self._count(name, pc.is_valid(values))
        self.image_side_px.update(size_bins(np.maximum(rows["width"].to_numpy(), rows["height"].to_numpy())))
        keys = zip(*(rows[name].to_pylist() for name in ("dataset", "modality", "split")), strict=True)
        for key, num in zip(keys, lengths.tolist(), strict=True):
            self.groups["images", *key] += 1
            self.groups["regions", *key] += num

    def _count(self, name: str, values: pa.ChunkedArray) -> None:
        counter = self.rows.setdefault(name, Counter())
        for entry in pc.value_counts(values).to_pylist():
            counter[entry["values"]] += entry["counts"]

    def _add_regions(self, rows: pa.Table, regions: pa.StructArray, owner: NDArray[np.int64]) -> None:
        if not len(regions):
            return
        boxes = np.asarray(pc.struct_field(regions, "box").flatten()).reshape(-1, 4)
        sides = boxes[:, 2:] - boxes[:, :2]
        width, height = (rows[name].to_numpy()[owner] for name in ("width", "height"))
        self.num_masks += len(regions) - pc.struct_field(regions, "mask").null_count
        self.side_px.update(size_bins(sides.max(axis=1)))
        self.area_share.update(size_bins(sides.prod(axis=1) / (width * height)))
        spacing = spacings(rows)[owner]
        sides_mm = sides * spacing[:, ::-1]  # spacing is (row, column): rows are apart along y
        self.side_mm.update(size_bins(sides_mm.max(axis=1)[np.isfinite(spacing).all(axis=1)]))
        sources = np.array(pc.struct_field(regions, "source").to_pylist(), dtype=object)
        self.sources.update(sources.tolist())
        confidence = pc.struct_field(regions, "confidence").to_numpy(zero_copy_only=False).astype(np.float64)
        for source in set(sources):
            mine = confidence[(sources == source) & np.isfinite(confidence)]
            if len(mine):
                self.confidence.setdefault(source, Counter()).update(tenths(mine))

    def _add_labels(self, of: str, labels: pa.StructArray) -> None:
        if not len(labels):
            return
        kept = self.labels[of]
        trust = pc.struct_field(labels, "trust")
        self.trust.update(tenths(pc.drop_null(trust).to_numpy(zero_copy_only=False)))
        table = pa.table(
            {
                "name": pc.struct_field(labels, "name"), "value": pc.struct_field(labels, "value"), "trust": trust,
                "unanimous": pc.greater_equal(trust, 0.9995),
            }
        )  # fmt: skip
        sums = [("trust", "count"), ("trust", "sum"), ("unanimous", "sum"), ("name", "count")]
        for row in table.group_by(["name", "value"]).aggregate(sums).to_pylist():
            if row["name"] not in kept and len(kept) >= MAX_NAMES:
                self.num_names_left_out += row["name_count"]
                continue
            counts = kept.setdefault(row["name"], LabelCounts())
            full = row["value"] not in counts.values and len(counts.values) >= MAX_VALUES
            counts.values[OTHER if full else row["value"]] += row["name_count"]
            counts.num_trusted += row["trust_count"]
            counts.sum_trust += row["trust_sum"] or 0.0
            counts.num_unanimous += row["unanimous_sum"] or 0

    def _add_patients(self, rows: pa.Table) -> None:
        splits = np.array(rows["split"].to_pylist(), dtype=object)
        keys = np.array(rows["patient_key"].to_pylist(), dtype=object)
        for split in set(splits):
            self.patients.setdefault(split, _Distinct()).add(keys[splits == split])
        self.studies.add(np.array(rows["study_key"].to_pylist(), dtype=object))


class _Distinct:
    """How many different keys there were, at 8 bytes each."""

    def __init__(self) -> None:
        self._numbers = np.empty(0, np.uint64)
        self._new: set[int] = set()

    def add(self, keys: NDArray[Any]) -> None:
        """Adds keys; None is no key."""
        for key in keys:
            if key is not None:
                self._new.add(int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big"))
        if len(self._new) > 1 << 18:
            self.numbers()

    def numbers(self) -> NDArray[np.uint64]:
        """The keys as sorted numbers."""
        if self._new:
            self._numbers = np.union1d(self._numbers, np.fromiter(self._new, np.uint64, len(self._new)))
            self._new = set()
        return self._numbers

    def __len__(self) -> int:
        return len(self.numbers())


def size_bins(sizes: NDArray[Any]) -> Counter[int]:
    """Sizes by the number of their logarithmic bin; bin b begins at 2 ** (b / SIZE_BINS_PER_OCTAVE)."""
    positive = sizes[sizes > 0].astype(np.float64)
    return _counted(np.floor(np.log2(positive) * SIZE_BINS_PER_OCTAVE + 1e-9))


def tenths(values: NDArray[Any]) -> Counter[int]:
    """Values of 0 to 1 by tenth: 0 for those below 0.1, 9 for those from 0.9 on, 1 among them."""
    return _counted(np.clip(np.floor(np.asarray(values, np.float64) * TRUST_BINS + 1e-6), 0, TRUST_BINS - 1))


def spacings(rows: pa.Table) -> NDArray[np.float64]:
    """(rows, 2) spacing of rows and columns in mm; NaN where unknown."""
    known = rows["pixel_spacing_mm"].to_pylist()
    return np.array([s if s is not None and len(s) == 2 else (np.nan, np.nan) for s in known]).reshape(-1, 2)


def _counted(values: NDArray[Any]) -> Counter[int]:
    numbers, counts = np.unique(values.astype(np.int64), return_counts=True)
    return Counter(dict(zip(numbers.tolist(), counts.tolist(), strict=True)))
