"""The VinDr-CXR source: chest films with boxes of three readers each, or of their consensus.

    meddam ingest vindr-cxr vindr-cxr/1.0.0 --out s3://bucket/vindr                 # PhysioNet: train and test
    meddam ingest vindr-cxr vinbigdata --classes 14 --out s3://bucket/vinbigdata    # Kaggle: train.csv

Layouts, told apart by their tables:
- PhysioNet: annotations/annotations_{train,test}.csv, annotations/image_labels_{train,test}.csv, {train,test}/ID.dicom
- Kaggle: train.csv, train/ID.dicom

Training films were read by three of 17 readers each: their boxes of one finding are fused (regions.fusion), and how
many drew one decides present or undecided. Test films have one set of boxes, a consensus of five, and no reader.

Labels of a region: `finding`; the finding by its own name, present or undecided; every finding that no reader saw
anywhere on the film, absent; findings whose boxes overlap this one, or that only the film as a whole has, undecided.
With the film's orientation known and its thorax found: `side` and `zone`. Labels of the image: all findings, by votes.

Invariants:
- who read what stays here: reader ids are numbered for the length of an item, and nothing of them is in it;
- readers split the films unevenly, so that their ids alone tell normal from abnormal: they must never be a feature.
"""

from __future__ import annotations

import csv
import hashlib
import io
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from meddam_core import storage
from meddam_core.datasets.base import Problem, Source, SourceItem, SourceRegion, load_file
from meddam_core.datasets.grouping import Groups, grouped
from meddam_core.datasets.vindr_findings import (
    GLOBAL,
    MIDLINE,
    NO_FINDING,
    ONE_EACH,
    NumClasses,
    as_class,
    classes,
    finding,
    image_labels,
    verdict,
)
from meddam_core.imaging.decoded import Decoded
from meddam_core.imaging.limits import Limits
from meddam_core.imaging.render import render
from meddam_core.records import Egress, Label, Reason, RowError
from meddam_core.regions.fusion import MIN_OVERLAP, Corners, FusedBox, ReaderBox, fuse_boxes
from meddam_core.regions.thorax import film_midline, find_thorax, lung_zone, patient_side

VERSION = 1
"""Of what this adapter makes of the same tables."""
SPLITS = ("train", "test")
USUAL = "L\\F"
"""Orientation of a frontal film as it is hung: columns go to the patient's left, rows to the feet."""
_SUFFIXES = (".dicom", ".dcm", ".png")
_CORNERS = ("x_min", "y_min", "x_max", "y_max")
_BOX, _WHOLE = "box", "whole"

Split = Literal["train", "test"]
Boxes = Literal["fused", "raw"]
Orientation = Literal["header", "usual"]


@dataclass(frozen=True, slots=True, kw_only=True)
class VindrCxr(Source):
    """VinDr-CXR as PhysioNet or Kaggle gives it out."""

    path: str
    """The folder that holds the tables, on S3 or disk."""
    images: str | None = None
    """Folder of the films, or of their `train` and `test` folders; None takes `path`."""
    split: Split | None = None
    """Only this split; None takes those there are."""
    num_classes: NumClasses = 22
    boxes: Boxes = "fused"
    """raw: each reader's box is a region of its own."""
    min_overlap: float = MIN_OVERLAP
    """Intersection over union from which boxes of several readers are of one place."""
    min_votes: int = 1
    """Readers that must have drawn a region; of a consensus one is enough."""
    normals: bool = False
    """Whether films without a finding become rows, without regions."""
    orientation: Orientation = "header"
    """usual: films whose header doesn't say how they hang are taken to hang as usual, for side and zone."""
    dataset: str = "vindr-cxr"
    licence: str = "PhysioNet Credentialed Health Data License 1.5.0"
    egress: Egress = "deny"

    def fingerprint(self) -> str:
        """Of the settings, the tables and the films' names. The films themselves are not read."""
        digest = hashlib.sha256(f"{VERSION} {self!r}".encode())
        for split, tables in self._tables().items():
            for table in tables:
                digest.update(storage.read_bytes(table))
            for entry in sorted(self._films(split).items()):
                digest.update(repr(entry).encode())
        return digest.hexdigest()

    def items(self) -> Iterator[SourceItem]:
        """One item a film, in the tables' order. Raises ValueError where there are no tables or not VinDr-CXR's."""
        with grouped() as groups:
            tables = self._tables()
            for split, (annotations, *image_tables) in tables.items():
                _add_boxes(groups, split, annotations)
                for table in image_tables:
                    _add_image_labels(groups, split, table)
            films = {split: self._films(split) for split in tables}
            for name, rows in groups:
                split, _, image_id = name.partition("/")
                yield self._item(split, image_id, films[split].get(image_id), rows)

    def load(self, item: SourceItem, limits: Limits) -> tuple[Decoded, list[SourceRegion]]:
        """The film, and its regions with side and zone where they can be told. Raises RowError."""
        decoded = load_file(item, limits)
        boxes = [region.box for region in item.regions if region.box is not None]
        beyond = any(box[2] > decoded.width + 1 or box[3] > decoded.height + 1 for box in boxes)
        if beyond and (item.uri or "").endswith(".png"):
            raise RowError(Reason.BOX_OUTSIDE, "boxes reach beyond the picture: it is not of the original film's size")
        orientation = decoded.orientation or (USUAL if self.orientation == "usual" else None)
        if orientation is None or not boxes:
            return decoded, item.regions
        return decoded, _with_places(item.regions, decoded, orientation)

    def _tables(self) -> dict[str, list[str]]:
        """Split -> its tables, boxes first."""
        found: dict[str, list[str]] = {}
        for split in SPLITS if self.split is None else (self.split,):
            for folder in (storage.join(self.path, "annotations"), self.path):
                boxes = storage.join(folder, f"annotations_{split}.csv")
                if _is_there(boxes):
                    whole = storage.join(folder, f"image_labels_{split}.csv")
                    found[split] = [boxes, whole] if _is_there(whole) else [boxes]
                    break
        kaggle = storage.join(self.path, "train.csv")
        if not found and self.split != "test" and _is_there(kaggle):
            found["train"] = [kaggle]
        if not found:
            raise ValueError(
                f"{self.path} holds no tables of VinDr-CXR: PhysioNet's are annotations/annotations_train.csv and "
                "annotations_test.csv, Kaggle's is train.csv; give the folder that holds them"
            )
        return found

    def _films(self, split: str) -> dict[str, str]:
        """Image id -> URI of its film."""
        root = self.images or self.path
        for folder in (storage.join(root, split), root):
            names = [i.base_name for i in storage.list_files(folder) if i.base_name.endswith(_SUFFIXES)]
            if names:
                return {name.rpartition(".")[0]: storage.join(folder, name) for name in names}
        return {}

    def _item(self, split: str, image_id: str, uri: str | None, rows: list[dict[str, Any]]) -> SourceItem:
        film = _Film(rows, self.num_classes)
        regions = list(self._regions(film))
        problems = list(film.problems)
        if not regions and not problems and not self.normals:
            problems = [Problem(reason=Reason.NO_REGIONS, detail="no reader marked a finding on the film")]
        if uri is None:
            problems = [Problem(reason=Reason.NOT_FOUND, detail="the film is not there")]
        return SourceItem(
            key=f"{split}/{image_id}", uri=uri, regions=regions, problems=problems, split=split, recipe="vindr-cxr",
            modality="DX" if uri is not None and uri.endswith(".png") else None,
            labels=image_labels(
                film.votes, (*classes(self.num_classes), *film.known_globally), film.num_readers, film.consensus
            ),
        )  # fmt: skip

    def _regions(self, film: _Film) -> Iterator[SourceRegion]:
        fused = {
            name: fuse_boxes(drawn, 0.0 if name in ONE_EACH else self.min_overlap) for name, drawn in film.boxes.items()
        }  # fmt: skip
        ordinal = 0
        for name, places in sorted(fused.items()):
            for place in places:
                if place.num_readers < self.min_votes and not film.consensus:
                    continue
                labels = _labels(name, place, fused, film, classes(self.num_classes))
                share = verdict(place.num_readers, film.num_readers, film.consensus)[1]
                drawn = [place.box] if self.boxes == "fused" else [film.boxes[name][i].box for i in place.members]
                for box in sorted(drawn):
                    yield SourceRegion(
                        ordinal=ordinal, box=list(box), labels=labels, confidence=share,
                        source="consensus" if self.boxes == "fused" or film.consensus else "annotation",
                    )  # fmt: skip
                    ordinal += 1


class _Film:
    """What the tables say about one film, its readers numbered."""

    def __init__(self, rows: list[dict[str, Any]], num_classes: NumClasses) -> None:
        readers = sorted({row["reader"] for row in rows})
        number = {reader: i for i, reader in enumerate(readers)}
        self.consensus = readers == [""]
        self.num_readers = len(readers)
        self.boxes: dict[str, list[ReaderBox]] = defaultdict(list)
        self.problems: list[Problem] = []
        seen: dict[str, set[int]] = defaultdict(set)
        for ordinal, row in enumerate(rows):
            reader = number[row["reader"]]
            for name in row.get("names", []):
                seen[as_class(name, num_classes)].add(reader)
            if row["kind"] == _BOX and row.get("name") != NO_FINDING:
                box = _corners(row)
                if box is None or row.get("name") is None or row["name"] in GLOBAL:
                    detail = "a box is not four numbers" if box is None else "a box has a label that is no finding"
                    self.problems.append(Problem(reason=Reason.BAD_ANNOTATION, detail=detail, region=ordinal))
                    continue
                name = as_class(row["name"], num_classes)
                seen[name].add(reader)
                self.boxes[name].append(ReaderBox(reader=reader, box=box))
            elif row["kind"] == _BOX:
                seen[NO_FINDING].add(reader)
        # Kaggle's table names no diseases: of those nothing is known
        self.known_globally = GLOBAL if any(row["kind"] == _WHOLE for row in rows) else (NO_FINDING,)
        self.votes = {name: len(readers) for name, readers in seen.items()}


def _corners(row: Mapping[str, Any]) -> Corners | None:
    try:
        x0, y0, x1, y1 = (float(row[c]) for c in _CORNERS)
    except (KeyError, TypeError, ValueError):
        return None
    return (x0, y0, x1, y1) if x1 > x0 and y1 > y0 else None  # NaN compares as false


def _labels(
    name: str, place: FusedBox, fused: Mapping[str, list[FusedBox]], film: _Film, names: tuple[str, ...]
) -> list[Label]:  # fmt: skip
    """What is known about a place: its own finding, and each other finding of the film."""
    state, trust = verdict(place.num_readers, film.num_readers, film.consensus)
    labels = [Label(name="finding", value=name, trust=trust), Label(name=name, value=state, trust=trust)]
    for other in names:
        votes = film.votes.get(other, 0)
        if other == name:
            continue
        if votes == 0:
            state, trust = verdict(0, film.num_readers, film.consensus)
            labels.append(Label(name=other, value=state, trust=trust))
        elif other not in fused or any(_overlap(place.box, box.box) for box in fused[other]):
            labels.append(Label(name=other, value="undecided", trust=votes / film.num_readers))
    return labels


def _overlap(a: Corners, b: Corners) -> bool:
    return min(a[2], b[2]) > max(a[0], b[0]) and min(a[3], b[3]) > max(a[1], b[1])


def _with_places(regions: list[SourceRegion], decoded: Decoded, orientation: str) -> list[SourceRegion]:
    """The regions with `side` and `zone`, where the thorax is found and the finding can have them."""
    thorax = find_thorax(render(decoded)[..., 0])
    if thorax is None:
        return regions
    midline, placed = film_midline(thorax), []
    for region in regions:
        found: list[Label] = []
        name = next(label.value for label in region.labels if label.name == "finding")
        if region.box is not None and name not in MIDLINE:
            side = patient_side(region.box, midline, orientation)
            zone = lung_zone(region.box, thorax) if orientation.partition("\\")[2][:1] == "F" else None
            values = {"side": side, "zone": zone}
            found = [Label(name=k, value=v, trust=thorax.confidence) for k, v in values.items() if v is not None]
        placed.append(replace(region, labels=[*region.labels, *found]))
    return placed


def _is_there(uri: str) -> bool:
    try:
        return storage.exists(uri)
    except OSError as error:
        raise ValueError(f"the tables cannot be read: {storage.explain(uri, error)}") from error


def _add_boxes(groups: Groups, split: str, table: str) -> None:
    for row in _rows(table, ("image_id", "class_name", *_CORNERS)):
        name = finding(row["class_name"])
        values = {c: row[c] for c in _CORNERS if row[c]}
        groups.add(
            f"{split}/{row['image_id']}", {"kind": _BOX, "reader": row.get("rad_id", ""), "name": name, **values}
        )  # fmt: skip


def _add_image_labels(groups: Groups, split: str, table: str) -> None:
    for row in _rows(table, ("image_id",)):
        names = [name for column, value in row.items() if value in ("1", "1.0") and (name := finding(column))]
        groups.add(f"{split}/{row['image_id']}", {"kind": _WHOLE, "reader": row.get("rad_id", ""), "names": names})


def _rows(table: str, needed: tuple[str, ...]) -> Iterator[dict[str, str]]:
    """The table's lines; the reader's column is `rad_id` whatever its case. Raises ValueError for other tables."""
    fs, path = storage.open_uri(table)
    with fs.open_input_file(path) as stream, io.TextIOWrapper(stream, encoding="utf-8-sig", newline="") as text:
        lines = csv.DictReader(text)
        missing = [c for c in needed if c not in (lines.fieldnames or [])]
        if missing:
            raise ValueError(f"{table} has no column {missing[0]!r}; it is not a table of VinDr-CXR")
        for line in lines:
            row = {k: v or "" for k, v in line.items() if isinstance(k, str) and not isinstance(v, list)}
            if not row["image_id"]:
                continue
            reader = next((v for k, v in row.items() if k.lower() == "rad_id"), "")
            yield {**row, "rad_id": reader}
