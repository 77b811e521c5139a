"""The manifest source: a JSONL or CSV file with an image, or one of its regions, on each line.

    {"image": "films/a.dcm", "box": [812, 400, 1010, 655], "labels": {"finding": "nodule", "margin": "spiculated"}}
    {"image": "films/a.dcm", "mask": "masks/a-2.png", "label": "effusion", "split": "test", "patient_id": "P1"}
    {"image": "s3://bucket/b.png", "regions": [{"box": [1, 2, 30, 40]}, {"mask": {"size": [480, 640], "counts": "x"}}]}

    image,box,label
    films/a.dcm,"812,400,1010,655",nodule

| column           | what it holds                                                                          |
|------------------|----------------------------------------------------------------------------------------|
| image            | path or URI, relative to the manifest or to `root`; needed                             |
| id               | a name for the image; one name, one image                                              |
| frame            | which frame of a multi-frame file, from 0                                              |
| box              | x0, y0, x1, y1 in pixels, half-open                                                    |
| mask             | COCO run lengths, a polygon or polygons, or the path of a picture of the image's size  |
| label, labels    | names that are present (CSV: by ";"), {name: value}, or [{name, value, trust}]; on a   |
|                  | line without box and mask they are the whole image's                                   |
| confidence       | of the region, 0 to 1                                                                  |
| regions          | (JSONL) several regions on one line, each with box, mask, label, labels, confidence    |
| split, modality, licence, patient_id, study_id | facts about the image                                    |
| pixel_spacing_mm | row and column spacing, where the file gives none                                      |

Lines of one image (and frame) belong together wherever they stand. Columns of another name are an error.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from meddam_core import storage
from meddam_core.datasets.base import Problem, Source, SourceItem, SourceRegion
from meddam_core.datasets.grouping import Groups, grouped
from meddam_core.records import Egress, Label, Reason

REGION_COLUMNS = ("box", "mask", "label", "labels", "confidence")
IMAGE_COLUMNS = ("id", "split", "patient_id", "study_id", "modality", "licence", "pixel_spacing_mm")
COLUMNS = ("image", "frame", *REGION_COLUMNS, "regions", *IMAGE_COLUMNS)

_BROKEN = "\0broken line "


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest(Source):
    """Images and regions listed in a JSONL (.jsonl, .ndjson) or CSV (.csv, .tsv) file."""

    path: str
    """The manifest, on S3 or disk."""
    root: str | None = None
    """Folder that relative paths start from; by default the manifest's own."""
    dataset: str = "manifest"
    licence: str = "unknown"
    egress: Egress = "deny"

    def fingerprint(self) -> str:
        """Of the manifest's bytes. The images themselves are not read."""
        digest = hashlib.sha256(repr(self).encode())
        with _open(self.path) as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
        return digest.hexdigest()

    def items(self) -> Iterator[SourceItem]:
        """One item an image and frame. Raises ValueError for unknown columns or a file of another kind."""
        root = self.root or (self.path.rsplit("/", 1)[0] if "/" in self.path else ".")
        with grouped() as groups:
            for number, line in enumerate(_lines(self.path)):
                if line is None:
                    groups.add(f"{_BROKEN}{number}", {})
                else:
                    groups.add(json.dumps([line.get("image"), line.get("frame")]), line)
            for name, lines in groups:
                yield _broken() if name.startswith(_BROKEN) else item_of(lines, root, groups)


def item_of(lines: list[dict[str, Any]], root: str, groups: Groups | None) -> SourceItem:
    """The item of all lines of one image. `groups` knows which image owns an id; None where nothing else could."""
    first = lines[0]
    image, frame = first.get("image"), _number(first.get("frame"))
    if not isinstance(image, str) or not image:
        return _broken("a line names no image")
    if first.get("frame") is not None and (frame is None or frame != int(frame)):
        return _broken("frame is not a whole number")
    regions, problems = _regions(lines, root)
    labels = _image_labels(lines)
    if labels is None:
        problems = [*problems, _problem("labels are names, {name: value} or [{name, value, trust}]", None)]
    if first.get("id") and groups is not None and not groups.claim(str(first["id"]), image):
        problems = [Problem(reason=Reason.DUPLICATE_ID, detail="another image of the manifest has the same id")]
    spacing = _numbers(first.get("pixel_spacing_mm"))
    return SourceItem(
        key=f"{first.get('id') or image}#{'' if frame is None else int(frame)}",
        uri=resolve(image, root),
        frame=None if frame is None else int(frame),
        regions=regions,
        labels=labels or [],
        split=_text(first.get("split")),
        patient_id=_text(first.get("patient_id")),
        study_id=_text(first.get("study_id")),
        modality=_text(first.get("modality")),
        licence=_text(first.get("licence")),
        pixel_spacing_mm=spacing if spacing and len(spacing) == 2 and min(spacing) > 0 else None,
        problems=problems,
    )


def _image_labels(lines: list[dict[str, Any]]) -> list[Label] | None:
    """Labels of lines that have no region: those of the whole image. None where they can't be read."""
    labels: list[Label] = []
    for line in lines:
        if not _given_regions(line) and (line.get("labels") is not None or line.get("label") is not None):
            found = labels_of(line.get("labels"), line.get("label"))
            if found is None:
                return None
            labels += [label for label in found if label not in labels]
    return labels


def _regions(lines: list[dict[str, Any]], root: str) -> tuple[list[SourceRegion], list[Problem]]:
    regions: list[SourceRegion] = []
    problems: list[Problem] = []
    seen: set[str] = set()
    for line in lines:
        if any(line.get(c) is not None and line.get(c) != lines[0].get(c) for c in IMAGE_COLUMNS):
            problems.append(_problem("a line contradicts the image's first line", len(regions) + len(problems)))
            continue
        for given in _given_regions(line):
            ordinal, text = len(regions) + len(problems), json.dumps(given, sort_keys=True)
            if text in seen:
                problems.append(Problem(reason=Reason.DUPLICATE_ID, detail="the same region twice", region=ordinal))
            elif isinstance(region := _region(given, ordinal, root), Problem):
                problems.append(region)
            else:
                regions.append(region)
            seen.add(text)
    return regions, problems


def _given_regions(line: Mapping[str, Any]) -> list[Any]:
    given = {c: line[c] for c in REGION_COLUMNS if line.get(c) is not None}
    nested = line.get("regions") or []
    return ([given] if "box" in given or "mask" in given else []) + (nested if isinstance(nested, list) else [nested])


def _region(given: Any, ordinal: int, root: str) -> SourceRegion | Problem:
    if not isinstance(given, dict) or not set(given) <= set(REGION_COLUMNS):
        return _problem(f"a region may have {', '.join(REGION_COLUMNS)}", ordinal)
    box, mask, confidence = given.get("box"), given.get("mask"), _number(given.get("confidence"))
    numbers = _numbers(box)
    if box is not None and (numbers is None or len(numbers) != 4):
        return _problem("box is not four numbers", ordinal)
    if box is None and mask is None:
        return _problem("a region has neither box nor mask", ordinal)
    if confidence is not None and not 0 <= confidence <= 1:
        return _problem("confidence is not between 0 and 1", ordinal)
    if isinstance(mask, str) and mask.lstrip()[:1] in ("{", "["):
        mask = _json(mask)
    labels = labels_of(given.get("labels"), given.get("label"))
    if labels is None:
        return _problem("labels are names, {name: value} or [{name, value, trust}]", ordinal)
    return SourceRegion(
        ordinal=ordinal,
        box=numbers,
        segmentation=None if isinstance(mask, str) else mask,
        mask_uri=resolve(mask, root) if isinstance(mask, str) else None,
        labels=labels,
        confidence=confidence,
    )


def labels_of(*given: Any) -> list[Label] | None:
    """Labels from names, {name: value} or [{name, value, trust}]; a bare name is present. None for anything else."""
    labels: list[Label] = []
    for value in given:
        if isinstance(value, str):
            text = value.strip()
            value = _json(text) if text[:1] in ("{", "[") else [p.strip() for p in text.split(";") if p.strip()]
            if value is None:
                return None
        entries = [{"name": k, "value": v} for k, v in value.items()] if isinstance(value, dict) else value or []
        if not isinstance(entries, list):
            return None
        for entry in entries:
            label = _label({"name": entry, "value": "present"} if isinstance(entry, str) else entry)
            if label is None:
                return None
            labels.append(label)
    return labels


def _label(entry: Any) -> Label | None:
    if not isinstance(entry, dict) or not set(entry) <= {"name", "value", "trust"} or "name" not in entry:
        return None
    trust = entry.get("trust")
    if trust is not None and (_number(trust) is None or not 0 <= float(trust) <= 1):
        return None
    value = entry.get("value", "present")
    if isinstance(value, bool):
        value = "present" if value else "absent"
    return Label(name=str(entry["name"]), value=str(value), trust=None if trust is None else float(trust))


def resolve(path: str, root: str) -> str:
    """`path` itself if it is absolute or a URI, otherwise below `root`."""
    return path if "://" in path or path.startswith("/") else storage.join(root, path)


def _open(path: str) -> Any:
    try:
        fs, inner = storage.open_uri(path)
        return fs.open_input_file(inner)
    except FileNotFoundError:
        raise ValueError(f"there is no manifest {path}; check its name") from None
    except OSError as error:
        raise ValueError(f"the manifest cannot be read: {storage.explain(path, error)}") from error


def _lines(path: str) -> Iterator[dict[str, Any] | None]:
    """The lines as dicts without empty values; None for one that is no JSON object."""
    suffix = path.rsplit(".", 1)[-1].lower()
    if suffix not in ("jsonl", "ndjson", "csv", "tsv"):
        raise ValueError(f"{path} is no manifest by its name; use .jsonl (an object a line), .csv or .tsv")
    with io.TextIOWrapper(_open(path), encoding="utf-8-sig", errors="replace", newline="") as text:
        if suffix in ("csv", "tsv"):
            table = csv.DictReader(text, delimiter="\t" if suffix == "tsv" else ",")
            _check_columns(path, table.fieldnames or [])
            if "image" not in (table.fieldnames or []):
                raise ValueError(f"{path} has no column `image`; every line must name its image")
            for row in table:
                values = {k: v for k, v in row.items() if k is not None and v not in (None, "")}
                yield None if None in row else values  # more values than columns
            return
        for line in text:
            if not line.strip():
                continue
            values = _json(line)
            if not isinstance(values, dict):
                yield None
                continue
            _check_columns(path, list(values))
            yield {k: v for k, v in values.items() if v is not None}


def _check_columns(path: str, columns: Any) -> None:
    unknown = [c for c in columns if c not in COLUMNS]
    if unknown:
        raise ValueError(f"{path} has the unknown column {unknown[0]!r}; allowed are {', '.join(COLUMNS)}")


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _number(value: Any) -> float | None:
    try:
        return float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else None
    except ValueError:
        return None


def _numbers(value: Any) -> list[float] | None:
    if isinstance(value, str):
        value = value.strip().strip("[]()").replace(",", " ").split()
    numbers = [_number(v) for v in value] if isinstance(value, list | tuple) else []
    return [n for n in numbers if n is not None] if numbers and None not in numbers else None


def _text(value: Any) -> str | None:
    return None if value is None or value == "" else str(value)


def _problem(detail: str, region: int | None) -> Problem:
    return Problem(reason=Reason.BAD_ANNOTATION, detail=detail, region=region)


def _broken(detail: str = "a line of the manifest cannot be read") -> SourceItem:
    return SourceItem(key="", problems=[_problem(detail, None)])
