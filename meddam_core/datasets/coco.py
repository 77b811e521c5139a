"""The COCO source: an instances file (images, annotations, categories) and a folder of pictures.

    meddam ingest coco annotations/instances_val2017.json --images val2017 --out s3://bucket/coco

Polygons and run lengths (a crowd's too) become masks; the box is the annotation's own. Category names become labels.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from meddam_core import storage
from meddam_core.datasets.base import Problem, Source, SourceItem, SourceRegion
from meddam_core.datasets.grouping import Groups, grouped
from meddam_core.datasets.json_stream import array_elements
from meddam_core.datasets.manifest import resolve
from meddam_core.records import Egress, Label, Reason


@dataclass(frozen=True, slots=True, kw_only=True)
class Coco(Source):
    """Images and instances in COCO's format."""

    annotations: str
    """The instances file (.json), on S3 or disk."""
    images: str
    """Folder that holds the files named by `file_name`."""
    crowds: bool = True
    """Whether annotations of crowds (iscrowd = 1) are regions."""
    split: str = "all"
    dataset: str = "coco"
    licence: str = "unknown"
    egress: Egress = "deny"

    def fingerprint(self) -> str:
        """Of the annotation file's bytes. The images themselves are not read."""
        digest = hashlib.sha256(repr(self).encode())
        with self._open() as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
        return digest.hexdigest()

    def items(self) -> Iterator[SourceItem]:
        """One item an image, with its annotations. Raises ValueError for a file that is not COCO's."""
        categories: dict[int, str] = {}
        found: set[str] = set()
        with grouped() as groups:
            try:
                for name, element in self._elements():
                    found.add(name)
                    _add(groups, categories, name, element)
            except (ValueError, TypeError, AttributeError) as error:
                raise ValueError(f"{self.annotations} is not a COCO instances file: {error}") from error
            if "images" not in found:
                raise ValueError(f"{self.annotations} is not a COCO instances file: it lists no images")
            for _, elements in groups:
                yield from self._items(elements, categories)

    def _elements(self) -> Iterator[tuple[str, Any]]:
        with io.TextIOWrapper(self._open(), encoding="utf-8-sig") as text:
            yield from array_elements(text, {"images", "annotations", "categories"})

    def _open(self) -> Any:
        try:
            fs, path = storage.open_uri(self.annotations)
            return fs.open_input_file(path)
        except FileNotFoundError:
            raise ValueError(f"there is no annotation file {self.annotations}; check its name") from None
        except OSError as error:
            raise ValueError(f"the annotations cannot be read: {storage.explain(self.annotations, error)}") from error

    def _items(self, elements: list[tuple[str, dict[str, Any]]], categories: dict[int, str]) -> Iterator[SourceItem]:
        images = [e for name, e in elements if name == "images"]
        annotations = [e for name, e in elements if name == "annotations"]
        if not images:
            problem = _problem("annotations name an image that the file does not list")
            yield SourceItem(key="", problems=[problem])
            return
        regions: list[SourceRegion] = []
        problems: list[Problem] = []
        seen: set[Any] = set()
        for ordinal, annotation in enumerate(a for a in annotations if self.crowds or not a.get("iscrowd")):
            region = _region(annotation, ordinal, categories, seen)
            regions.append(region) if isinstance(region, SourceRegion) else problems.append(region)
        image = images[0]
        if not isinstance(image.get("file_name"), str):
            yield SourceItem(key="", problems=[_problem("an image without file_name")])
            return
        yield SourceItem(
            key=image["file_name"], uri=resolve(image["file_name"], self.images), split=self.split, regions=regions,
            problems=problems, modality="XC",
        )  # fmt: skip
        for _ in images[1:]:
            duplicate = Problem(reason=Reason.DUPLICATE_ID, detail="two images of the file have the same id")
            yield SourceItem(key="", problems=[duplicate])


def _add(groups: Groups, categories: dict[int, str], name: str, element: dict[str, Any]) -> None:
    if name == "categories":
        categories[element["id"]] = str(element["name"])
    else:
        groups.add(str(element.get("id" if name == "images" else "image_id")), (name, element))


def _region(
    annotation: dict[str, Any], ordinal: int, categories: dict[int, str], seen: set[Any]
) -> SourceRegion | Problem:
    if "id" in annotation and str(annotation["id"]) in seen:
        return Problem(reason=Reason.DUPLICATE_ID, detail="two annotations have the same id", region=ordinal)
    seen.add(str(annotation.get("id")))
    box = annotation.get("bbox")
    if box is not None and (
        not isinstance(box, list) or len(box) != 4 or not all(isinstance(v, int | float) for v in box)
    ):
        return _problem("bbox is not four numbers: x, y, width, height", ordinal)
    segmentation = annotation.get("segmentation") or None
    if box is None and segmentation is None:
        return _problem("an annotation has neither bbox nor segmentation", ordinal)
    category = categories.get(annotation.get("category_id", -1))
    labels = [] if category is None else [Label(name=category, value="present", trust=1.0)]
    if annotation.get("iscrowd"):
        labels.append(Label(name="crowd", value="present", trust=1.0))
    corners = None if box is None else [box[0], box[1], box[0] + box[2], box[1] + box[3]]
    return SourceRegion(ordinal=ordinal, box=corners, segmentation=segmentation, labels=labels)


def _problem(detail: str, region: int | None = None) -> Problem:
    return Problem(reason=Reason.BAD_ANNOTATION, detail=detail, region=region)
