"""Small image shards for job tests: real PNG pixels, a few regions each, made from a seed."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PilImage

from meddam_core import storage
from meddam_core.records import EncodedImage, Image, Region, image_id, region_id
from meddam_core.shards import write_shard

SIDE_PX = 96


def make_shards(
    uri: str, num_shards: int, images_per_shard: int, *, seed: int = 0, side_px: int = SIDE_PX,
    pixels: Callable[[int], NDArray[np.uint8]] | None = None,
) -> str:  # fmt: skip
    """Writes `num_shards` shards below `uri`, and returns it. One to three regions an image; every tenth has none."""
    for shard in range(num_shards):
        rows = (_image(shard, row, seed, side_px, pixels) for row in range(images_per_shard))
        write_shard(storage.join(uri, "shards", f"shard-{shard:06d}.parquet"), rows)
    return uri


def png(image_HWC: NDArray[np.uint8]) -> bytes:
    """The picture as PNG."""
    sink = io.BytesIO()
    PilImage.fromarray(image_HWC).save(sink, "PNG")
    return sink.getvalue()


def _image(shard: int, row: int, seed: int, side_px: int, pixels: Callable[[int], NDArray[np.uint8]] | None) -> Image:
    ident = image_id(shard, row)
    rng = np.random.default_rng([seed, shard, row])
    tile = rng.integers(0, 255, (side_px // 8, side_px // 8, 3), np.uint8)
    picture = np.kron(tile, np.ones((8, 8, 1), np.uint8)) if pixels is None else pixels(ident)
    num_regions = 0 if row % 10 == 9 else 1 + row % 3
    return Image(
        image_id=ident, image_key=f"key-{ident}", patient_key=f"patient-{shard}", dataset="made", recipe="generic",
        image=EncodedImage(bytes=png(picture)), preview=EncodedImage(bytes=png(picture[::4, ::4])),
        width=picture.shape[1], height=picture.shape[0], licence="CC0-1.0", egress="open",
        regions=list(_regions(ident, num_regions, rng, side_px)),
    )  # fmt: skip


def _regions(ident: int, num: int, rng: np.random.Generator, side_px: int) -> Iterable[Region]:
    for ordinal in range(num):
        x0, y0 = (int(v) for v in rng.integers(0, side_px - 40, 2))
        yield Region(region_id=region_id(ident, ordinal), box=(x0, y0, x0 + 30, y0 + 25))
