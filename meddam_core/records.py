"""The rows of the system: Image, Region and Caption, and their Arrow schemas.

This file is the only definition of a row. A shard holds one Image a row with its regions nested; the caption job
carries the same row from read to write; the published table has one Caption a row.

Notes:
- `image_id` is shard ordinal << 24 | row, unique by construction; `region_id` is image_id << 4 | ordinal.
- Both are int64 in Arrow and strings in JSON, because JavaScript rounds integers above 2**53.
- A row never raises across a job boundary: it carries `status`, `reason` (a short code) and `detail`
  (a sentence without patient data).
- Boxes are (x0, y0, x1, y1) in pixels of the stored image, half-open: x1 and y1 are outside.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cache
from typing import Any, Literal, TypeVar

import pyarrow as pa

T = TypeVar("T")

SCHEMA_VERSION = 2
"""Of the rows below; what each version changed, and the way from one to the next: meddam_core.migrations."""
ROW_BITS = 24
"""Rows a shard can hold: 2**24."""
REGION_BITS = 4
MAX_REGIONS_PER_ROW = 1 << REGION_BITS
"""Regions a row can hold; an image with more continues in a further row."""

_Bytes = bytes  # a field named `bytes` hides the builtin

Box = tuple[int, int, int, int]
"""(x0, y0, x1, y1), pixels, half-open."""


def image_id(shard: int, row: int) -> int:
    """The id of the image at `row` of shard number `shard`."""
    if not 0 <= row < 1 << ROW_BITS:
        raise ValueError(f"row {row} does not fit in a shard: at most {1 << ROW_BITS} rows")
    if not 0 <= shard < 1 << (63 - ROW_BITS - REGION_BITS):
        raise ValueError(f"shard ordinal {shard} is out of range")
    return shard << ROW_BITS | row


def region_id(image: int, ordinal: int) -> int:
    """The id of region number `ordinal` of image `image`."""
    if not 0 <= ordinal < MAX_REGIONS_PER_ROW:
        raise ValueError(f"region ordinal {ordinal} does not fit: at most {MAX_REGIONS_PER_ROW} regions a row")
    return image << REGION_BITS | ordinal


def image_of(region: int) -> int:
    """The image id that a region id belongs to."""
    return region >> REGION_BITS


class Status(StrEnum):
    """What became of a row."""

    OK = "ok"
    TRUNCATED = "truncated"
    """The caption reached its token limit before it ended."""
    SKIPPED = "skipped"
    """Nothing to do, on purpose: no region, or not an image."""
    FAILED = "failed"


class Reason(StrEnum):
    """Why a row was skipped or failed. Codes are stable: summaries and `meddam retry` count by them."""

    NOT_AN_IMAGE = "not_an_image"
    """The file is of another kind: text, a report, a plan, a waveform."""
    NO_PIXELS = "no_pixels"
    CORRUPT = "corrupt"
    """The file is of a known kind, but broken or cut short."""
    ENCRYPTED = "encrypted"
    TOO_LARGE = "too_large"
    UNSUPPORTED_CODEC = "unsupported_codec"
    UNSUPPORTED_PIXELS = "unsupported_pixels"
    """Pixels that 8 or 16 bits can't hold without loss: float maps, 32-bit integers."""
    NOT_FOUND = "not_found"
    ACCESS_DENIED = "access_denied"
    BOX_OUTSIDE = "box_outside"
    BOX_EMPTY = "box_empty"
    MASK_SIZE = "mask_size"
    """The mask is not of the image's size."""
    MASK_EMPTY = "mask_empty"
    BAD_ANNOTATION = "bad_annotation"
    DUPLICATE_ID = "duplicate_id"
    NO_REGIONS = "no_regions"
    EXCLUDED = "excluded"
    """Left out on purpose: the dataset marks it so, or an option asks for it."""
    PROMPT_TOO_LONG = "prompt_too_long"
    OUT_OF_MEMORY = "out_of_memory"
    KILLED_PROCESS = "killed_process"
    """The row ended the process that worked on it, more than once."""
    ENGINE_ERROR = "engine_error"
    INTERNAL_ERROR = "internal_error"


class RowError(ValueError):
    """A row cannot be worked on. Becomes the row's `reason` and `detail`; the job goes on.

    `detail` must not hold header values, paths or identifiers.
    """

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(f"{reason.value}: {detail}")
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[type[RowError], tuple[Reason, str]]:
        return RowError, (self.reason, self.detail)


Egress = Literal["deny", "zero-retention", "open"]
"""Where pixels and captions may go: nowhere outside the cluster, to endpoints that keep nothing, anywhere."""
RegionSource = Literal["annotation", "consensus", "detected", "prompted"]
FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedImage:
    """An encoded picture, in the form Hugging Face `datasets` shows as an image."""

    bytes: _Bytes | None = None
    path: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Rescale:
    """Stored value -> physical value: `slope * stored + intercept` (DICOM PS3.3 C.11.1; HU for CT)."""

    slope: float = 1.0
    intercept: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """Physical value -> display value (DICOM PS3.3 C.11.2.1)."""

    center: float
    width: float
    function: Literal["LINEAR", "LINEAR_EXACT", "SIGMOID"] = "LINEAR"
    source: str = "header"
    """Where it comes from: header, recipe or percentile."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lut:
    """Stored value -> table entry, where a header has a table, not a rescale or window (DICOM PS3.3 C.11.1, C.11.2).

    Values below `first` take the first entry, values beyond the last one the last.
    """

    first: int
    """The stored value of the first entry."""
    bits: int
    """Entries are below 2 ** bits."""
    values: list[int]
    stage: Literal["physical", "display"]
    """What an entry is: a physical value, still to be windowed, or a display value."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rle:
    """A mask as compressed COCO run lengths: column-major, `size` is (height, width)."""

    size: tuple[int, int]
    counts: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Label:
    """One thing known about a region: present | absent | undecided, or a term of the attribute's vocabulary."""

    name: str
    value: str
    trust: float | None = None
    """Share of readers who agree, 0 to 1; 1 where true by construction; None where unknown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Region:
    """A place in an image that is to be described."""

    region_id: int
    box: Box
    mask: Rle | None = None
    source: RegionSource = "annotation"
    confidence: float | None = None
    labels: list[Label] = field(default_factory=list)
    frame_masks: list[Rle] | None = None
    """For a volume or clip: the region on each of the image's `frames`, in their order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """One 2-D picture, or the chosen slice of a volume with its neighbours, de-identified, with its regions."""

    image_id: int
    image_key: str
    """Salted hash of the source, stable over ingests with the same secret."""
    patient_key: str | None = None
    """HMAC of the patient id with the user's secret; None if unknown."""
    study_key: str | None = None
    dataset: str
    split: str = "all"
    recipe: str = "generic"
    """Names the rules of rendering, margin and sampling; see meddam_core.datasets.recipes."""
    modality: str = "OT"
    """DICOM modality code; XC for photographs."""
    image: EncodedImage
    """Lossless PNG: 8-bit RGB or grey, or 16-bit grey of stored values (signed ones shifted, `rescale` undoes it)."""
    preview: EncodedImage
    """Small JPEG of the default rendering, for people."""
    frames: list[EncodedImage] | None = None
    """Neighbouring slices or frames in order, the picture itself among them, of its size and with its facts."""
    frame: int | None = None
    """Which frame or slice of the source this is, counted from 0; None where the source is a single picture."""
    width: int
    height: int
    stored_bits: int = 8
    rescale: Rescale | None = None
    window: Window | None = None
    lut: Lut | None = None
    """A table of the header that takes the place of `rescale` (stage physical) or of both (stage display)."""
    photometric: str = "RGB"
    """RGB, MONOCHROME1 or MONOCHROME2, of the stored pixels."""
    padding: list[int] | None = None
    """Stored values (first, last) that mark pixels outside the image."""
    decoder: str = ""
    """Library, version and plugin that decoded the source."""
    pixel_spacing_mm: list[float] | None = None
    """(row, column) spacing; None if the header gives none that can be trusted."""
    orientation: str | None = None
    """Patient directions of columns and rows, as in DICOM PatientOrientation: "L\\\\P" for a standard axial slice."""
    burned_in_annotation: bool | None = None
    regions: list[Region] = field(default_factory=list)
    labels: list[Label] = field(default_factory=list)
    """Of the whole image, where the dataset labels images and not regions; regions found later take them over."""
    licence: str = "unknown"
    egress: Egress = "deny"


@dataclass(frozen=True, slots=True, kw_only=True)
class RegionCaption:
    """A caption as it is nested in the caption job's row. Its identity is (region_id, prompt_id, sample)."""

    region_id: int
    prompt_id: str
    sample: int = 0
    text: str | None = None
    num_tokens: int = 0
    mean_logprob: float | None = None
    """Mean natural log-probability of the generated tokens under the model, before temperature."""
    finish_reason: FinishReason | None = None
    status: Status = Status.OK
    reason: str | None = None
    detail: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptionedImage:
    """The caption job's row: an image row without its pixels, with its captions."""

    image_id: int
    image_key: str
    patient_key: str | None = None
    study_key: str | None = None
    dataset: str
    split: str
    recipe: str
    modality: str
    width: int
    height: int
    pixel_spacing_mm: list[float] | None = None
    licence: str
    egress: Egress
    regions: list[Region]
    captions: list[RegionCaption]
    status: Status = Status.OK
    reason: str | None = None
    detail: str | None = None
    attempt: int = 1
    model: str = ""
    engine: str = ""
    kernels: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Caption:
    """One row of the published table: a caption with what is known about its region and image."""

    region_id: int
    prompt_id: str
    sample: int
    text: str | None
    num_tokens: int
    mean_logprob: float | None
    finish_reason: FinishReason | None
    status: Status
    reason: str | None
    detail: str | None
    image_id: int
    image_key: str
    patient_key: str | None
    study_key: str | None
    dataset: str
    split: str
    recipe: str
    modality: str
    width: int
    height: int
    pixel_spacing_mm: list[float] | None
    box: Box
    mask: Rle | None
    source: RegionSource
    confidence: float | None
    labels: list[Label]
    licence: str
    egress: Egress
    attempt: int
    model: str
    engine: str
    kernels: str


# ---------------------------------------------------------------------------------------------------------------------
# Arrow

_LARGE_LISTS = {(Image, "frames")}
_FLOAT32 = {
    (Region, "confidence"),
    (Label, "trust"),
    (RegionCaption, "mean_logprob"),
    (Caption, "mean_logprob"),
    (Caption, "confidence"),
}
_INT32 = {"frame", "width", "height", "stored_bits", "sample", "num_tokens", "attempt"}


@cache
def arrow_schema(row: type) -> pa.Schema:
    """The Arrow schema of Image, CaptionedImage or Caption, with the schema version in its metadata.

    For Image the metadata also names the picture columns for Hugging Face `datasets`.
    """
    metadata = {b"meddam.schema": row.__name__.encode(), b"meddam.schema_version": str(SCHEMA_VERSION).encode()}
    return pa.schema(_fields(row), metadata=metadata)


def _fields(record: type) -> list[pa.Field]:
    hints = typing.get_type_hints(record)
    return [_field(record, f.name, hints[f.name]) for f in dataclasses.fields(record)]


def _field(record: type, name: str, hint: Any) -> pa.Field:
    optional = type(None) in typing.get_args(hint)
    if optional:
        (hint,) = [a for a in typing.get_args(hint) if a is not type(None)]
    if (record, name) in _LARGE_LISTS:
        return pa.field(name, pa.large_list(_arrow_type(typing.get_args(hint)[0])))
    if (record, name) in _FLOAT32:
        return pa.field(name, pa.float32())
    if hint is int and name in _INT32:
        return pa.field(name, pa.int32())
    return pa.field(name, _arrow_type(hint))


def _arrow_type(hint: Any) -> pa.DataType:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple:
        return pa.list_(pa.int32(), len(args))
    if origin is list:
        return pa.list_(_arrow_type(args[0]))
    if origin in (Literal, types.UnionType):
        return pa.string()
    if dataclasses.is_dataclass(hint):
        return pa.struct(_fields(typing.cast(type, hint)))
    if isinstance(hint, type) and issubclass(hint, StrEnum):
        return pa.string()
    return {str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_(), bytes: pa.large_binary()}[hint]


def to_row(record: Any) -> dict[str, Any]:
    """A record as the plain dict that `pyarrow.Table.from_pylist(..., schema=arrow_schema(type))` takes."""
    return dataclasses.asdict(record)


def from_row(record: type[T], row: Mapping[str, Any]) -> T:
    """The typed object of a row, as `pyarrow.Table.to_pylist` gives it. Columns it does not know raise ValueError."""
    value = _typed(record, row)
    assert isinstance(value, record)
    return value


def _typed(hint: Any, value: Any) -> Any:
    args = typing.get_args(hint)
    if value is None or hint is None:
        return None
    if type(None) in args:
        return _typed(next(a for a in args if a is not type(None)), value)
    if dataclasses.is_dataclass(hint):
        hints = _hints(typing.cast(type, hint))
        unknown = set(value) - set(hints)
        if unknown:
            raise ValueError(
                f"unknown column {sorted(unknown)} in a row of {typing.cast(type, hint).__name__}: "
                f"this file was written with another schema than version {SCHEMA_VERSION}"
            )
        filled = _filled(typing.cast(type, hint))
        given = ((k, v) for k, v in value.items() if v is not None or k not in filled)
        return typing.cast(type, hint)(**{k: _typed(hints[k], v) for k, v in given})
    origin = typing.get_origin(hint)
    if origin is tuple:
        return tuple(value)
    if origin is list:
        return [_typed(args[0], v) for v in value]
    if isinstance(hint, type) and issubclass(hint, StrEnum):
        return hint(value)
    return value


@cache
def _hints(record: type) -> dict[str, Any]:
    return typing.get_type_hints(record)


@cache
def _filled(record: type) -> frozenset[str]:
    """Fields whose null means their default: a column that a file of an older version lacks is read as nulls."""
    optional = {k for k, hint in _hints(record).items() if type(None) in typing.get_args(hint)}
    default = {f.name for f in dataclasses.fields(record) if f.default_factory is not dataclasses.MISSING}
    return frozenset(default - optional)
