"""Curated captions in the formats that others read: `FORMATS[name](items, out, card)`, a file each.

Each takes pictures one image at a time, so that memory holds one of them, and writes a folder. What a format cannot
carry is in its card or an extra key, never lost: labels, licence, lineage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from meddam_core.curation.exporters.coco import write_coco
from meddam_core.curation.exporters.dlc_bench import write_dlc_bench
from meddam_core.curation.exporters.hugging_face import write_hugging_face
from meddam_core.curation.exporters.item import Card, Item
from meddam_core.curation.exporters.llava import write_llava
from meddam_core.curation.exporters.webdataset import write_webdataset

Writer = Callable[[Iterable[Item], Path, Card], int]
"""Writes the items into a folder, returns the number of captions."""


def _write_dicom(items: Iterable[Item], out: Path, card: Card) -> int:
    from meddam_core.curation.exporters.dicom_report import write_dicom  # needs the `dicom-sr` extra

    return write_dicom(items, out, card)


FORMATS: dict[str, Writer] = {
    "hf": write_hugging_face, "llava": write_llava, "webdataset": write_webdataset, "coco": write_coco,
    "dlc-bench": write_dlc_bench, "dicom": _write_dicom,
}  # fmt: skip
"""Names of `meddam export --format`."""

__all__ = ["FORMATS", "Card", "Item", "Writer"]
