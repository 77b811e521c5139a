"""A folder of pictures and a folder of masks: the form in which most segmentation datasets come.

    meddam ingest masks masks --images images --out s3://bucket/polyps

Which mask belongs to which picture is told by names, and what it shows by what is left of them:

| picture       | mask                     | label                                  |
|---------------|--------------------------|----------------------------------------|
| images/a.jpg  | masks/a.png              | none, or of --label                    |
| images/a.jpg  | masks/a_polyp.png        | polyp                                  |
| images/a.jpg  | masks/polyp/a.png        | polyp                                  |
| images/a.jpg  | masks/a/polyp.png        | polyp                                  |
| images/a.jpg  | masks/a_segmentation.png | none: "mask", "segmentation" and so on |

Of one folder for both, --images may be left out: then pictures are the files that are no other's mask. A mask is every
pixel that is not 0 (`parts`: each connected part of it a region), or with `values` an image of labels: each value a
region, named by --names ("1=liver;2=spleen").
"""

from __future__ import annotations

import hashlib
import re
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Literal

from meddam_core.datasets.base import Problem, Source, SourceItem, SourceRegion, load_file, read_limited
from meddam_core.datasets.tables import PICTURES, files_below, names_digest, relative, stem
from meddam_core.imaging.decoded import Decoded
from meddam_core.imaging.limits import Limits
from meddam_core.records import Egress, Label, Reason, RowError
from meddam_core.regions.components import by_value, components, label_image
from meddam_core.regions.masks import mask_of_png, rle_of

VERSION = 1
Regions = Literal["whole", "parts", "values"]
_SAYS_NOTHING = re.compile(r"(gt|ground ?truth|label|mask|msk|seg|segmentation|superpixels)s?|\d*", re.IGNORECASE)
_MASK_WORDS = re.compile("mask|msk|seg|label|gt", re.IGNORECASE)
_SEPARATORS = "_-. "
_MAX_VALUES = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskFolder(Source):
    """Pictures and mask files that belong together by name."""

    path: str
    """Folder of the masks, on S3 or disk."""
    images: str
    """Folder of the pictures; may be the same."""
    regions: Regions = "whole"
    """whole: a mask is a region; parts: each connected part; values: each value of a label image."""
    label: str | None = None
    """What masks show whose names don't say it."""
    names: str = ""
    """Names of values: "1=liver;2=spleen"."""
    min_area_px: int = 16
    """Smaller parts or values are no region."""
    split: str = "all"
    modality: str | None = None
    """DICOM code; by default the pictures' own, XC for colour."""
    dataset: str = "masks"
    licence: str = "unknown"
    egress: Egress = "deny"

    def __post_init__(self) -> None:
        self.value_names()

    def fingerprint(self) -> str:
        """Of the settings and the files' names."""
        listing = names_digest(files_below(self.path), files_below(self.images))
        return hashlib.sha256(f"{VERSION} {self!r} {listing}".encode()).hexdigest()

    def items(self) -> Iterator[SourceItem]:
        """One item a picture. Raises ValueError where no picture has a mask."""
        pictures, masks = self._pairs()
        if not any(masks.values()):
            raise ValueError(f"no file of {self.path} is named after a picture of {self.images}; see docs/datasets.md")
        for uri in pictures:
            key, own = relative(uri, self.images), masks.get(uri, [])
            if not own:
                yield SourceItem(
                    key=key, problems=[Problem(reason=Reason.NO_REGIONS, detail="the picture has no mask")]
                )
                continue
            regions = [
                SourceRegion(ordinal=i, mask_uri=mask, labels=_labels(name or self.label))
                for i, (mask, name) in enumerate(own)
            ]
            yield SourceItem(key=key, uri=uri, regions=regions, split=self.split, modality=self.modality)

    def load(self, item: SourceItem, limits: Limits) -> tuple[Decoded, list[SourceRegion]]:
        """The picture; its masks cut into parts or values where that is asked for. Raises RowError."""
        decoded = load_file(item, limits)
        if self.regions == "whole":
            return decoded, item.regions
        size = decoded.width, decoded.height
        cut = [r for region in item.regions for r in self._cut(region, size, limits)]
        return decoded, [replace(region, ordinal=i) for i, region in enumerate(cut)]

    def _cut(self, region: SourceRegion, size: tuple[int, int], limits: Limits) -> Iterator[SourceRegion]:
        assert region.mask_uri is not None
        data = read_limited(region.mask_uri, limits)
        if self.regions == "parts":
            for part in components(mask_of_png(data, size), self.min_area_px):
                yield replace(region, mask_uri=None, segmentation=asdict(rle_of(part.full(size))))
            return
        names = self.value_names()
        for number, (value, mask_HW) in enumerate(by_value(label_image(data, size))):
            if number >= _MAX_VALUES:
                raise RowError(Reason.BAD_ANNOTATION, f"more than {_MAX_VALUES:,} values: this is no label image")
            if int(mask_HW.sum()) >= self.min_area_px:
                labels = _labels(names.get(value, f"label {value}"))
                yield replace(region, mask_uri=None, segmentation=asdict(rle_of(mask_HW)), labels=labels)

    def value_names(self) -> dict[int, str]:
        """The names given for values. Raises ValueError where they are not written so."""
        pairs = [p.partition("=") for p in self.names.split(";") if p.strip()]
        if any(not v.strip().isdigit() or not name.strip() for v, _, name in pairs):
            raise ValueError(f'names of values are written "1=liver;2=spleen", not {self.names!r}')
        return {int(v): name.strip() for v, _, name in pairs}

    def _pairs(self) -> tuple[list[str], dict[str, list[tuple[str, str | None]]]]:
        """Pictures, and the (mask, label) of each."""
        pictures = [o.uri for o in files_below(self.images)]
        candidates = [o.uri for o in files_below(self.path, PICTURES)]
        same = set(pictures) & set(candidates)
        by_stem = sorted((stem(uri), uri) for uri in pictures)
        found: dict[str, list[tuple[str, str | None]]] = defaultdict(list)
        masks: set[str] = set()
        for mask in candidates:
            owner = _owner(mask, self.path, by_stem, same)
            if owner is not None:
                found[owner[0]].append((mask, owner[1]))
                masks.add(mask)
        return [p for p in pictures if p not in masks], found


def _owner(mask: str, root: str, by_stem: list[tuple[str, str]], same: set[str]) -> tuple[str, str | None] | None:
    """(picture, label or None) that a mask file belongs to by its name; the longest name that fits."""
    name = stem(mask)
    folders = relative(mask, root).split("/")[:-1]
    folder = folders[-1] if folders else None
    at = bisect_right(by_stem, (name, "\uffff"))
    for own, uri in reversed(by_stem[max(0, at - 50) : at]):
        if uri == mask:
            continue
        rest = name[len(own) :]
        if name == own and mask not in same:
            return uri, _said(folder)
        if name.startswith(own) and rest[:1] and rest[0] in _SEPARATORS:
            if mask in same and not _MASK_WORDS.search(rest):
                continue  # in a folder of both a longer name alone makes no mask
            return uri, _said(rest[1:]) or _said(folder)
    if folder is not None:
        at = bisect_right(by_stem, (folder, "\uffff"))
        if at and by_stem[at - 1][0] == folder and by_stem[at - 1][1] != mask:
            return by_stem[at - 1][1], _said(name)
    return None


def _said(text: str | None) -> str | None:
    """A label, unless the text is one of the words that every mask is called by."""
    if text is None or _SAYS_NOTHING.fullmatch(text.strip(_SEPARATORS)):
        return None
    return text.strip(_SEPARATORS).replace("_", " ")


def _labels(name: str | None) -> list[Label]:
    return [] if name is None else [Label(name="finding", value=name), Label(name=name, value="present", trust=1.0)]
