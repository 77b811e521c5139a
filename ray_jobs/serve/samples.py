"""The gallery of the page: synthetic pictures with their lesions' boxes, and real files that pydicom bundles.

Made when first asked for, and kept: a phantom takes about a second to paint.
"""

from __future__ import annotations

import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from meddam_core.datasets.phantoms import Phantoms
from meddam_core.datasets.pydicom_samples import SAMPLES, PydicomSamples
from meddam_core.datasets.recipes import get_recipe
from meddam_core.imaging.decode import decode
from meddam_core.imaging.limits import Limits
from meddam_core.imaging.png import encode_png, preview_jpeg
from meddam_core.imaging.render import render
from meddam_core.records import Box

_SHOWN = {"JPEG2000.dcm": None, "examples_overlay.dcm": "MR, abdomen", "J2K_pixelrep_mismatch.dcm": "CT, head"}
"""Bundled files in the gallery (None: not shown), of those with boxes."""
_PHANTOM_SEED = 11
_PHANTOMS = (("chest", "Chest film, synthetic"), ("ct", "CT slice, synthetic"), ("skin", "Skin, synthetic"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """One picture of the gallery."""

    name: str
    title: str
    recipe: str | None = None
    frame: int | None = None
    boxes: tuple[Box, ...] = ()
    """Regions worth trying."""


class Samples:
    """The gallery's pictures by name."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._files: dict[str, bytes] = {}
        kinds: tuple[Any, ...] = tuple(kind for kind, _ in _PHANTOMS)
        self._source = Phantoms(count=len(kinds), kinds=kinds, seed=_PHANTOM_SEED)
        self._items = {f"phantom-{kind}.png": item for kind, item in zip(kinds, self._source.items(), strict=True)}
        self._paths = {name: i for i in PydicomSamples().items() if _SHOWN.get(name := Path(i.uri or "").name)}

    def cards(self) -> list[dict[str, Any]]:
        """What the page lists; nothing is painted for it."""
        cards = [Card(name=f"phantom-{kind}.png", title=title, recipe=f"phantom-{kind}") for kind, title in _PHANTOMS]
        for name, item in self._paths.items():
            sample = next(s for s in SAMPLES if Path(s.name).name == name)
            boxes = tuple(box for _, _, box in sample.boxes)
            cards.append(Card(name=name, title=_SHOWN[name] or name, frame=item.frame, boxes=boxes))
        return [asdict(card) for card in cards]

    def thumb(self, name: str) -> bytes | None:
        """A sample's small picture, JPEG; None for an unknown name."""
        data = self.file(name)
        if data is None:
            return None
        frame = next(card["frame"] for card in self.cards() if card["name"] == name)
        return preview_jpeg(render(decode(data, frame=frame)))

    def file(self, name: str) -> bytes | None:
        """A sample's bytes: PNG, or DICOM as bundled; None for an unknown name."""
        if name in self._paths:
            return Path(self._paths[name].uri or "").read_bytes()
        item = self._items.get(name)
        if item is None:
            return None
        with self._lock:
            if name not in self._files:
                decoded, _ = self._source.load(item, Limits())
                assert item.recipe is not None
                self._files[name] = encode_png(render(decoded, get_recipe(item.recipe).window))
            return self._files[name]
