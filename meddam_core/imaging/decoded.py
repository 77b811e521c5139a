"""What decoding one file yields: pixels and the few header facts that may stay, apart from who it shows.

Only typed fields of `Decoded` go further; the raw identifiers sit in `Identity`, whose repr shows nothing, and must be
hashed (`deidentify.keyed_hash`) or dropped by the caller.

Arrays: H rows, W columns, C the three colours R, G, B.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from meddam_core.records import Lut, Rescale, Window

Stored = NDArray[np.uint8] | NDArray[np.uint16]
"""HxW grey or HxWx3 RGB; signed sources are shifted into range, with the shift folded into `rescale`."""


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Identity:
    """Identifiers as the header has them. Never print, log or store them: hash or drop."""

    patient_id: str | None = None
    study_uid: str | None = None
    series_uid: str | None = None
    instance_uid: str | None = None
    instance_number: int | None = None
    frame_of_reference_uid: str | None = None
    position_mm: float | None = None
    """Image position along the slice normal: the order of slices in a series."""
    slice_normal: tuple[float, float, float] | None = None
    z_mm: float | None = None
    """The last coordinate of the image position, by which some annotations name a slice."""

    def __repr__(self) -> str:
        return "Identity(withheld)"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Decoded:
    """One picture, or one frame of a file, with the allow-listed facts about it."""

    stored: Stored = field(repr=False)
    """(H, W) or (H, W, 3), uint8 or uint16, C-contiguous."""
    stored_bits: int = 8
    """Bits of a stored value that carry information: values are below 2 ** stored_bits."""
    rescale: Rescale | None = None
    window: Window | None = None
    """The first window of the header; None if it has none."""
    lut: Lut | None = None
    """The header's Modality or VOI table, where it has one in place of a rescale or a window."""
    photometric: str = "RGB"
    """RGB, MONOCHROME1 or MONOCHROME2, of `stored`."""
    padding: tuple[int, int] | None = None
    """Stored values (first, last), inclusive, that mark pixels outside the image."""
    decoder: str = ""
    pixel_spacing_mm: tuple[float, float] | None = None
    """(row, column) spacing in the patient; None where the header gives none that can be trusted."""
    detector_spacing_mm: tuple[float, float] | None = None
    """(row, column) spacing in the plane of an X-ray detector: larger than in the patient by the magnification."""
    orientation: str | None = None
    """Patient directions of increasing columns and rows: "L\\\\P" for a standard axial slice."""
    modality: str = "OT"
    burned_in_annotation: bool | None = None
    num_frames: int = 1
    frame: int | None = None
    """Which frame or slice `stored` is, from 0; None where the source is a single picture."""
    context: tuple[Stored, ...] = field(default=(), repr=False)
    """Neighbouring slices or frames in order, the picture itself among them, of its shape and with its facts."""
    alpha_HW: NDArray[np.uint8] | None = field(default=None, repr=False)
    """(H, W) the alpha channel of a picture file that has one: no part of a row; clients send masks in it."""
    identity: Identity = field(default_factory=Identity, repr=False)

    @property
    def height(self) -> int:
        return int(self.stored.shape[0])

    @property
    def width(self) -> int:
        return int(self.stored.shape[1])
