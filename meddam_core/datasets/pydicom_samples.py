"""Real files that come with pydicom, with boxes drawn by eye: CT, MR, nuclear, ultrasound and radiography pictures.

    meddam ingest pydicom-samples --out s3://bucket/samples

For demonstrations and tests: they need no download. Boxes were chosen by looking at the rendered pictures; labels name
only what can be told from them with certainty. Licence and origins: pydicom's own (MIT) and its test files' README.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from meddam_core.datasets.base import Source, SourceItem, SourceRegion
from meddam_core.records import Egress, Label


@dataclass(frozen=True, slots=True)
class _Sample:
    name: str
    boxes: tuple[tuple[str, str, tuple[int, int, int, int]], ...]
    """(structure, side, box)."""
    frame: int | None = None


SAMPLES = (
    _Sample("CT_small.dcm", (("vertebral body", "", (40, 4, 79, 49)), ("descending aorta", "left", (74, 0, 112, 31)))),
    _Sample(
        "J2K_pixelrep_mismatch.dcm",
        (("mastoid air cells", "right", (92, 268, 168, 360)), ("cerebellum", "", (150, 300, 372, 392))),
    ),
    _Sample("MR_small.dcm", (("ring-shaped structure", "", (34, 26, 56, 47)),)),
    _Sample(
        "examples_overlay.dcm",
        (("kidney", "right", (116, 188, 188, 254)), ("kidney", "left", (286, 186, 356, 252)),
         ("liver", "right", (52, 92, 182, 202)), ("aorta", "", (238, 160, 272, 194))),
    ),
    _Sample("JPEG2000.dcm", (("skull", "", (96, 70, 160, 170)), ("pelvis", "", (92, 330, 164, 440)))),
    _Sample("examples_ybr_color.dcm", (("heart chambers", "", (118, 36, 226, 200)),), frame=12),
    _Sample("dicomdirtests/77654033/CR1/6154", (("thumbnail of a radiograph", "", (0, 0, 16, 16)),)),
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class PydicomSamples(Source):
    """The bundled files above."""

    dataset: str = "pydicom-samples"
    licence: str = "MIT"
    egress: Egress = "open"

    def fingerprint(self) -> str:
        """Of the list above and the files' bytes."""
        digest = hashlib.sha256(repr((self, SAMPLES)).encode())
        for sample in SAMPLES:
            digest.update(_path(sample.name).read_bytes())
        return digest.hexdigest()

    def items(self) -> Iterator[SourceItem]:
        """One item a file. Raises ValueError where pydicom was installed without its test files."""
        for sample in SAMPLES:
            regions = [
                SourceRegion(ordinal=ordinal, box=[float(v) for v in box], labels=_labels(structure, side))
                for ordinal, (structure, side, box) in enumerate(sample.boxes)
            ]
            yield SourceItem(key=sample.name, uri=str(_path(sample.name)), frame=sample.frame, regions=regions)


def _labels(structure: str, side: str) -> list[Label]:
    labels = [Label(name="structure", value=structure)]
    return [*labels, Label(name="side", value=side)] if side else labels


def _path(name: str) -> Path:
    import pydicom.data

    path = Path(pydicom.data.__file__).parent / "test_files" / name
    if not path.is_file():
        raise ValueError(f"this pydicom has no bundled {name}; install pydicom 3 from PyPI, with its test files")
    return path
