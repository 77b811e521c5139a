"""The NuInsSeg source: pictures of H&E-stained organs with a label image of nuclei for each.

    meddam ingest nuinsseg NuInsSeg --out s3://bucket/nuinsseg

Layout: `ORGAN/tissue images/NAME.png` beside `ORGAN/label masks/NAME.tif` (each nucleus its own number; a plain mask
works too, touching nuclei then count as one). Any dataset in this form will do: the two folders' names are options.

Regions are clusters of nuclei (meddam_core.datasets.nuclei), or the picture. The dataset has no types of nuclei.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

from meddam_core.datasets.base import Problem, Source, SourceItem, SourceRegion, load_file, read_limited
from meddam_core.datasets.nuclei import Unit, instances_by_contact, nuclei_of, nuclei_regions
from meddam_core.datasets.tables import files_below, names_digest, relative, stem
from meddam_core.imaging.decoded import Decoded
from meddam_core.imaging.limits import Limits
from meddam_core.records import Egress, Label, Reason, RowError
from meddam_core.regions.components import label_image

VERSION = 1
_SPECIES = ("human ", "mouse ")


@dataclass(frozen=True, slots=True, kw_only=True)
class NuInsSeg(Source):
    """Pictures and label images of nuclei, by organ."""

    path: str
    """The folder that holds a folder for each organ, on S3 or disk."""
    images: str = "tissue images"
    """Name of the folder of pictures within an organ's."""
    masks: str = "label masks"
    """Name of the folder of label images within an organ's."""
    unit: Unit = "clusters"
    min_nuclei: int = 3
    """Nuclei a cluster has at least."""
    gap_px: int = 24
    """Nuclei nearer than this are of one cluster."""
    dataset: str = "nuinsseg"
    licence: str = "unknown"
    egress: Egress = "deny"

    def fingerprint(self) -> str:
        """Of the settings and the files' names."""
        return hashlib.sha256(f"{VERSION} {self!r} {names_digest(files_below(self.path))}".encode()).hexdigest()

    def items(self) -> Iterator[SourceItem]:
        """One item a picture. Raises ValueError where there is no folder of pictures."""
        files = [(o.uri, o.uri.split("/")) for o in files_below(self.path)]
        masks = {(parts[-3], stem(uri)): uri for uri, parts in files if len(parts) > 2 and parts[-2] == self.masks}
        found = False
        for uri, parts in files:
            if len(parts) < 3 or parts[-2] != self.images:
                continue
            found = True
            key, organ = relative(uri, self.path), parts[-3]
            mask = masks.get((organ, stem(uri)))
            if mask is None:
                problem = Problem(reason=Reason.NOT_FOUND, detail="the picture has no label image")
                yield SourceItem(key=key, problems=[problem])
                continue
            labels = [Label(name="tissue", value=_tissue(organ))]
            regions = [SourceRegion(ordinal=0, mask_uri=mask)]
            yield SourceItem(key=key, uri=uri, regions=regions, labels=labels, modality="SM", recipe="nuclei")
        if not found:
            raise ValueError(f"{self.path} holds no ORGAN/{self.images}/*.png; check its path, or give --images NAME")

    def load(self, item: SourceItem, limits: Limits) -> tuple[Decoded, list[SourceRegion]]:
        """The picture and its regions. Raises RowError."""
        decoded = load_file(item, limits)
        (given,) = item.regions
        assert given.mask_uri is not None
        labels_HW = label_image(read_limited(given.mask_uri, limits), (decoded.width, decoded.height))
        nuclei = nuclei_of([("", instances_by_contact(labels_HW))], decoded.height, decoded.width)
        regions = nuclei_regions(
            nuclei, unit=self.unit, min_nuclei=self.min_nuclei, gap_px=self.gap_px, tissue=item.labels[0].value
        )
        if not regions:
            raise RowError(Reason.NO_REGIONS, "the picture has no cluster of nuclei")
        return decoded, regions


def _tissue(organ: str) -> str:
    for species in _SPECIES:
        if organ.lower().startswith(species):
            return organ[len(species) :]
    return organ
