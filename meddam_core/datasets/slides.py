"""Whole-slide pictures, cut into tiles of tissue through OpenSlide (`pip install meddam[wsi]`).

    meddam ingest slides s3://bucket/slides --out s3://bucket/tiles

A tile is read at `mpp` micrometres a pixel, with `context` of its side around it: its region is the inner square, so
that regions cover the tissue once and each is seen with its surroundings. Glass is left out: a tile counts as tissue
where at least `min_tissue` of it is darker and more saturated than glass, by Otsu on the slide's thumbnail.

Slides on S3 are copied to a temporary file while they are worked on: OpenSlide reads local files only. Labels and macro
pictures of a slide, which may show a name, are never read.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image as PilImage

from meddam_core import storage
from meddam_core.datasets.base import Problem, Source, SourceItem, SourceRegion
from meddam_core.datasets.tables import files_below, names_digest, relative
from meddam_core.imaging.decoded import Decoded
from meddam_core.imaging.limits import Limits
from meddam_core.records import Egress, Reason, RowError

VERSION = 1
SUFFIXES = (".svs", ".tif", ".tiff", ".ndpi", ".scn", ".bif", ".vms", ".vmu", ".svslide")
_THUMBNAIL_PX = 2048
_SATURATION = 12
"""Least saturation, of 255, that stained tissue has, whatever Otsu says of an empty slide."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Slides(Source):
    """Tiles of whole slides."""

    path: str
    """Folder of the slides, on S3 or disk."""
    tile_px: int = 512
    """Side of a region."""
    context: float = 0.5
    """Added on each side of it, as a share of its side."""
    mpp: float = 0.5
    """Micrometres a pixel: 0.5 is 20x, 0.25 is 40x."""
    min_tissue: float = 0.5
    max_tiles: int | None = None
    """Tiles a slide, evenly chosen; None takes all."""
    dataset: str = "slides"
    licence: str = "unknown"
    egress: Egress = "deny"

    def fingerprint(self) -> str:
        """Of the settings and the slides' names and sizes."""
        return hashlib.sha256(
            f"{VERSION} {self!r} {names_digest(files_below(self.path, SUFFIXES))}".encode()
        ).hexdigest()

    def items(self) -> Iterator[SourceItem]:
        """One item a tile, slide by slide, row by row. Raises ValueError where there is no slide or no OpenSlide."""
        _openslide()
        slides = files_below(self.path, SUFFIXES)
        if not slides:
            raise ValueError(f"{self.path} holds no slide ({', '.join(SUFFIXES)}); check its name")
        for entry in slides:
            key = relative(entry.uri, self.path)
            try:
                with _opened(entry.uri) as slide:
                    corners = self._corners(slide)
            except RowError as error:
                yield SourceItem(key=key, problems=[Problem(reason=error.reason, detail=error.detail)])
                continue
            if not corners:
                yield SourceItem(key=key, problems=[Problem(reason=Reason.NO_REGIONS, detail="no tissue was found")])
            for x, y in corners:
                yield SourceItem(
                    key=f"{key}#{x},{y}", uri=f"{entry.uri}#{x},{y}", study_id=key, modality="SM", recipe="slide-tile"
                )

    def load(self, item: SourceItem, limits: Limits) -> tuple[Decoded, list[SourceRegion]]:
        """The tile with its surroundings, and its inner square. Raises RowError."""
        assert item.uri is not None
        uri, _, at = item.uri.rpartition("#")
        x, y = (int(v) for v in at.split(","))
        slide = _held(uri).slide
        scale, _ = self._scale(slide)
        around = round(self.tile_px * self.context)
        width, height = slide.dimensions
        left, top = max(x - round(around * scale), 0), max(y - round(around * scale), 0)
        right = min(x + round((self.tile_px + around) * scale), width)
        bottom = min(y + round((self.tile_px + around) * scale), height)
        size = max(1, round((right - left) / scale)), max(1, round((bottom - top) / scale))
        limits.check_picture(rows=size[1], columns=size[0])
        pixels = _read(slide, (left, top, right, bottom), size)
        inner = (x - left) / scale, (y - top) / scale
        side = float(self.tile_px)
        box = [inner[0], inner[1], min(inner[0] + side, size[0]), min(inner[1] + side, size[1])]
        decoded = Decoded(
            stored=pixels, decoder=f"openslide {_openslide().__library_version__}", modality="SM",
            pixel_spacing_mm=(self.mpp / 1000, self.mpp / 1000) if self._scale(slide)[1] else None,
            burned_in_annotation=False,
        )  # fmt: skip
        return decoded, [SourceRegion(ordinal=0, box=box)]

    def _scale(self, slide: Any) -> tuple[float, bool]:
        """(level-0 pixels per pixel of a tile, whether the slide says its resolution)."""
        text = slide.properties.get("openslide.mpp-x")
        try:
            given = float(text) if text else 0.0
        except ValueError:
            given = 0.0
        return (self.mpp / given, True) if 0.01 < given < 100 else (1.0, False)

    def _corners(self, slide: Any) -> list[tuple[int, int]]:
        """Top left corners, in level-0 pixels, of the tiles that hold tissue."""
        scale, _ = self._scale(slide)
        step = self.tile_px * scale
        width, height = slide.dimensions
        tissue = tissue_of(np.asarray(slide.get_thumbnail((_THUMBNAIL_PX, _THUMBNAIL_PX)).convert("RGB")))
        sums = cv2.integral(tissue)
        fx, fy = tissue.shape[1] / width, tissue.shape[0] / height
        found = []
        for row in range(max(1, int(height // step))):
            for column in range(max(1, int(width // step))):
                x0, y0 = int(column * step * fx), int(row * step * fy)
                x1 = min(max(x0 + 1, int((column + 1) * step * fx)), tissue.shape[1])
                y1 = min(max(y0 + 1, int((row + 1) * step * fy)), tissue.shape[0])
                inside = float(sums[y1, x1] - sums[y0, x1] - sums[y1, x0] + sums[y0, x0])
                if inside >= self.min_tissue * (x1 - x0) * (y1 - y0):
                    found.append((round(column * step), round(row * step)))
        if self.max_tiles is None or len(found) <= self.max_tiles:
            return found
        return [found[i * len(found) // self.max_tiles] for i in range(self.max_tiles)]


def tissue_of(thumbnail_HWC: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(H, W) uint8, 1 where a stained slide shows tissue: more saturated than glass, by Otsu."""
    saturation = cv2.medianBlur(cv2.cvtColor(thumbnail_HWC, cv2.COLOR_RGB2HSV)[..., 1], 5)
    threshold, _ = cv2.threshold(saturation, 0, 255, cv2.THRESH_BINARY + cv2.THRESH_OTSU)
    return np.asarray(saturation > max(threshold, _SATURATION), np.uint8)


def _read(slide: Any, box: tuple[int, int, int, int], size: tuple[int, int]) -> NDArray[np.uint8]:
    """(H, W, 3) uint8: a rectangle of level-0 pixels, at `size` (width, height); what was not scanned is white."""
    level = slide.get_best_level_for_downsample((box[2] - box[0]) / size[0] + 1e-6)
    downsample = slide.level_downsamples[level]
    read = max(1, round((box[2] - box[0]) / downsample)), max(1, round((box[3] - box[1]) / downsample))
    try:
        picture = slide.read_region(box[:2], level, read)
    except _openslide().OpenSlideError:
        raise RowError(Reason.CORRUPT, "the slide cannot be read at this place") from None
    white = PilImage.new("RGBA", picture.size, (255, 255, 255, 255))
    colours = PilImage.alpha_composite(white, picture).convert("RGB")
    if colours.size != size:
        colours = colours.resize(size, PilImage.Resampling.BOX if read[0] > size[0] else PilImage.Resampling.BICUBIC)
    return np.ascontiguousarray(np.asarray(colours))


def _openslide() -> Any:
    try:
        import openslide
    except ImportError as error:
        raise ValueError("whole slides need OpenSlide: pip install 'meddam[wsi]'") from error
    return openslide


@lru_cache(maxsize=1)  # the tiles of a slide come one after the other
def _held(uri: str) -> _Slide:
    """An open slide, kept until another is asked for."""
    return _Slide(uri)


@contextmanager
def _opened(uri: str) -> Iterator[Any]:
    held = _Slide(uri)
    try:
        yield held.slide
    finally:
        held.slide.close()


class _Slide:
    """An open slide. One from S3 is copied first; the copy goes away with this object."""

    def __init__(self, uri: str) -> None:
        openslide = _openslide()
        try:
            if not storage.is_s3(uri):
                self.slide = openslide.OpenSlide(storage.open_uri(uri)[1])
                return
            fs, path = storage.open_uri(uri)
            self._folder = tempfile.TemporaryDirectory(prefix="meddam-slide-")
            local = Path(self._folder.name) / f"slide{Path(path).suffix}"
            with fs.open_input_stream(path) as stream, local.open("wb") as copy:
                shutil.copyfileobj(stream, copy, 1 << 22)
            self.slide = openslide.OpenSlide(local)
        except FileNotFoundError:
            raise RowError(Reason.NOT_FOUND, "the slide is not there") from None
        except openslide.OpenSlideUnsupportedFormatError:
            raise RowError(Reason.NOT_AN_IMAGE, "the file is no slide that OpenSlide can read") from None
        except openslide.OpenSlideError:
            raise RowError(Reason.CORRUPT, "the slide is broken") from None
