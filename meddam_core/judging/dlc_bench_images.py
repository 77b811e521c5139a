"""DLC-Bench's pictures and masks, and whether a checkpoint finds the published captions likelier than shuffled ones.

    for region in bench_regions("DLC-bench"):        # annotations.json (COCO form) and images/
        region.key, region.views(size)

Notes:
- A region is shown as DAM's own evaluation shows it: the annotation's mask as it is, the picture as it is.
- `verify` needs no judge and generates nothing: with the weights that made the captions, a region's own caption must be
  likelier than one of another region; with other weights, a wrong crop or a wrong prompt it is not.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meddam_core.focal import focal_views
from meddam_core.imaging.decode import decode
from meddam_core.imaging.render import render
from meddam_core.judging.statistics import wilson
from meddam_core.regions.masks import mask_of_segmentation

QUERY = "<image>\nDescribe the masked region in detail."
"""What the published captions were asked with (their files' `query`)."""
PASS_SHARE = 0.9
"""Of the regions, whose own caption must be likelier; by chance it is half of them."""


@dataclass(frozen=True, slots=True)
class BenchRegion:
    """One annotation of the benchmark."""

    key: str
    picture: Path
    segmentation: Any
    size: tuple[int, int]
    """(width, height) that the annotations name."""

    def views(self, size: int) -> NDArray[np.uint8]:
        """(1, 8, S, S) uint8: the model's input. Raises RowError where picture or mask are broken."""
        image_HWC = render(decode(self.picture.read_bytes(), name=self.picture.name))
        mask_HW = mask_of_segmentation(self.segmentation, (image_HWC.shape[1], image_HWC.shape[0]))
        return focal_views(image_HWC, mask_HW, size)[None]


def bench_regions(folder: str | Path, keys: Sequence[str] | None = None) -> Iterator[BenchRegion]:
    """The annotations of a benchmark folder in the order of their ids; only those of `keys` where given.

    Raises ValueError where files are missing, or a key has no annotation.
    """
    root = Path(folder)
    file = root / "annotations.json"
    if not file.is_file():
        raise ValueError(f"{root} holds no annotations.json; give the DLC-bench folder")
    content = json.loads(file.read_text(encoding="utf-8"))
    images = {i["id"]: i for i in content["images"]}
    found = {str(a["id"]): a for a in content["annotations"]}
    wanted = list(found) if keys is None else list(keys)
    if missing := [k for k in wanted if k not in found]:
        raise ValueError(f"{len(missing)} regions are not in annotations.json, such as {missing[0]}")
    for key in sorted(wanted, key=lambda k: (len(k), k)):
        image = images[found[key]["image_id"]]
        picture = root / "images" / str(image["file_name"])
        if not picture.is_file():
            raise ValueError(f"{root / 'images'} lacks a picture of region {key}; download the benchmark's images")
        yield BenchRegion(key, picture, found[key]["segmentation"], (int(image["width"]), int(image["height"])))


@dataclass(frozen=True, slots=True)
class Verification:
    """How own captions compare with those of other regions, by mean log-probability a token."""

    num_regions: int
    num_likelier: int
    mean_own: float
    mean_other: float

    @property
    def share(self) -> float:
        """Of the regions, whose own caption is likelier."""
        return self.num_likelier / self.num_regions

    @property
    def passed(self) -> bool:
        """Whether this is the model that wrote the captions, shown what it was shown."""
        return self.share >= PASS_SHARE

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        interval = wilson(self.num_likelier, self.num_regions)
        return {
            "passed": self.passed, "num_regions": self.num_regions, "num_likelier": self.num_likelier,
            "share": self.share, "share_low": interval.low, "share_high": interval.high, "needed": PASS_SHARE,
            "mean_logprob_own": self.mean_own, "mean_logprob_other": self.mean_other,
        }  # fmt: skip


Likelihoods = Callable[[NDArray[np.uint8], Sequence[str]], Sequence[float]]
"""(views, captions) -> mean log-probability a token of each."""


def verify(
    regions: Sequence[BenchRegion], captions: Mapping[str, str], likelihoods: Likelihoods, size: int, seed: int = 0
) -> Verification:
    """Each region's caption against that of another, drawn so that none keeps its own.

    Raises ValueError for fewer than two regions with captions.
    """
    known = [r for r in regions if captions.get(r.key)]
    if len(known) < 2:
        raise ValueError("at least two regions with captions are needed")
    order = list(range(len(known)))
    random.Random(seed).shuffle(order)
    other = {order[i]: order[(i + 1) % len(order)] for i in range(len(order))}
    pairs = []
    for i, region in enumerate(known):
        texts = [captions[region.key], captions[known[other[i]].key]]
        pairs.append(tuple(likelihoods(region.views(size), texts)))
    own, others = [a for a, _ in pairs], [b for _, b in pairs]
    return Verification(len(pairs), sum(a > b for a, b in pairs), sum(own) / len(own), sum(others) / len(others))
