"""One frame of DICOM pixel data: how its samples are laid out, and what a decoder gives back.

Arrays: H rows, W columns; the third axis, where there is one, holds the samples of a pixel.
"""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meddam_core.imaging.decoded import Stored
from meddam_core.records import Reason, RowError


@dataclass(frozen=True, slots=True, kw_only=True)
class FrameFormat:
    """Group 0028 of a DICOM header: how one frame's samples are laid out."""

    rows: int
    columns: int
    samples: int
    bits_allocated: int
    bits_stored: int
    high_bit: int
    signed: bool
    planar: bool
    photometric: str
    num_frames: int

    @property
    def num_samples(self) -> int:
        return self.rows * self.columns * self.samples

    def dtype(self, order: str = "<") -> np.dtype[Any]:
        """The type of one sample in native pixel data; bits_allocated 1 is packed and has none."""
        return np.dtype(f"{order}{'i' if self.signed else 'u'}{self.bits_allocated // 8}")


@dataclass(frozen=True, slots=True)
class Frame:
    """One decoded frame, before colour conversion and sign shift."""

    samples: NDArray[Any]
    """(H, W) or (H, W, 3), a signed or unsigned integer type."""
    photometric: str
    """What the samples are now: a decoder may already have turned YBR into RGB."""
    bits: int
    decoder: str


@cache
def version(distribution: str) -> str:
    """Name and version of an installed distribution, for the decoder string."""
    return f"{distribution} {importlib.metadata.version(distribution)}"


def container(bits: int) -> int:
    """Bytes of the smallest integer that decoders put `bits` bits into."""
    return 1 if bits <= 8 else 2 if bits <= 16 else 4


def expect(fmt: FrameFormat, *, rows: int, columns: int, samples: int) -> None:
    """Raises RowError(corrupt) if a codestream is of another size than the DICOM header says."""
    if (rows, columns, samples) != (fmt.rows, fmt.columns, fmt.samples):
        raise RowError(Reason.CORRUPT, "the compressed picture has another size than the header says")


def as_samples(
    raw: bytes | bytearray | NDArray[Any], dtype: str, fmt: FrameFormat, *, planar: bool = False
) -> NDArray[Any]:
    """Decoded bytes as (H, W) or (H, W, samples). Raises RowError(corrupt) if their number is wrong."""
    flat = np.frombuffer(raw, dtype=dtype)
    if flat.size != fmt.num_samples:
        raise RowError(Reason.CORRUPT, "the decoder gave another number of pixels than the header says")
    if fmt.samples == 1:
        return flat.reshape(fmt.rows, fmt.columns)
    if planar:
        return np.moveaxis(flat.reshape(fmt.samples, fmt.rows, fmt.columns), 0, 2)
    return flat.reshape(fmt.rows, fmt.columns, fmt.samples)


def with_sign(samples: NDArray[Any], bits: int, *, signed: bool) -> NDArray[Any]:
    """The low `bits` bits of every sample, read as signed or unsigned; the rest of the container is ignored."""
    size = samples.dtype.itemsize
    shift = 8 * size - bits
    view = samples.view(f"{'i' if signed else 'u'}{size}")
    if shift == 0:
        return view
    kept: NDArray[Any] = (view << shift) >> shift if signed else view & np.array((1 << bits) - 1, view.dtype)
    return kept


def to_unsigned(samples: NDArray[Any], bits: int) -> tuple[Stored, int, int]:
    """(stored, bits, shift): values moved into uint8 or uint16 without loss, stored = samples + shift.

    Signed values of n bits are shifted by 2 ** (n - 1), the same for every slice of a series. Wider ones are shifted by
    their minimum if their range fits in 16 bits. Raises RowError(unsupported_pixels) if it doesn't.
    """
    kind, size = samples.dtype.kind, samples.dtype.itemsize
    if size > 2:
        low, high = int(samples.min()), int(samples.max())
        if high - low >= 1 << 16:
            raise RowError(Reason.UNSUPPORTED_PIXELS, "pixel values span more than 16 bits")
        shift = -low if low < 0 or high >= 1 << 16 else 0
        return (samples.astype(np.int64) + shift).astype(np.uint16), 16, shift
    bits = min(bits, 8 * size)
    unsigned = np.dtype(f"u{size}")
    shift = 1 << (bits - 1) if kind == "i" else 0
    values = samples.astype(samples.dtype.newbyteorder("="), copy=False).view(unsigned)
    stored: Any = values + unsigned.type(shift) if shift else values
    if bits < 8 * size and int(stored.max()) >> bits:  # a header that lies about its bits
        bits = 8 * size
    return np.ascontiguousarray(stored), bits, shift
