"""The phantoms source: synthetic chest films, CT slices and skin photographs whose every fact is known.

    meddam ingest phantoms --count 300 --out s3://bucket/phantoms

    phantom = make_phantom("skin", seed=0, index=3)       # one picture with masks and truth, without any files

`truth` lists the labels; `scene` says which facts only the full view, only the crop, or only the mask shows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Literal, get_args

from meddam_core.datasets.base import Source, SourceItem, SourceRegion
from meddam_core.datasets.phantoms.phantom import Options, Phantom, check_options, make_phantom
from meddam_core.datasets.phantoms.scene import KINDS, Kind
from meddam_core.datasets.phantoms.second import SecondPhantom, make_second
from meddam_core.imaging.decoded import Decoded
from meddam_core.imaging.limits import Limits
from meddam_core.records import Egress
from meddam_core.regions.masks import rle_of

__all__ = ["KINDS", "VERSION", "Options", "Phantom", "Phantoms", "make_phantom", "make_second"]

VERSION = "2"
"""Of the generator's meaning; a new one gives other pictures for the same seed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Phantoms(Source):
    """`count` phantoms, the kinds in turn. Raises ValueError for what cannot be drawn."""

    count: int = 60
    kinds: tuple[Kind, ...] = KINDS
    seed: int = 0
    first: int = 0
    """Number of the first phantom: sets with the same seed and other numbers share no picture."""
    split: str = "all"
    options: Options = field(default_factory=Options)
    generator: Literal["first", "second"] = "first"
    """second: written otherwise, for testing what was learnt from the first; it takes no options."""
    distractors: bool = True
    """Whether distractors and normal tissue are regions to describe, or only in the picture."""
    dataset: str = "phantoms"
    licence: str = "CC0-1.0"
    egress: Egress = "open"

    def __post_init__(self) -> None:
        unknown = set(self.kinds) - set(get_args(Kind))
        if unknown or not self.kinds:
            raise ValueError(f"there are no phantoms {sorted(unknown)}; use some of {', '.join(KINDS)}")
        if self.count < 1 or self.options.size < 512:
            raise ValueError("phantoms need a count of at least 1 and a canvas of at least 512 pixels")
        for kind in self.kinds:
            check_options(kind, self.options)

    def fingerprint(self) -> str:
        """Of everything that decides the pictures."""
        facts = asdict(self)
        if self.generator == "first":  # sets that were made before there was a second one keep their fingerprint
            del facts["generator"]
        return hashlib.sha256(f"{VERSION} {sorted(facts.items())!r}".encode()).hexdigest()

    def items(self) -> Iterator[SourceItem]:
        """One item a phantom; its picture and regions come with `load`."""
        for number in range(self.first, self.first + self.count):
            kind = self.kinds[number % len(self.kinds)]
            key = f"{kind}/{self.seed}/{number}"
            yield SourceItem(key=key, uri=f"phantom:{key}", split=self.split, patient_id=key, recipe=f"phantom-{kind}")

    def load(self, item: SourceItem, limits: Limits) -> tuple[Decoded, list[SourceRegion]]:
        """Paints the phantom that the item names."""
        kind, seed, number = item.key.split("/")
        phantom: Phantom | SecondPhantom
        if self.generator == "second":
            phantom = make_second(kind, int(seed), int(number))  # type: ignore[arg-type]
        else:
            phantom = make_phantom(kind, int(seed), int(number), self.options)  # type: ignore[arg-type]
        wanted = [r for r in phantom.regions if self.distractors or r.truth["kind"] == "lesion"]
        regions = [
            SourceRegion(ordinal=i, segmentation=asdict(rle_of(region.mask_HW)), labels=region.labels())
            for i, region in enumerate(wanted)
        ]
        return _decoded(phantom), regions


def _decoded(phantom: Phantom | SecondPhantom) -> Decoded:
    return Decoded(
        stored=phantom.stored, stored_bits=8 if phantom.stored.ndim == 3 else 12, rescale=phantom.rescale,
        window=phantom.window, photometric=phantom.photometric, decoder=f"meddam phantoms {VERSION}",
        pixel_spacing_mm=(phantom.spacing_mm, phantom.spacing_mm), orientation=phantom.orientation,
        modality=phantom.modality, burned_in_annotation=False,
    )  # fmt: skip
