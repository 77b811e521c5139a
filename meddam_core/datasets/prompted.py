"""A source whose regions have boxes, with a mask for each from a promptable segmenter.

    source = Prompted(source=Coco(...), segmenter="/weights/medsam-vit-base")

Regions that have a mask already keep it. The others keep their box and labels; their mask is the model's, their
`source` says prompted and their `confidence` is the model's own estimate of its mask. A mask that comes out empty
leaves the region as it was.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import cast

from meddam_core.datasets.base import Source, SourceItem, SourceRegion
from meddam_core.imaging.decoded import Decoded
from meddam_core.imaging.limits import Limits
from meddam_core.imaging.render import render_stored, resolve_window
from meddam_core.records import Egress, RowError
from meddam_core.regions.geometry import checked_box
from meddam_core.regions.masks import rle_of
from meddam_core.regions.promptable import PromptableModel, RegionPrompt, load_segmenter


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompted(Source):
    """`source`, with masks for the regions that only have a box."""

    inner: Source
    segmenter: str
    """Folder of the checkpoint."""

    @property
    def dataset(self) -> str:
        """The inner source's."""
        return self.inner.dataset

    @property
    def licence(self) -> str:
        """The inner source's."""
        return self.inner.licence

    @property
    def egress(self) -> Egress:
        """The inner source's."""
        return self.inner.egress

    def fingerprint(self) -> str:
        """Of the inner source and the checkpoint's files. Raises ValueError where the folder is no checkpoint."""
        folder = Path(self.segmenter).expanduser()
        if not (folder / "config.json").is_file():
            raise ValueError(f"{self.segmenter} is no checkpoint folder: it has no config.json")
        digest = hashlib.sha256(self.inner.fingerprint().encode())
        for file in sorted(folder.iterdir()):
            if file.suffix in (".json", ".safetensors", ".bin"):
                digest.update(file.name.encode())
                with file.open("rb") as stream:
                    while chunk := stream.read(1 << 22):
                        digest.update(chunk)
        return digest.hexdigest()

    def items(self) -> Iterator[SourceItem]:
        """The inner source's."""
        return self.inner.items()

    def load(self, item: SourceItem, limits: Limits) -> tuple[Decoded, list[SourceRegion]]:
        """The picture, and its regions with masks. Raises RowError."""
        decoded, regions = self.inner.load(item, limits)
        size = decoded.width, decoded.height
        wanted: dict[int, RegionPrompt] = {}
        for i, region in enumerate(regions):
            if region.segmentation is None and region.mask_uri is None and region.box is not None:
                try:
                    wanted[i] = RegionPrompt(box=cast(tuple[float, float, float, float], checked_box(region.box, size)))
                except RowError:
                    continue  # a box that lies wrong is told of where regions are checked
        if not wanted:
            return decoded, regions
        image_HWC = render_stored(decoded.stored, decoded, resolve_window(decoded.stored, decoded, None))
        found = _segmenter(self.segmenter).segment(image_HWC, list(wanted.values()))
        regions = list(regions)
        for i, segmented in zip(wanted, found, strict=True):
            if segmented.mask_HW.any():
                regions[i] = replace(
                    regions[i], segmentation=asdict(rle_of(segmented.mask_HW)), source="prompted",
                    confidence=segmented.confidence,
                )  # fmt: skip
        return decoded, regions


@lru_cache(maxsize=1)
def _segmenter(folder: str) -> PromptableModel:
    """Loaded once a process."""
    import torch

    torch.set_num_threads(1)
    return load_segmenter(folder)
