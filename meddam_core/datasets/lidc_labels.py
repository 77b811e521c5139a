"""What is known about a LIDC nodule, as labels: grades with the share of readers behind them, and sizes.

| label                   | value                                                               | trust              |
|-------------------------|---------------------------------------------------------------------|--------------------|
| finding                 | nodule; mass where the longest diameter is above 30 mm              | who marked it, of 4 |
| subtlety, sphericity, margin, lobulation, spiculation, texture, malignancy | median grade, 1 to 5 | who agrees |
| internalStructure       | soft tissue, fluid, fat, air: the mode; undecided in a tie          | who gave it        |
| calcification           | popcorn ... central, absent: the mode; undecided in a tie           | who gave it        |
| longest_diameter_mm     | median of the longest in-plane diameter                             | none               |
| mean_diameter_mm        | median of the mean of the longest diameter and the one across it    | none               |

Readers agree with a median of 4 and more by a grade of 4 or 5, with one of 2 and less by 1 or 2, with all between by 3;
for texture and sphericity, whose grades are kinds, by the same grade. Two things hold trust below any use as truth:
- lobulation, spiculation or calcification that most readers call absent, but one saw: 0.4 at most;
- spiculation and lobulation in scans of the first 399 cases, about 100 of which were graded on other scales (TCIA's
  wiki): 0.25 at most.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from meddam_core.datasets.lidc_annotations import GRADES
from meddam_core.datasets.lidc_nodules import MAX_READERS, Nodule, diameters
from meddam_core.datasets.lidc_table import modes
from meddam_core.records import Label

MASS_MM = 30.0
"""A nodule is at most this long, a mass longer (Fleischner Society glossary)."""
OTHER_SCALE_TRUST = 0.25
DISPUTED_TRUST = 0.4
NAMES: dict[str, tuple[str, ...]] = {
    "internalStructure": ("soft tissue", "fluid", "fat", "air"),
    "calcification": ("popcorn", "laminated", "solid", "non-central", "central", "absent"),
}
"""Grades that are names, from 1 (the readers' form, as in pylidc 0.2.3)."""
_UNDECIDED = "undecided"
_KINDS = ("texture", "sphericity")
_MUST_BE_UNANIMOUS = ("lobulation", "spiculation")
"""A finding that one reader saw is not absent."""


def nodule_labels(nodule: Nodule) -> list[Label]:
    """The labels of a nodule's region."""
    sizes = [diameters(nodule.scan, reading) for reading in nodule.readings]
    longest = statistics.median(size.longest_mm for size in sizes)
    mean = statistics.median(size.mean_mm for size in sizes)
    marked = min(len(nodule.readings), MAX_READERS) / MAX_READERS
    labels = [Label(name="finding", value="mass" if longest > MASS_MM else "nodule", trust=marked)]
    for name, (lowest, highest) in GRADES.items():
        grades = [r.grades[name] for r in nodule.readings if lowest <= r.grades[name] <= highest]
        if grades:
            labels.append(_named(name, grades) if name in NAMES else _graded(nodule, name, grades))
    return [
        *labels,
        Label(name="longest_diameter_mm", value=f"{longest:.1f}"),
        Label(name="mean_diameter_mm", value=f"{mean:.1f}"),
    ]


def _named(name: str, grades: Sequence[int]) -> Label:
    found = modes(grades)
    value = NAMES[name][found[0] - 1]
    trust = grades.count(found[0]) / len(grades)
    if value == "absent" and len(set(grades)) > 1:
        trust = min(trust, DISPUTED_TRUST)
    return Label(name=name, value=_UNDECIDED if len(found) > 1 else value, trust=trust)


def _graded(nodule: Nodule, name: str, grades: Sequence[int]) -> Label:
    median = statistics.median(grades)
    agreeing = [g == median for g in grades] if name in _KINDS else [_side(g) == _side(median) for g in grades]
    trust = sum(agreeing) / len(grades)
    if name in _MUST_BE_UNANIMOUS and median <= 2 and max(grades) > 2:
        trust = min(trust, DISPUTED_TRUST)
    if name in _MUST_BE_UNANIMOUS and nodule.scan.is_from_initial:
        trust = min(trust, OTHER_SCALE_TRUST)
    return Label(name=name, value=f"{median:g}", trust=trust)


def _side(grade: float) -> int:
    """Low, between, high."""
    return -1 if grade <= 2 else 1 if grade >= 4 else 0
