"""Windows: which range of physical values is shown, and how (DICOM PS3.3 C.11.2.1).

`window_curve` is the standard's three functions; `PRESETS` the usual CT windows; `default_window` the rule for pictures
for which no recipe names one, written down in its docstring and recorded in `Window.source`.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from meddam_core.records import Lut, Rescale, Window

PRESETS: dict[str, Window] = {
    # lung: facts of LIDC-IDRI and Radiopaedia "Windowing (CT)"; the others from the same article
    "lung": Window(center=-600, width=1500, source="preset:lung"),
    "soft_tissue": Window(center=40, width=400, source="preset:soft_tissue"),
    "bone": Window(center=400, width=1800, source="preset:bone"),
    "mediastinum": Window(center=50, width=350, source="preset:mediastinum"),
    "abdomen": Window(center=50, width=400, source="preset:abdomen"),
    "liver": Window(center=30, width=150, source="preset:liver"),
    "brain": Window(center=40, width=80, source="preset:brain"),
    "subdural": Window(center=75, width=215, source="preset:subdural"),
    "temporal_bone": Window(center=600, width=2800, source="preset:temporal_bone"),
}
"""CT windows in HU, by name."""

THREE_WINDOW = "three_window"
THREE_WINDOWS = (PRESETS["lung"], PRESETS["soft_tissue"], PRESETS["bone"])
"""Shown as red, green and blue: calcification and ground glass can't both be seen in one window."""

_TAIL = 0.005
_MIN_CONTRAST = 1 / 6
"""A header's window must spread the picture over at least this share of the grey scale, or it is taken for nonsense."""
_STRIDE_PIXELS = 1 << 18
"""Statistics look at about this many pixels, on a regular grid."""


class Facts(Protocol):
    """What rendering must know about stored pixels; `records.Image` and `Decoded` both have it."""

    @property
    def stored_bits(self) -> int: ...
    @property
    def rescale(self) -> Rescale | None: ...
    @property
    def window(self) -> Window | None: ...
    @property
    def lut(self) -> Lut | None: ...
    @property
    def photometric(self) -> str: ...
    @property
    def padding(self) -> Any: ...
    @property
    def modality(self) -> str: ...


class _Range(NamedTuple):
    low: float
    high: float


def window_curve(physical: NDArray[Any], window: Window) -> NDArray[np.float64]:
    """Physical values -> display values in [0, 1], float64, same shape (PS3.3 C.11.2.1.2.1, C.11.2.1.3).

    Raises ValueError for a width the standard forbids: below 1 for LINEAR, not above 0 for the others.
    """
    x = np.asarray(physical, np.float64)
    center, width = window.center, window.width
    if width <= 0 or (window.function == "LINEAR" and width < 1):
        raise ValueError(f"window width {width} is too small for {window.function}: give at least 1")
    if window.function == "SIGMOID":
        return np.asarray(1 / (1 + np.exp(np.clip(-4 * (x - center) / width, -700, 700))))
    if window.function == "LINEAR_EXACT":
        return np.clip((x - center) / width + 0.5, 0, 1)
    if width == 1:
        return (x > center - 0.5).astype(np.float64)
    return np.clip((x - (center - 0.5)) / (width - 1) + 0.5, 0, 1)


def physical_values(facts: Facts, stored: NDArray[Any]) -> NDArray[np.float64]:
    """Stored values -> physical ones (HU for CT), float64, same shape: by the header's table or rescale, else as is."""
    lut = facts.lut
    if lut is not None and lut.stage == "physical":
        table = np.asarray(lut.values, np.float64)
        return table[np.clip(stored.astype(np.int64) - lut.first, 0, len(table) - 1)]
    values = stored.astype(np.float64)
    return values if facts.rescale is None else facts.rescale.slope * values + facts.rescale.intercept


def preset(name: str) -> Window:
    """The CT window of that name. Raises ValueError naming those there are."""
    if name not in PRESETS:
        raise ValueError(f"no window preset {name!r}; there are {', '.join(sorted(PRESETS))} and {THREE_WINDOW}")
    return PRESETS[name]


def default_window(stored_HW: NDArray[Any], facts: Facts) -> Window | None:
    """The window of a grey picture for which none is named; None where none is needed.

    - colour, or a VOI table in the header: none;
    - a window that a recipe or an earlier decision put there (`source` is not "header"): that one;
    - the header's window, if it spreads the picture over at least a sixth of the grey scale (a film with window
      centre 15000 and pixels up to 4095 would be black);
    - CT with a rescale: soft tissue;
    - up to 8 bits: the full range, as stored;
    - all else: from the 0.5th to the 99.5th percentile of the pixels that are not padding.
    """
    if stored_HW.ndim == 3 or (facts.lut is not None and facts.lut.stage == "display"):
        return None
    given = facts.window
    if given is not None and given.source != "header":
        return given
    shown = _shown_range(stored_HW, facts)
    if given is not None and _contrast(shown, given) >= _MIN_CONTRAST:
        return given
    if facts.modality == "CT" and facts.rescale is not None:
        return PRESETS["soft_tissue"]
    if facts.stored_bits <= 8 and facts.lut is None:
        ends = physical_values(facts, np.array([0, (1 << facts.stored_bits) - 1]))
        return _exact(_Range(float(ends.min()), float(ends.max())), "full range")
    return _exact(shown, "percentile")


def _exact(ends: _Range, source: str) -> Window:
    width = max(ends.high - ends.low, 1e-6)
    return Window(center=(ends.low + ends.high) / 2, width=width, function="LINEAR_EXACT", source=source)


def _contrast(shown: _Range, window: Window) -> float:
    low, high = window_curve(np.array([shown.low, shown.high]), window)
    return float(abs(high - low))


def _shown_range(stored_HW: NDArray[Any], facts: Facts) -> _Range:
    """Physical values between which nearly all pixels lie, padding left out; (0, 1) if all is padding."""
    step = max(1, int((stored_HW.size / _STRIDE_PIXELS) ** 0.5))
    counts = np.bincount(stored_HW[::step, ::step].ravel())
    if facts.padding:
        counts[facts.padding[0] : facts.padding[1] + 1] = 0
    total = np.cumsum(counts)
    if len(total) == 0 or total[-1] == 0:
        return _Range(0, 1)
    # counted from either end alike, so that an inverted film gets the mirrored window
    skip = int(_TAIL * int(total[-1]))
    first = int(np.searchsorted(total, skip, side="right"))
    last = int(np.searchsorted(total, int(total[-1]) - skip, side="left"))
    ends = physical_values(facts, np.array([first, last]))
    return _Range(float(ends.min()), float(ends.max()))
