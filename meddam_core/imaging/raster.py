"""PNG, JPEG, TIFF, WebP, BMP, GIF and JPEG 2000 files -> one decoded picture.

Photographs come out as 8-bit RGB, upright (EXIF orientation applied) and in sRGB (embedded ICC profile applied); grey
pictures keep their 8 or 16 bits as they are. Alpha is dropped: the colours under it are kept as stored. Text chunks,
EXIF, thumbnails and profiles go no further.

Colours of 16 bits are kept (H, W, 3, uint16). Arrays: H rows, W columns, C colours R, G, B.
"""

from __future__ import annotations

import importlib
import io
from typing import Any

import numpy as np
import PIL
from numpy.typing import NDArray
from PIL import Image, ImageCms, ImageOps

from meddam_core.imaging.decoded import Decoded, Stored
from meddam_core.imaging.dicom_pixels import to_unsigned
from meddam_core.imaging.limits import Limits
from meddam_core.imaging.sniff import Kind
from meddam_core.records import Reason, Rescale, RowError

FORMATS: dict[Kind, str] = {
    "png": "PNG",
    "jpeg": "JPEG",
    "jpeg2000": "JPEG2000",
    "tiff": "TIFF",
    "webp": "WEBP",
    "bmp": "BMP",
    "gif": "GIF",
}
_TIFF_PHOTOMETRIC, _WHITE_IS_ZERO = 262, 0
_TIFF_BITS = 258
_SRGB = ImageCms.createProfile("sRGB")


def decode_raster(data: bytes, *, kind: Kind, frame: int | None = None, limits: Limits) -> Decoded:
    """A picture file, or page `frame` of it. Raises RowError; other errors are Pillow's, and mean a corrupt file."""
    image = _open(data, kind)
    limits.check_picture(rows=image.height, columns=image.width)
    num_frames = _seek(image, frame or 0, limits)
    limits.check_picture(rows=image.height, columns=image.width)
    notes = [f"pillow {PIL.__version__} {image.format}"]
    pixels, notes = _deep_colour(data, image, frame or 0, notes)
    if pixels is None:
        pixels, notes = _pixels(image, notes)
    stored, bits, shift = to_unsigned(pixels, 8 * pixels.dtype.itemsize)
    return Decoded(
        stored=stored,
        stored_bits=bits,
        rescale=Rescale(intercept=-shift) if shift else None,
        photometric=_photometric(image, stored),
        decoder="; ".join(notes),
        modality="XC" if stored.ndim == 3 else "OT",
        num_frames=num_frames,
        frame=(frame or 0) if num_frames > 1 else None,
    )


def _open(data: bytes, kind: Kind) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data), formats=(FORMATS[kind],))
    except Image.DecompressionBombError:
        raise RowError(Reason.TOO_LARGE, "the picture has more pixels than allowed") from None
    except PIL.UnidentifiedImageError:
        raise RowError(Reason.CORRUPT, f"the {FORMATS[kind]} header can't be read") from None


def _seek(image: Image.Image, frame: int, limits: Limits) -> int:
    """Go to page `frame`; returns the number of pages."""
    num_frames = int(getattr(image, "n_frames", 1))
    limits.check_picture(rows=image.height, columns=image.width, num_frames=num_frames)
    if not 0 <= frame < num_frames:
        raise RowError(Reason.BAD_ANNOTATION, f"frame {frame} of a file with {num_frames}")
    if num_frames > 1:
        image.seek(frame)
    return num_frames


def _deep_colour(
    data: bytes, image: Image.Image, frame: int, notes: list[str]
) -> tuple[NDArray[Any] | None, list[str]]:
    """Colour pictures of 16 bits a sample, which Pillow would cut to 8; None for all others."""
    if image.mode not in ("RGB", "RGBA") or not _is_deep(data, image):
        return None, notes
    cv2 = importlib.import_module("cv2")
    flags = cv2.IMREAD_UNCHANGED
    ok, pages = cv2.imdecodemulti(np.frombuffer(data, np.uint8), flags)
    if not ok or frame >= len(pages) or pages[frame].dtype != np.uint16 or pages[frame].ndim != 3:
        raise RowError(Reason.CORRUPT, "the 16-bit colour picture can't be decoded")
    return np.ascontiguousarray(pages[frame][..., 2::-1]), [f"opencv {cv2.__version__} {image.format}"]


def _is_deep(data: bytes, image: Image.Image) -> bool:
    if image.format == "PNG":
        return len(data) > 25 and data[24] == 16
    if image.format == "TIFF":
        bits = image.tag_v2.get(_TIFF_BITS, ())  # type: ignore[attr-defined]
        return bool(bits) and max(bits) == 16
    return False


def _pixels(image: Image.Image, notes: list[str]) -> tuple[NDArray[Any], list[str]]:
    """(H, W) grey of up to 32 bits, or (H, W, 3) uint8 RGB in sRGB, upright."""
    if image.mode in ("1", "LA", "La") or (image.mode == "P" and _grey_palette(image)):
        image = _same_place(image, image.convert("L"))
    elif image.mode in ("P", "PA", "RGBA", "RGBX", "RGBa", "YCbCr", "LAB", "HSV"):
        image = _same_place(image, image.convert("RGB"))
    if image.mode == "F":
        return _whole(np.asarray(image)), notes
    if image.mode in ("RGB", "CMYK"):
        image, notes = _to_srgb(image, notes)
    upright = ImageOps.exif_transpose(image)
    if upright is not image and upright.size != image.size:
        notes = [*notes, "exif orientation"]
    pixels = np.asarray(upright)
    if pixels.ndim not in (2, 3) or pixels.dtype.kind not in "ui":
        raise RowError(Reason.UNSUPPORTED_PIXELS, "pixels of this kind are not supported")
    return pixels.astype(pixels.dtype.newbyteorder("="), copy=False), notes


def _grey_palette(image: Image.Image) -> bool:
    palette = np.array(image.getpalette() or [], np.uint8).reshape(-1, 3)
    return bool((palette == palette[:, :1]).all())


def _same_place(source: Image.Image, converted: Image.Image) -> Image.Image:
    """EXIF orientation must survive a conversion of mode."""
    converted.info.setdefault("exif", source.info.get("exif", b""))
    return converted


def _whole(values_HW: NDArray[np.float32]) -> NDArray[np.int64]:
    """Floating-point pixels as integers, if that is what they hold."""
    if not np.isfinite(values_HW).all() or (values_HW != np.rint(values_HW)).any():
        raise RowError(Reason.UNSUPPORTED_PIXELS, "floating-point pixels don't fit in 16 bits")
    return values_HW.astype(np.int64)


def _to_srgb(image: Image.Image, notes: list[str]) -> tuple[Image.Image, list[str]]:
    """Apply the embedded ICC profile. A profile that can't be used is named, and the picture taken as sRGB."""
    profile = image.info.get("icc_profile")
    if profile:
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            moved = ImageCms.profileToProfile(image, source, _SRGB, outputMode="RGB")
            assert moved is not None
            return _same_place(image, moved), [*notes, "icc to srgb"]
        except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
            notes = [*notes, "unusable icc ignored"]
    return (image if image.mode == "RGB" else _same_place(image, image.convert("RGB"))), notes


def _photometric(image: Image.Image, stored: Stored) -> str:
    if stored.ndim == 3:
        return "RGB"
    # Pillow inverts WhiteIsZero pictures of up to 8 bits itself, but not those of 16
    white_is_zero = image.format == "TIFF" and image.tag_v2.get(_TIFF_PHOTOMETRIC) == _WHITE_IS_ZERO  # type: ignore[attr-defined]
    return "MONOCHROME1" if white_is_zero and stored.dtype == np.uint16 else "MONOCHROME2"
