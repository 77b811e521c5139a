"""A miniature VinDr-CXR in PhysioNet's and in Kaggle's layout: synthetic films and tables with the real columns.

The real tables' traps are in: a float for every coordinate, empty boxes for "No finding", "Other diseases" in the
training table and "Other disease" in the test table, no reader in the test tables, `.dicom` as suffix.
"""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from typing import Any

from meddam_core import storage
from meddam_core.datasets.phantoms import Options, make_phantom
from meddam_core.datasets.vindr_findings import LOCAL
from tests.meddam_core.datasets.made_dicom import film

SIZE_PX = 512
READERS = ("R8", "R9", "R10")
KAGGLE_IDS = (
    "Aortic enlargement", "Atelectasis", "Calcification", "Cardiomegaly", "Consolidation", "ILD", "Infiltration",
    "Lung Opacity", "Nodule/Mass", "Other lesion", "Pleural effusion", "Pleural thickening", "Pneumothorax",
    "Pulmonary fibrosis", "No finding",
)  # fmt: skip

Drawn = tuple[str, str, tuple[float, float, float, float] | None]
"""(reader, class, box)."""


@dataclass(frozen=True, kw_only=True)
class MadeFilm:
    """A film and what was read on it."""

    image_id: str
    drawn: tuple[Drawn, ...]
    diseases: tuple[tuple[str, str], ...] = ()
    """(reader, global label)."""
    inverted: bool = False
    orientation: tuple[str, str] | None = ("L", "F")
    index: int = 0
    """Which phantom its pixels are of."""


TRAIN = (
    MadeFilm(
        image_id="9a5094b2563a1ef3ff50dc5c7ff71345",
        drawn=(
            ("R8", "Pleural effusion", (60.0, 300.0, 160.0, 380.0)),
            ("R9", "Pleural effusion", (64.0, 296.0, 164.0, 384.0)),
            ("R10", "Pleural effusion", (62.0, 304.0, 156.0, 382.0)),
            ("R8", "Nodule/Mass", (340.0, 130.0, 370.0, 160.0)),
            ("R9", "Cardiomegaly", (190.0, 260.0, 340.0, 380.0)),
            ("R10", "Cardiomegaly", (250.0, 270.0, 380.0, 390.0)),
            ("R10", "Lung Opacity", (70.0, 310.0, 150.0, 370.0)),
            ("R9", "Rib fracture", (400.0, 200.0, 430.0, 220.0)),
        ),
        diseases=(("R8", "Pneumonia"), ("R9", "Pneumonia"), ("R10", "Other diseases")),
        inverted=True,
    ),
    MadeFilm(
        image_id="051132a778e61a86eb147c7c6f564dfe",
        drawn=tuple((reader, "No finding", None) for reader in READERS),
        diseases=tuple((reader, "No finding") for reader in READERS),
        index=1,
    ),
    MadeFilm(
        image_id="c0ffee00000000000000000000000000",
        drawn=(
            ("R8", "Consolidation", (340.0, 300.0, 420.0, 380.0)),
            ("R9", "Consolidation", (340.0, 300.0, 420.0, 380.0)),
            ("R8", "Lung Opacity", (100.0, 100.0, 4000.0, 4200.0)),
            ("R10", "No finding", None),
        ),
        orientation=None,
        index=2,
    ),
)
TEST = (
    MadeFilm(
        image_id="008bdde2af2462e86fd373a445d0f4cd",
        drawn=(("", "Edema", (100.0, 150.0, 180.0, 300.0)), ("", "ILD", (330.0, 150.0, 420.0, 350.0))),
        diseases=(("", "Other disease"),),
        index=3,
    ),
)


def make_physionet(root: str) -> str:
    """Writes both splits below `root`, on S3 or disk; returns it."""
    for split, films in (("train", TRAIN), ("test", TEST)):
        other = "Other diseases" if split == "train" else "Other disease"
        reader_column = ["rad_id"] if split == "train" else []
        diseases = ["COPD", "Lung tumor", "Pneumonia", "Tuberculosis", other, "No finding"]
        boxes: list[dict[str, Any]] = []
        whole: list[dict[str, Any]] = []
        for made in films:
            boxes += [_line(made, reader, name, box) for reader, name, box in made.drawn]
            for reader in READERS if split == "train" else ("",):
                seen = {n for r, n, _ in made.drawn if r == reader} | {n for r, n in made.diseases if r == reader}
                flags = {name: int(name in seen) for name in (*LOCAL, *diseases)}
                whole.append({"image_id": made.image_id, "rad_id": reader, **flags})
            storage.write_bytes(storage.join(root, split, f"{made.image_id}.dicom"), pixels(made))
        columns = ["image_id", *reader_column, "class_name", "x_min", "y_min", "x_max", "y_max"]
        _table(storage.join(root, "annotations", f"annotations_{split}.csv"), columns, boxes)
        flags_columns = ["image_id", *reader_column, *LOCAL, *diseases]
        _table(storage.join(root, "annotations", f"image_labels_{split}.csv"), flags_columns, whole)
    return root


def make_kaggle(root: str) -> str:
    """Writes Kaggle's train.csv and films below `root`; returns it."""
    lines = []
    for made in TRAIN:
        for reader, name, box in made.drawn:
            known = name if name in KAGGLE_IDS else "Other lesion"
            lines.append({**_line(made, reader, known, box), "class_id": KAGGLE_IDS.index(known)})
        storage.write_bytes(storage.join(root, "train", f"{made.image_id}.dicom"), pixels(made))
    columns = ["image_id", "class_name", "class_id", "rad_id", "x_min", "y_min", "x_max", "y_max"]
    _table(storage.join(root, "train.csv"), columns, lines)
    return root


def pixels(made: MadeFilm) -> bytes:
    """The film as a DICOM file."""
    phantom = make_phantom("chest", seed=11, index=made.index, options=Options(size=SIZE_PX))
    stored = phantom.stored
    if (phantom.photometric == "MONOCHROME1") != made.inverted:
        stored = 4095 - stored
    orientation = None if made.orientation is None else list(made.orientation)
    return film(stored, image_id=made.image_id, inverted=made.inverted, orientation=orientation)


def _line(made: MadeFilm, reader: str, name: str, box: tuple[float, float, float, float] | None) -> dict[str, Any]:
    corners = dict(zip(("x_min", "y_min", "x_max", "y_max"), box or ("",) * 4, strict=True))
    return {"image_id": made.image_id, "rad_id": reader, "class_name": name, **corners}


def _table(uri: str, columns: list[str], lines: list[dict[str, Any]]) -> None:
    text = io.StringIO()
    table = csv.DictWriter(text, columns, extrasaction="ignore")
    table.writeheader()
    table.writerows(lines)
    storage.write_bytes(uri, text.getvalue().encode())
