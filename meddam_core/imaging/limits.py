"""How large an input may be, checked before anything is decoded or inflated.

A few hundred bytes can claim a picture of many gigabytes (decompression bombs). Every reader in this package takes the
sizes from the header first, asks `Limits`, and only then hands the bytes to a codec. All refusals are
`RowError(Reason.TOO_LARGE)`.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

from meddam_core.records import Box, Reason, RowError

_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Upper bounds on one source file. The defaults admit every modality's usual files; slides go through OpenSlide."""

    max_file_bytes: int = 1 << 30
    """Bytes of the file as it is stored."""
    max_inflated_bytes: int = 2 << 30
    """Bytes of a compressed container (gzip, deflated DICOM) once inflated."""
    max_pixels: int = 100_000_000
    """Rows x columns of one frame."""
    max_side_px: int = 65_535
    max_frames: int = 100_000

    def check_file(self, num_bytes: int) -> None:
        """Raises RowError(too_large) if the stored file is larger than allowed."""
        if num_bytes > self.max_file_bytes:
            raise RowError(
                Reason.TOO_LARGE, f"the file has {num_bytes:,} bytes; at most {self.max_file_bytes:,} are allowed"
            )

    def check_picture(self, *, rows: int, columns: int, num_frames: int = 1) -> None:
        """Raises RowError(corrupt) on an empty picture and RowError(too_large) beyond the limits."""
        if rows < 1 or columns < 1 or num_frames < 1:
            raise RowError(Reason.CORRUPT, "the header gives a picture without rows, columns or frames")
        if max(rows, columns) > self.max_side_px or rows * columns > self.max_pixels:
            raise RowError(
                Reason.TOO_LARGE, f"the picture has {rows} x {columns} pixels; at most {self.max_pixels:,} are allowed"
            )
        if num_frames > self.max_frames:
            raise RowError(
                Reason.TOO_LARGE, f"the file has {num_frames:,} frames; at most {self.max_frames:,} are allowed"
            )

    def check_inflated(self, num_bytes: int) -> None:
        """Raises RowError(too_large) if the inflated data would be larger than allowed."""
        if num_bytes > self.max_inflated_bytes:
            raise RowError(
                Reason.TOO_LARGE, f"the data inflate to more than the {self.max_inflated_bytes:,} bytes allowed"
            )


def check_box(box: Box, *, rows: int, columns: int) -> None:
    """Raises RowError(box_empty, box_outside) unless `box` lies within the picture."""
    x0, y0, x1, y1 = box
    if x0 >= x1 or y0 >= y1:
        raise RowError(Reason.BOX_EMPTY, "the box has no pixels")
    if x0 < 0 or y0 < 0 or x1 > columns or y1 > rows:
        raise RowError(Reason.BOX_OUTSIDE, "the box reaches outside the picture")


def inflate(data: bytes | memoryview, *, wbits: int, limits: Limits, enough: int | None = None) -> bytes:
    """Inflate zlib data, stopping at the limit, or once `enough` bytes are there.

    `wbits` as in zlib: 31 for gzip, -15 for raw deflate. Raises RowError(corrupt) on broken or cut-off data,
    RowError(too_large) beyond `limits.max_inflated_bytes`.
    """
    inflater = zlib.decompressobj(wbits)
    parts: list[bytes] = []
    num_bytes = 0
    rest = bytes(data)
    try:
        while not inflater.eof and (enough is None or num_bytes < enough):
            part = inflater.decompress(rest, _CHUNK_BYTES)
            rest = inflater.unconsumed_tail
            if not part and not rest:
                break
            parts.append(part)
            num_bytes += len(part)
            limits.check_inflated(num_bytes)
    except zlib.error:
        raise RowError(Reason.CORRUPT, "the compressed data are broken") from None
    if not inflater.eof and enough is None:
        raise RowError(Reason.CORRUPT, "the compressed data are cut short")
    return b"".join(parts)
