"""From a DICOM film to what a model sees, per core, against plain pydicom + PIL doing the same work.

    python -m benchmarks.decode                      all transfer syntaxes, 3000 x 2500 pixels of 12 bits
    python -m benchmarks.decode --repeats 9 --json

Three kinds of work, each done by both sides on the same bytes in one process, one thread, in turns; the least
processor time of each counts, since the figure is per core. Before timing, both must give the same pixels (at most one
grey level apart).

    region    the 8-bit crop around one region (900 x 1,100 pixels), resized to 384: what other VLMs are given
    views     full view and focal crop with their masks, 384 x 384: what DAM is given
    ingest    lossless PNG of the stored values and a preview: what a shard holds

Plain means: dcmread, pixel_array by the same codec, apply_modality_lut, apply_voi_lut, inversion, 8 bit, PIL, and PNG
at its fastest level.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import os
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import cv2
import numpy as np
import pydicom
from numpy.typing import NDArray
from openjpeg.utils import encode_array
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.pixels import apply_modality_lut, apply_voi_lut, get_decoder
from pydicom.uid import ExplicitVRLittleEndian, JPEG2000Lossless, JPEGLosslessSV1, JPEGLSLossless, RLELossless

from meddam_core.focal import expanded_box, focal_views, region_crop
from meddam_core.imaging.decode import decode
from meddam_core.imaging.deidentify import image_fields
from meddam_core.imaging.render import render
from meddam_core.records import Box

ROWS, COLUMNS, BITS = 3000, 2500, 12
REGION: Box = (900, 1067, 1200, 1433)
FOCAL: Box = expanded_box(REGION, (COLUMNS, ROWS))
SIDE_PX = 384


def film(noise: float = 6.0) -> NDArray[np.uint16]:
    """A smooth chest-like field with fine structure and the noise of a detector: about 5 bits a pixel lossless."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:ROWS, :COLUMNS].astype(np.float32)
    smooth = 2000 + 1200 * np.sin(x / 300) * np.cos(y / 400)
    structure = cv2.GaussianBlur(rng.normal(0, 300, (ROWS, COLUMNS)).astype(np.float32), (0, 0), 3) * 5
    return np.clip(smooth + structure + rng.normal(0, noise, (ROWS, COLUMNS)), 0, 4095).astype(np.uint16)


def dicom_bytes(pixels: NDArray[np.uint16], syntax: str) -> bytes:
    """The film as a MONOCHROME1 radiograph in one transfer syntax."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = syntax
    meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.1.1"
    meta.MediaStorageSOPInstanceUID = "1.2.3"
    ds = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)  # type: ignore[arg-type]
    ds.SOPClassUID, ds.Modality, ds.PhotometricInterpretation = meta.MediaStorageSOPClassUID, "DX", "MONOCHROME1"
    ds.Rows, ds.Columns, ds.SamplesPerPixel, ds.PixelRepresentation = *pixels.shape, 1, 0
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = 16, BITS, BITS - 1
    ds.WindowCenter, ds.WindowWidth, ds.RescaleSlope, ds.RescaleIntercept = 2048, 3600, 1, 0
    if syntax == ExplicitVRLittleEndian:
        ds.PixelData = pixels.tobytes()
    elif syntax == RLELossless:
        ds.PixelData = pixels.tobytes()
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        ds.compress(RLELossless)
    else:
        ds.PixelData = encapsulate([ENCODERS[syntax](pixels)])
        ds["PixelData"].is_undefined_length = True
    out = io.BytesIO()
    ds.save_as(out, enforce_file_format=True)
    return out.getvalue()


def _jpeg_ls(pixels: NDArray[np.uint16]) -> bytes:
    import jpeg_ls

    return bytes(jpeg_ls.encode_array(pixels))


def _jpeg_lossless(pixels: NDArray[np.uint16]) -> bytes:
    import imagecodecs

    return bytes(imagecodecs.ljpeg_encode(pixels, bitspersample=BITS))


ENCODERS: dict[str, Callable[[NDArray[np.uint16]], bytes]] = {
    JPEG2000Lossless: lambda p: bytes(encode_array(p, bits_stored=BITS, photometric_interpretation=2)),
    JPEGLSLossless: _jpeg_ls,
    JPEGLosslessSV1: _jpeg_lossless,
}
SYNTAXES = {
    "uncompressed": (ExplicitVRLittleEndian, ""),
    "JPEG 2000": (JPEG2000Lossless, "openjpeg"),
    "RLE": (RLELossless, "rle"),
    "JPEG-LS": (JPEGLSLossless, "jpeg_ls"),
    "JPEG lossless": (JPEGLosslessSV1, "imagecodecs"),
}


# ---------------------------------------------------------------------------------------------------------------------
# plain pydicom + PIL


PLUGINS = {JPEG2000Lossless: "pylibjpeg", JPEGLSLossless: "pyjpegls", RLELossless: "pylibjpeg"}
"""pydicom is given the same codec as we use, where it can have it."""


def plain_dataset(data: bytes) -> pydicom.Dataset:
    ds = pydicom.dcmread(io.BytesIO(data))
    ds.pixel_array_options(decoding_plugin=PLUGINS.get(ds.file_meta.TransferSyntaxUID, ""))
    return ds


def plain_picture(ds: pydicom.Dataset) -> Image.Image:
    values = apply_voi_lut(apply_modality_lut(ds.pixel_array, ds), ds)
    shown = values / (2**BITS - 1)
    if ds.PhotometricInterpretation == "MONOCHROME1":
        shown = 1 - shown
    return Image.fromarray(np.clip(np.rint(shown * 255), 0, 255).astype(np.uint8)).convert("RGB")


def plain_region(data: bytes) -> list[NDArray[Any]]:
    return [
        np.asarray(plain_picture(plain_dataset(data)).crop(FOCAL).resize((SIDE_PX, SIDE_PX), Image.Resampling.BICUBIC))
    ]


def plain_views(data: bytes) -> list[NDArray[Any]]:
    picture, size = plain_picture(plain_dataset(data)), (SIDE_PX, SIDE_PX)
    mask = Image.fromarray(region_mask())
    parts = [picture, mask, picture.crop(FOCAL), mask.crop(FOCAL)]
    return [np.asarray(p.resize(size, Image.Resampling.BICUBIC)) for p in parts]


def plain_ingest(data: bytes) -> list[NDArray[Any]]:
    ds = plain_dataset(data)
    Image.fromarray(ds.pixel_array).save(io.BytesIO(), "PNG", compress_level=1)
    picture = plain_picture(ds)
    picture.thumbnail((256, 256))
    picture.save(io.BytesIO(), "JPEG", quality=85)
    return []


# ---------------------------------------------------------------------------------------------------------------------
# this package


def region_mask() -> NDArray[np.uint8]:
    mask_HW = np.zeros((ROWS, COLUMNS), np.uint8)
    mask_HW[REGION[1] : REGION[3], REGION[0] : REGION[2]] = 255
    return mask_HW


def our_region(data: bytes) -> list[NDArray[Any]]:
    part_HWC = render(decode(data, box=FOCAL), "header")
    return [region_crop(part_HWC, (0, 0, part_HWC.shape[1], part_HWC.shape[0]), SIDE_PX, aspect="stretch")]


def our_views(data: bytes) -> list[NDArray[Any]]:
    views = focal_views(render(decode(data)), region_mask(), SIDE_PX)
    return [views[0:3].transpose(1, 2, 0), views[3], views[4:7].transpose(1, 2, 0), views[7]]


def our_ingest(data: bytes) -> list[NDArray[Any]]:
    image_fields(decode(data))
    return []


WORK = {
    "region": (plain_region, our_region),
    "views": (plain_views, our_views),
    "ingest": (plain_ingest, our_ingest),
}


def plain_reads(data: bytes) -> bool:
    """Whether the installed pydicom has a decoder for the film's transfer syntax."""
    return get_decoder(pydicom.dcmread(io.BytesIO(data)).file_meta.TransferSyntaxUID).is_available


def measure(work: str, data: bytes, repeats: int) -> tuple[float | None, float]:
    """(plain, ours): the least seconds of each, taken in turns after one unmeasured round that compares the results.

    plain is None where pydicom, as installed, can't read the film.
    """
    plain, ours = WORK[work]
    sides = [plain, ours] if plain_reads(data) else [ours]
    if len(sides) == 2:
        for expected, got in zip(plain(data), ours(data), strict=True):
            assert expected.shape == got.shape
            assert np.abs(expected.astype(int) - got).max() <= 1, f"{work}: not the same pixels"
    best = [float("inf")] * len(sides)
    for _ in range(repeats):
        for side, function in enumerate(sides):
            start = time.process_time()
            function(data)
            best[side] = min(best[side], time.process_time() - start)
    return (best[0] if len(sides) == 2 else None), best[-1]


def run(repeats: int, works: list[str]) -> list[dict[str, Any]]:
    """One row a transfer syntax and kind of work."""
    cv2.setNumThreads(1)
    pixels = film()
    rows = []
    for name, (syntax, module) in SYNTAXES.items():
        if module and importlib.util.find_spec(module) is None:
            continue
        data = dicom_bytes(pixels, syntax)
        for work in works:
            plain_s, ours_s = measure(work, data, repeats)
            row = {"syntax": name, "megabytes": len(data) / 1e6, "work": work, "plain_s": plain_s, "ours_s": ours_s}
            rows.append({**row, "images_per_s": 1 / ours_s, "ratio": plain_s / ours_s if plain_s else None})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--work", nargs="*", choices=list(WORK), default=list(WORK))
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = run(options.repeats, options.work)
    if options.json:
        print(json.dumps(rows, indent=1))
        return
    print(f"{ROWS} x {COLUMNS} pixels of {BITS} bits, processor time of one thread, least of {options.repeats}")
    print(f"{'transfer syntax':<15} {'MB':>5} {'work':<7} {'plain ms':>9} {'ours ms':>8} {'images/s':>9} {'ratio':>6}")
    for r in rows:
        plain, ratio = ("-", "-") if r["ratio"] is None else (f"{1e3 * r['plain_s']:.0f}", f"{r['ratio']:.1f}x")
        head = f"{r['syntax']:<15} {r['megabytes']:5.1f} {r['work']:<7} {plain:>9}"
        print(f"{head} {1e3 * r['ours_s']:8.0f} {r['images_per_s']:9.1f} {ratio:>6}")


if __name__ == "__main__":
    main()
