"""VinDr-CXR's findings, and what votes of several readers make of them.

    state, trust = verdict(votes=1, num_readers=3)        # ("undecided", 1/3)

Source: Nguyen et al., VinDr-CXR, Sci Data 9:429 (2022); names as in its PhysioNet and Kaggle tables.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

from meddam_core.records import Label

LOCAL = (
    "Aortic enlargement", "Atelectasis", "Calcification", "Cardiomegaly", "Clavicle fracture", "Consolidation", "Edema",
    "Emphysema", "Enlarged PA", "ILD", "Infiltration", "Lung Opacity", "Lung cavity", "Lung cyst", "Mediastinal shift",
    "Nodule/Mass", "Pleural effusion", "Pleural thickening", "Pneumothorax", "Pulmonary fibrosis", "Rib fracture",
    "Other lesion",
)  # fmt: skip
"""The 22 findings that are drawn as boxes."""
NOT_ON_KAGGLE = frozenset({
    "Clavicle fracture", "Edema", "Emphysema", "Enlarged PA", "Lung cavity", "Lung cyst", "Mediastinal shift",
    "Rib fracture",
})  # fmt: skip
"""With 14 classes these count as "Other lesion", which Kaggle describes as all that its list does not name."""
GLOBAL = ("COPD", "Lung tumor", "Pneumonia", "Tuberculosis", "Other disease", "No finding")
"""Labels of whole images."""
NO_FINDING = "No finding"
OTHER = "Other lesion"
ONE_EACH = frozenset({"Aortic enlargement", "Cardiomegaly"})
"""There is one aorta and one heart: boxes of several readers that touch at all are of the same."""
MIDLINE = frozenset({"Aortic enlargement", "Cardiomegaly", "Enlarged PA", "Mediastinal shift"})
"""Findings that are on no side and in no zone."""

NumClasses = Literal[14, 22]

_BY_NAME = {"".join(filter(str.isalnum, name.lower())): name for name in (*LOCAL, *GLOBAL)}
_BY_NAME["otherdiseases"] = "Other disease"  # as the training table calls it; the test table says "Other disease"


def finding(name: str) -> str | None:
    """The finding that a table's text names, however it writes it; None for anything else."""
    return _BY_NAME.get("".join(filter(str.isalnum, name.lower())))


def classes(num_classes: NumClasses) -> tuple[str, ...]:
    """The findings that regions can have."""
    return LOCAL if num_classes == 22 else tuple(name for name in LOCAL if name not in NOT_ON_KAGGLE)


def as_class(name: str, num_classes: NumClasses) -> str:
    """The class that a local finding counts as."""
    return OTHER if num_classes == 14 and name in NOT_ON_KAGGLE else name


def verdict(votes: int, num_readers: int, consensus: bool = False) -> tuple[str, float]:
    """(present | absent | undecided, share of readers who say so).

    Present with two votes or more, absent with none of at least three readers, undecided between. A consensus of
    readers (the test split) is one vote that decides.
    """
    if consensus:
        return ("present" if votes else "absent"), 1.0
    if votes == 0:
        return ("absent" if num_readers >= 3 else "undecided"), 1.0
    return ("present" if votes >= 2 else "undecided"), votes / num_readers


def image_labels(
    votes: Mapping[str, int], names: Iterable[str], num_readers: int, consensus: bool
) -> list[Label]:  # fmt: skip
    """A label a name, for the image as a whole."""
    labels = []
    for name in names:
        state, trust = verdict(votes.get(name, 0), num_readers, consensus)
        labels.append(Label(name=name, value=state, trust=trust))
    return labels
