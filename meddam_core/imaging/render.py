"""Stored pixels -> the 8-bit RGB picture that models and people see.

    image_HWC = render(decoded)                  # the default window of its modality, see windows.default_window
    image_HWC = render(row, "lung")              # a CT preset
    image_HWC = render(row, "three_window")      # CT: lung, soft tissue, bone as red, green, blue

Order: rescale or table -> window -> MONOCHROME1 inversion -> 8 bit, with padding black (PS3.3 C.11.1, C.11.2, C.7.6.3).
Stored values are integers, so the whole chain is computed once for each possible value and looked up for each pixel.
Inversion happens within the window, before rounding: a MONOCHROME1 film equals its MONOCHROME2 twin to the last bit.

Arrays: H rows, W columns, C colours R, G, B; V stored values.
"""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from meddam_core.imaging.decoded import Decoded, Stored
from meddam_core.imaging.png import decode_png
from meddam_core.imaging.windows import (
    THREE_WINDOW,
    THREE_WINDOWS,
    Facts,
    default_window,
    physical_values,
    preset,
    window_curve,
)
from meddam_core.records import Box, Image, Reason, RowError, Window

HEADER = "header"
_BLOCK_PIXELS = 1 << 16
"""Pixels looked up at a time: the index temporaries stay in the processor's cache."""


def render(image: Image | Decoded, window: Window | str | None = None) -> NDArray[np.uint8]:
    """(H, W, 3) uint8 RGB of a row or a decoded picture.

    window: a Window, the name of a CT preset, "three_window", "header" for the header's own even if it looks like
    nonsense, or None for the default of the modality. Colour pictures
    have no window: they pass through. Raises ValueError for a preset that doesn't exist; RowError(unsupported_pixels)
    for a CT preset on values that aren't HU, and whatever is wrong with the row's picture.
    """
    return render_stored(stored_pixels(image), image, window)


def render_shared(image: Image | Decoded, window: Window | str | None = None) -> NDArray[np.uint8]:
    """As `render`, read-only; the three channels of a grey picture are one and the same memory, written once."""
    stored = stored_pixels(image)
    if stored.ndim == 3 or window == THREE_WINDOW:
        return render_stored(stored, image, window)
    grey_HW = _grey(stored, stored, image, window)
    return np.broadcast_to(grey_HW[:, :, None], (*grey_HW.shape, 3))


def stored_pixels(image: Image | Decoded) -> Stored:
    """The stored pixels of a row or a decoded picture. Raises RowError(no_pixels, corrupt)."""
    if isinstance(image, Decoded):
        return image.stored
    if image.image.bytes is None:
        raise RowError(Reason.NO_PIXELS, "the row holds no pixels")
    return decode_png(image.image.bytes)


def render_stored(
    stored: Stored, facts: Facts, window: Window | str | None = None, *, box: Box | None = None
) -> NDArray[np.uint8]:
    """As `render`, for pixels at hand: (H, W, 3) uint8, or only the part within `box`.

    The default window is always that of the whole picture, so that a part looks as it does in the whole.
    """
    part = stored if box is None else stored[box[1] : box[3], box[0] : box[2]]
    if stored.ndim == 3:
        return _to_8_bit(part, facts.stored_bits)
    if window == THREE_WINDOW:
        _check_hounsfield(facts)
        return np.stack([look_up(part, display_table(stored.dtype, facts, w)) for w in THREE_WINDOWS], axis=-1)
    return cv2.cvtColor(_grey(part, stored, facts, window), cv2.COLOR_GRAY2RGB)  # type: ignore[return-value]


def _grey(part: Stored, whole: Stored, facts: Facts, window: Window | str | None) -> NDArray[np.uint8]:
    """(h, w) uint8 of a part of a picture, by the whole's window."""
    return look_up(part, display_table(whole.dtype, facts, resolve_window(whole, facts, window)))


def resolve_window(stored: Stored, facts: Facts, window: Window | str | None) -> Window | None:
    """The window that `render` will use: goes into the row as provenance. None for colour."""
    if window == HEADER:
        return facts.window or default_window(stored, facts)
    if isinstance(window, str):
        found = preset(window)
        if stored.ndim == 3:
            return None
        _check_hounsfield(facts)
        return found
    return default_window(stored, facts) if window is None else window


def _check_hounsfield(facts: Facts) -> None:
    if facts.modality != "CT" or (facts.rescale is None and facts.lut is None):
        raise RowError(Reason.UNSUPPORTED_PIXELS, "a CT window was asked for, but the picture's values are not in HU")


def display_table(dtype: np.dtype[Any], facts: Facts, window: Window | None) -> NDArray[np.uint8]:
    """(V,) uint8: what is shown for each stored value of type `dtype`. window None: the header's display table."""
    values = np.arange(1 << (8 * dtype.itemsize))
    if window is not None:
        shown = window_curve(physical_values(facts, values), window)
    else:
        assert facts.lut is not None and facts.lut.stage == "display"
        entries = np.asarray(facts.lut.values, np.float64) / ((1 << facts.lut.bits) - 1)
        shown = np.clip(entries[np.clip(values - facts.lut.first, 0, len(entries) - 1)], 0, 1)
    if facts.photometric == "MONOCHROME1":
        shown = 1 - shown
    table = np.rint(np.round(255 * shown, 9)).astype(np.uint8)
    if facts.padding:
        table[facts.padding[0] : facts.padding[1] + 1] = 0
    return table


def look_up(stored_HW: Stored, table_V: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(H, W) uint8: the table's entry for every pixel."""
    if stored_HW.dtype == np.uint8:
        return cv2.LUT(np.ascontiguousarray(stored_HW), table_V)  # type: ignore[return-value]
    out = np.empty(stored_HW.shape, np.uint8)
    rows = max(1, _BLOCK_PIXELS // max(1, stored_HW.shape[1]))
    for top in range(0, len(out), rows):
        np.take(table_V, stored_HW[top : top + rows], out=out[top : top + rows], mode="clip")
    return out


def _to_8_bit(rgb_HWC: Stored, bits: int) -> NDArray[np.uint8]:
    if rgb_HWC.dtype == np.uint8:
        return np.ascontiguousarray(rgb_HWC)
    top = (1 << bits) - 1
    shown: NDArray[np.uint8] = np.rint(rgb_HWC.astype(np.float32) * (255 / top)).astype(np.uint8)
    return shown
