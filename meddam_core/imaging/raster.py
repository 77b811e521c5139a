"""PNG, JPEG, TIFF, WebP, BMP, GIF and JPEG 2000 files -> one decoded picture.

Photographs come out as 8-bit RGB, upright (EXIF orientation applied) and in sRGB (embedded ICC profile applied); grey
pictures keep their 8 or 16 bits as they are. Alpha is kept apart: the colours under it are as stored. Text chunks,
EXIF, thumbnails and profiles go no further.

Colours of 16 bits are kept (H, W, 3, uint16). Arrays: H rows, W columns, C colours R, G, B.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import PIL
from numpy.typing import NDArray
from PIL import Image, ImageCms
from PIL.TiffImagePlugin import TiffImageFile

from meddam_core.imaging.decoded import Decoded, Stored
from meddam_core.imaging.frames import to_unsigned
from meddam_core.imaging.limits import Limits
from meddam_core.imaging.png import END, is_plain_png
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
_ORIENTATION = 274
_UPRIGHT: dict[int, Callable[[NDArray[Any]], NDArray[Any]]] = {
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: np.rot90,
}
"""What brings a picture upright, by EXIF orientation (CIPA DC-008 4.6.4)."""
_SRGB = ImageCms.createProfile("sRGB")
try:
    import imagecodecs
except ImportError:
    _PNG_DECODE, _PNG_DECODER = None, ""
else:
    _PNG_DECODE, _PNG_DECODER = imagecodecs.png_decode, f"imagecodecs {imagecodecs.__version__} PNG"


def decode_raster(data: bytes, *, kind: Kind, frame: int | None = None, limits: Limits) -> Decoded:
    """A picture file, or page `frame` of it. Raises RowError; other errors are Pillow's, and mean a corrupt file."""
    if kind == "png" and not frame and (plain := _plain_png(data, limits)) is not None:
        return plain
    image = _open(data, kind)
    limits.check_picture(rows=image.height, columns=image.width)
    num_frames = _seek(image, frame or 0, limits)
    limits.check_picture(rows=image.height, columns=image.width)
    notes = [f"pillow {PIL.__version__} {image.format}"]
    orientation = _orientation(image, notes)
    alpha_HW = _alpha(image)
    if _is_deep_colour(data, image):
        pixels = _deep_colour(data, image, frame or 0, notes)
    else:
        pixels = _pixels(image, notes)
    if orientation in _UPRIGHT:
        pixels = _UPRIGHT[orientation](pixels)
        alpha_HW = None if alpha_HW is None else np.ascontiguousarray(_UPRIGHT[orientation](alpha_HW))
        notes.append("exif orientation")
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
        alpha_HW=alpha_HW,
    )


def _plain_png(data: bytes, limits: Limits) -> Decoded | None:
    """A PNG of 8 bits with nothing in it that changes pixels, as clients send most, in a third of Pillow's time.

    None for any other, and for one that is broken or too large, of which Pillow's way then says what it is.
    """
    if _PNG_DECODE is None or not is_plain_png(data):
        return None
    try:
        limits.check_picture(rows=int.from_bytes(data[20:24]), columns=int.from_bytes(data[16:20]))
        pixels = _PNG_DECODE(data)
    except (RowError, RuntimeError, ValueError):
        return None
    alpha_HW = cv2.extractChannel(pixels, 3) if pixels.ndim == 3 and pixels.shape[2] == 4 else None
    stored = pixels if alpha_HW is None else cv2.cvtColor(pixels, cv2.COLOR_RGBA2RGB)
    return Decoded(
        stored=stored,  # type: ignore[arg-type]
        stored_bits=8,
        photometric="RGB" if stored.ndim == 3 else "MONOCHROME2",
        decoder=_PNG_DECODER,
        modality="XC" if stored.ndim == 3 else "OT",
        alpha_HW=alpha_HW,  # type: ignore[arg-type]
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


def _orientation(image: Image.Image, notes: list[str]) -> int:
    """The EXIF (or TIFF) orientation, 1 to 8; 1 where there is none or it can't be read."""
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except (SyntaxError, ValueError, TypeError, KeyError, OSError, struct.error):
        notes.append("unreadable exif ignored")
        return 1


def _alpha(image: Image.Image) -> NDArray[np.uint8] | None:
    """(H, W) the alpha channel, not yet upright; None where there is none."""
    if image.mode in ("RGBA", "LA", "PA"):
        return np.asarray(image.getchannel("A"))
    if "transparency" in image.info and image.mode in ("L", "RGB", "P"):
        return np.asarray(image.convert("RGBA").getchannel("A"))
    return None


def _is_deep_colour(data: bytes, image: Image.Image) -> bool:
    """Whether this is a colour picture of 16 bits a sample, which Pillow would cut to 8."""
    if image.mode not in ("RGB", "RGBA"):
        return False
    if image.format == "PNG":
        return len(data) > 25 and data[24] == 16
    bits = image.tag_v2.get(_TIFF_BITS, ()) if isinstance(image, TiffImageFile) else ()
    return max(bits, default=8) == 16


def _deep_colour(data: bytes, image: Image.Image, frame: int, notes: list[str]) -> NDArray[Any]:
    if image.format == "PNG" and END not in data:
        raise RowError(Reason.CORRUPT, "the picture is cut short")
    ok, pages = cv2.imdecodemulti(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if not ok or frame >= len(pages) or pages[frame].dtype != np.uint16 or pages[frame].ndim != 3:
        raise RowError(Reason.CORRUPT, "the 16-bit colour picture can't be decoded")
    notes[0] = f"opencv {cv2.__version__} {image.format}"
    return np.ascontiguousarray(pages[frame][..., 2::-1])


def _pixels(image: Image.Image, notes: list[str]) -> NDArray[Any]:
    """(H, W) grey of up to 32 bits, or (H, W, 3) uint8 RGB in sRGB, as the file has it: not yet upright."""
    if image.mode in ("1", "LA", "La") or (image.mode == "P" and _is_grey_palette(image)):
        image = image.convert("L")
    elif image.mode in ("P", "PA", "RGBA", "RGBX", "RGBa", "YCbCr"):
        profile = image.info.get("icc_profile")
        image = image.convert("RGB")
        image.info["icc_profile"] = profile
    if image.mode == "F":
        return _whole(np.asarray(image))
    if image.mode in ("RGB", "CMYK"):
        image = _to_srgb(image, notes)
    pixels = np.asarray(image)
    if image.mode in ("LAB", "HSV") or pixels.ndim not in (2, 3) or pixels.dtype.kind not in "ui":
        raise RowError(Reason.UNSUPPORTED_PIXELS, "pixels of this kind are not supported")
    return pixels.astype(pixels.dtype.newbyteorder("="), copy=False)


def _is_grey_palette(image: Image.Image) -> bool:
    palette = np.array(image.getpalette() or [], np.uint8).reshape(-1, 3)
    return bool((palette == palette[:, :1]).all())


def _whole(values_HW: NDArray[np.float32]) -> NDArray[np.int64]:
    """Floating-point pixels as integers, if that is what they hold."""
    if not np.isfinite(values_HW).all() or (values_HW != np.rint(values_HW)).any():
        raise RowError(Reason.UNSUPPORTED_PIXELS, "floating-point pixels don't fit in 16 bits")
    return values_HW.astype(np.int64)


def _to_srgb(image: Image.Image, notes: list[str]) -> Image.Image:
    """Apply the embedded ICC profile. A profile that can't be used is named, and the picture taken as sRGB."""
    profile = image.info.get("icc_profile")
    if profile:
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            moved = ImageCms.profileToProfile(image, source, _SRGB, outputMode="RGB")
        except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
            notes.append("unusable icc ignored")
        else:
            assert moved is not None
            notes.append("icc to srgb")
            return moved
    return image if image.mode == "RGB" else image.convert("RGB")


def _photometric(image: Image.Image, stored: Stored) -> str:
    if stored.ndim == 3:
        return "RGB"
    # Pillow inverts WhiteIsZero pictures of up to 8 bits itself, but not those of 16
    white_is_zero = isinstance(image, TiffImageFile) and image.tag_v2.get(_TIFF_PHOTOMETRIC) == _WHITE_IS_ZERO
    return "MONOCHROME1" if white_is_zero and stored.dtype == np.uint16 else "MONOCHROME2"
