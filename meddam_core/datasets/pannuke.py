"""The PanNuke source: patches of 19 tissues with every nucleus drawn, in five types.

    meddam ingest pannuke PanNuke --out s3://bucket/pannuke

Layout: for each fold, in folders of its own or side by side, `images.npy` (N, 256, 256, 3), `masks.npy` (N, 256, 256,
6; the first five channels number the nuclei of one type each) and `types.npy` (N names of tissue). "fold1" in a path
names the fold; the folds are the splits. 40x, 0.25 um a pixel.

Regions are clusters of nuclei of one type (meddam_core.datasets.nuclei), or the patch. The patient is unknown.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from meddam_core.datasets.base import Source, SourceItem, SourceRegion
from meddam_core.datasets.npy_rows import NpyRows
from meddam_core.datasets.nuclei import Unit, nuclei_of, nuclei_regions
from meddam_core.datasets.tables import files_below, names_digest
from meddam_core.imaging.decoded import Decoded
from meddam_core.imaging.limits import Limits
from meddam_core.records import Egress, Label, Reason, RowError

VERSION = 1
TYPES = ("neoplastic", "inflammatory", "connective", "dead", "epithelial")
"""In the order of the mask's channels (Gamper et al. 2020; the sixth is background)."""
SPACING_MM = 0.00025
_FOLD = re.compile(r"fold[ _]?(\d+)", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class PanNuke(Source):
    """PanNuke's folds."""

    path: str
    """The folder that holds the folds, on S3 or disk."""
    unit: Unit = "clusters"
    min_nuclei: int = 3
    """Nuclei a cluster has at least."""
    gap_px: int = 16
    """Nuclei nearer than this are of one cluster."""
    dataset: str = "pannuke"
    licence: str = "CC BY-NC-SA 4.0"
    egress: Egress = "deny"

    def fingerprint(self) -> str:
        """Of the settings and the arrays' names and sizes."""
        listing = names_digest(files_below(self.path, (".npy",)))
        return hashlib.sha256(f"{VERSION} {self!r} {listing}".encode()).hexdigest()

    def items(self) -> Iterator[SourceItem]:
        """One item a patch. Raises ValueError where a fold lacks an array or its arrays differ in length."""
        for fold, arrays in self._folds().items():
            images, masks = NpyRows(arrays["images"]), NpyRows(arrays["masks"])
            if len(images.shape) != 4 or images.shape[3] != 3 or masks.shape != (*images.shape[:3], 6):
                raise ValueError(f"{fold}: images of {images.shape} and masks of {masks.shape} are not PanNuke's")
            tissues = [str(t) for t in NpyRows(arrays["types"]).all()] if "types" in arrays else []
            for row in range(images.shape[0]):
                labels = [Label(name="tissue", value=tissues[row])] if tissues else []
                yield SourceItem(
                    key=f"{fold}/{row}", uri=f"{arrays['images']}#{arrays['masks']}", frame=row, split=fold,
                    labels=labels, modality="SM", pixel_spacing_mm=[SPACING_MM, SPACING_MM], recipe="nuclei",
                )  # fmt: skip

    def load(self, item: SourceItem, limits: Limits) -> tuple[Decoded, list[SourceRegion]]:
        """The patch and its regions. Raises RowError."""
        assert item.uri is not None and item.frame is not None
        images, _, masks = item.uri.partition("#")
        pixels_HWC, masks_HWC = NpyRows(images).read(item.frame), NpyRows(masks).read(item.frame)
        if not np.isfinite(pixels_HWC).all() or pixels_HWC.min() < 0 or pixels_HWC.max() > 255:
            raise RowError(Reason.UNSUPPORTED_PIXELS, "the patch has values that are no 8-bit colours")
        height, width = pixels_HWC.shape[:2]
        layers = [(name, masks_HWC[..., i]) for i, name in enumerate(TYPES)]
        tissue = item.labels[0].value if item.labels else ""
        regions = nuclei_regions(
            nuclei_of(layers, height, width), unit=self.unit, min_nuclei=self.min_nuclei, gap_px=self.gap_px,
            tissue=tissue,
        )  # fmt: skip
        if not regions:
            raise RowError(Reason.NO_REGIONS, "the patch has no cluster of nuclei")
        decoded = Decoded(
            stored=np.ascontiguousarray(np.rint(pixels_HWC).astype(np.uint8)), decoder=f"numpy {np.__version__}",
            pixel_spacing_mm=(SPACING_MM, SPACING_MM), modality="SM", burned_in_annotation=False,
        )  # fmt: skip
        return decoded, regions

    def _folds(self) -> dict[str, dict[str, str]]:
        folds: dict[str, dict[str, str]] = {}
        for entry in files_below(self.path, (".npy",)):
            kind = entry.uri.rpartition("/")[2].removesuffix(".npy")
            match = _FOLD.search(entry.uri.rpartition("/")[0][-200:])
            if kind in ("images", "masks", "types"):
                folds.setdefault(f"fold{match[1]}" if match else "all", {})[kind] = entry.uri
        for fold, arrays in folds.items():
            if not {"images", "masks"} <= set(arrays):
                raise ValueError(f"{self.path}: {fold} lacks images.npy or masks.npy")
        if not folds:
            raise ValueError(f"{self.path} holds no images.npy and masks.npy; check that it is PanNuke's folder")
        return dict(sorted(folds.items()))
