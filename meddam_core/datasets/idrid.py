"""The IDRiD source: fundus photographs with a mask for each kind of lesion, and the grades of a further set.

    meddam ingest idrid "IDRiD" --out s3://bucket/idrid                       # A. Segmentation (and B., if there)

Layout (Indian Diabetic Retinopathy Image Dataset, IEEE DataPort): pictures IDRiD_NN.jpg anywhere below the folder, with
masks IDRiD_NN_{MA,HE,EX,SE,OD}.tif, and grades in a CSV with "Image name" and "Retinopathy grade"; "Training" or
"Testing" in the path says which split. Other datasets named in the same way work too.

Each connected part of a mask is a region, labelled with its lesion. All lesions of a photograph with masks are drawn,
so for every other kind: present where its mask reaches into the region's box, absent where it comes nowhere near (three
times the box, what the focal crop shows), undecided between. `location: disc` beside the optic disc.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from meddam_core.datasets.base import Problem, Source, SourceItem, SourceRegion, load_file, read_limited
from meddam_core.datasets.tables import PICTURES, digest_of, files_below, names_digest, relative, stem, table_rows
from meddam_core.imaging.decoded import Decoded
from meddam_core.imaging.limits import Limits
from meddam_core.records import Box, Egress, Label, Reason, RowError
from meddam_core.regions.components import Component, components
from meddam_core.regions.masks import mask_of_png, rle_of
from meddam_core.storage import ObjectInfo

VERSION = 1
LESIONS = {
    "MA": "Microaneurysms",
    "HE": "Haemorrhages",
    "EX": "Hard Exudates",
    "SE": "Soft Exudates",
    "OD": "Optic Disc",
}
"""By the end of a mask's name."""
DISC = "OD"
_MASK = re.compile(r"(?P<image>.+)_(?P<lesion>[A-Z]{2})")
_GRADES = "a table of grades"
_NAME, _GRADE, _EDEMA = "Image name", "Retinopathy grade", "Risk of macular edema"
_BESIDE = 0.5
"""Beside the disc: nearer to its edge than this many of its diameters."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Idrid(Source):
    """Fundus photographs with masks per lesion."""

    path: str
    """The folder that holds photographs and masks, on S3 or disk."""
    disc: bool = True
    """Whether the optic disc is a region too."""
    graded: bool = False
    """Whether photographs that have a grade but no masks become rows, without regions."""
    min_area_px: int = 40
    """Smaller parts of a mask are no region."""
    join_px: int = 12
    """Parts of a mask nearer than this are one region."""
    dataset: str = "idrid"
    licence: str = "CC BY 4.0"
    egress: Egress = "open"

    def fingerprint(self) -> str:
        """Of the settings, the files' names, and the tables of grades."""
        tables = [digest_of(t.uri, _GRADES) for t in files_below(self.path, (".csv",))]
        parts = [f"{VERSION} {self!r}", names_digest(files_below(self.path)), *tables]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def items(self) -> Iterator[SourceItem]:
        """One item a photograph. Raises ValueError where the folder holds no mask of this form."""
        files = files_below(self.path)
        masks = _masks(files)
        if not masks and not self.graded:
            raise ValueError(f"{self.path} holds no mask named like IDRiD_01_MA.tif; check that it is IDRiD's folder")
        grades = self._grades()
        for entry in files:
            name = stem(entry.uri)
            if name in masks.get("", ()):
                continue
            key = relative(entry.uri, self.path)
            own = masks.get(_place(entry.uri), {}).get(name) or masks.get("all", {}).get(name)
            labels = grades.get(name, [])
            if own is None and not (self.graded and labels):
                problem = Problem(reason=Reason.EXCLUDED, detail="the photograph has no masks")
                yield SourceItem(key=key, problems=[problem])
                continue
            regions = [
                SourceRegion(ordinal=i, mask_uri=uri, labels=[Label(name="lesion", value=lesion)])
                for i, (lesion, uri) in enumerate(sorted((own or {}).items()))
            ]
            yield SourceItem(
                key=key, uri=entry.uri, regions=regions, labels=labels, split=_split(key), modality="OP",
                recipe="idrid",
            )  # fmt: skip

    def load(self, item: SourceItem, limits: Limits) -> tuple[Decoded, list[SourceRegion]]:
        """The photograph, and a region for each connected part of its masks. Raises RowError."""
        decoded = load_file(item, limits)
        size = decoded.width, decoded.height
        masks = {}
        for region in item.regions:
            assert region.mask_uri is not None
            mask = _mask(region.mask_uri, size, limits)
            if mask is not None:
                masks[region.labels[0].value] = mask
        return decoded, self._regions(masks, size)

    def _regions(self, masks: dict[str, NDArray[np.uint8]], size: tuple[int, int]) -> list[SourceRegion]:
        regions: list[SourceRegion] = []
        disc = masks.get(DISC)
        for lesion, mask_HW in masks.items():
            if lesion == DISC and not self.disc:
                continue
            for part in components(mask_HW, self.min_area_px, self.join_px):
                labels = [Label(name="finding", value=LESIONS[lesion].lower()), *_states(lesion, part, masks)]
                if disc is not None and lesion != DISC and _is_beside(part.box, disc):
                    labels.append(Label(name="location", value="disc"))
                rle = asdict(rle_of(part.full(size)))
                regions.append(SourceRegion(ordinal=len(regions), segmentation=rle, labels=labels))
        return regions

    def _grades(self) -> dict[str, list[Label]]:
        """Labels of the image by its name, from every CSV of grades below the folder."""
        grades: dict[str, list[Label]] = {}
        for table in files_below(self.path, (".csv",)):
            for row in table_rows(table.uri, _GRADES):
                name, grade, edema = row.get(_NAME), row.get(_GRADE), row.get(_EDEMA)
                if name and grade:
                    labels = [Label(name="retinopathy_grade", value=grade)]
                    grades[name] = [*labels, Label(name="macular_edema_risk", value=edema)] if edema else labels
        return grades


def _masks(files: list[ObjectInfo]) -> dict[str, dict[str, dict[str, str]]]:
    """Masks' URIs by split, then photograph, then lesion; under "" the names that are masks."""
    found: dict[str, dict[str, dict[str, str]]] = defaultdict(lambda: defaultdict(dict))
    for entry in files:
        match = _MASK.fullmatch(stem(entry.uri))
        if match and match["lesion"] in LESIONS and entry.uri.lower().endswith(PICTURES):
            found[_place(entry.uri)][match["image"]][match["lesion"]] = entry.uri
            found[""][match[0]] = {}
    return found


def _place(uri: str) -> str:
    return _split(uri) or "all"


def _split(path: str) -> str | None:
    folders = path.rpartition("/")[0].lower()
    return "train" if "training" in folders else "test" if "testing" in folders else None


def _mask(uri: str, size: tuple[int, int], limits: Limits) -> NDArray[np.uint8] | None:
    """A lesion's mask; None where the file is empty, which says that there is no such lesion."""
    try:
        return mask_of_png(read_limited(uri, limits), size)
    except RowError as error:
        if error.reason is Reason.MASK_EMPTY:
            return None
        raise


def _states(own: str, part: Component, masks: dict[str, NDArray[np.uint8]]) -> list[Label]:
    """Of every kind of lesion, whether it is in the part's box."""
    labels = []
    for lesion, name in LESIONS.items():
        mask_HW = masks.get(lesion)
        if lesion == own or (mask_HW is not None and _reaches(mask_HW, part.box, 0)):
            state = "present"
        else:
            state = "undecided" if mask_HW is not None and _reaches(mask_HW, part.box, 1) else "absent"
        labels.append(Label(name=name, value=state, trust=1.0))
    return labels


def _reaches(mask_HW: NDArray[np.uint8], box: Box, times: int) -> bool:
    x0, y0, x1, y1 = box
    dx, dy = max(x1 - x0, 48) * times, max(y1 - y0, 48) * times
    return bool(mask_HW[max(y0 - dy, 0) : y1 + dy, max(x0 - dx, 0) : x1 + dx].any())


def _is_beside(box: Box, disc_HW: NDArray[np.uint8]) -> bool:
    ys, xs = np.flatnonzero(disc_HW.any(axis=1)), np.flatnonzero(disc_HW.any(axis=0))
    diameter = (xs[-1] - xs[0] + ys[-1] - ys[0] + 2) / 2
    centre = (xs[0] + xs[-1]) / 2, (ys[0] + ys[-1]) / 2
    distance = np.hypot((box[0] + box[2]) / 2 - centre[0], (box[1] + box[3]) / 2 - centre[1])
    return bool(distance < diameter * (0.5 + _BESIDE))
