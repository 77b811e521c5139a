"""Lookup tables of a DICOM header (Modality LUT, VOI LUT) as one table over stored values (PS3.3 C.11.1, C.11.2.1.1).

The stored pixels stay as they are; the table travels beside them (`records.Lut`). A VOI table is used where the header
has no window; behind a rescale it is composed with it, so that rendering is a single look-up. CT keeps its HU: its VOI
tables are ignored.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from meddam_core.imaging.dicom_header import Header
from meddam_core.records import Lut, Rescale

_QUANTITATIVE = ("CT", "PT")


class _Table(NamedTuple):
    first: int
    bits: int
    values: NDArray[np.int64]

    def __call__(self, inputs: NDArray[Any]) -> NDArray[np.int64]:
        entries: NDArray[np.int64] = self.values[
            np.clip(np.rint(inputs).astype(np.int64) - self.first, 0, len(self.values) - 1)
        ]
        return entries


def lut_of(
    header: Header, *, modality: str, rescale: Rescale | None, has_window: bool, bits: int, shift: int, little: bool
) -> Lut | None:
    """The header's table over stored values (file value + shift), or None if it has none that is needed.

    bits: of the stored values; rescale: of the file's own values, before the shift; little: byte order of the file.
    """
    modal = _first(header.items("ModalityLUTSequence"), shift > 0, little)
    groups = [header.items("VOILUTSequence")]
    groups += [item.get("VOILUTSequence", []) for item in header.places("FrameVOILUTSequence")[:-1]]
    voi = None
    if not has_window and modality not in _QUANTITATIVE:
        voi = next((t for g in groups if (t := _first(list(g), shift > 0 and modal is None, little))), None)
    if voi is None:
        if modal is None:
            return None
        return Lut(first=modal.first + shift, bits=modal.bits, values=modal.values.tolist(), stage="physical")
    inputs = np.arange(1 << bits) - shift
    physical: NDArray[Any] = inputs
    if modal is not None:
        physical = modal(inputs)
    elif rescale is not None:
        physical = rescale.slope * inputs + rescale.intercept
    return Lut(first=0, bits=voi.bits, values=voi(physical).tolist(), stage="display")


def _first(items: list[Dataset], signed: bool, little: bool) -> _Table | None:
    """The first item's table; None if there is none or it can't be read."""
    if not items:
        return None
    item = Header(items[0], 0)
    descriptor = [int(v) for v in item.floats("LUTDescriptor")]
    data = item.value("LUTData")
    if len(descriptor) != 3 or not 1 <= descriptor[2] <= 16:
        return None
    size = descriptor[0] & 0xFFFF or 1 << 16
    if isinstance(data, bytes):
        width = 2 if len(data) >= 2 * size else 1
        values = np.frombuffer(data[: len(data) // width * width], f"{'<' if little else '>'}u{width}").astype(np.int64)
    else:
        values = np.array(item.floats("LUTData"), np.int64)
    if len(values) == 0:
        return None
    first = descriptor[1]
    if signed and first >= 1 << 15:
        first -= 1 << 16
    return _Table(first, descriptor[2], values[:size] & 0xFFFF)
