"""What every dataset adapter gives: a stream of items, and for each item its pixels.

    class Folder(Source): ...
    for item in source.items():                   # on the driver: names, regions, labels; no pixels
        decoded, regions = source.load(item)      # on a worker: the pixels, and the regions where they come with them

Invariants:
- `items` streams: memory does not grow with the dataset, and the same source gives the same items in the same order;
- what is wrong with the source as a whole is a ValueError before the first item, with what to do;
- what is wrong with one item or region travels with it as a `Problem`, and becomes a row with a reason;
- `key`, `uri`, `patient_id` and `study_id` never leave ingest: rows carry keyed hashes of them.
"""

from __future__ import annotations

import errno
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from meddam_core import storage
from meddam_core.imaging.decode import decode
from meddam_core.imaging.decoded import Decoded
from meddam_core.imaging.limits import Limits
from meddam_core.records import Egress, Label, Reason, RegionSource, RowError


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Something wrong with an item or one of its regions, without patient data."""

    reason: Reason
    detail: str
    region: int | None = None
    """Ordinal of the region in the source; None where it concerns the whole item."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceRegion:
    """A region as the source gives it: a box, a mask, or both."""

    ordinal: int
    """Which of the item's regions this is in the source, from 0."""
    box: list[float] | None = None
    """x0, y0, x1, y1 in pixels of the picture; None takes the tight box of the mask."""
    segmentation: Any = None
    """Run lengths or polygons, as in COCO (meddam_core.regions.masks.mask_of_segmentation)."""
    frame_segmentations: list[Any] | None = None
    """The same on each of the picture's context frames, in their order; run lengths may be empty there."""
    mask_uri: str | None = None
    """A picture file of the mask, of the image's size."""
    labels: list[Label] = field(default_factory=list)
    source: RegionSource = "annotation"
    confidence: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceItem:
    """One picture of the source with its regions. What is None here is taken from the file's header, if at all."""

    key: str
    """Names the item in its source; stable when the dataset moves. Hashed before it is stored."""
    uri: str | None = None
    data: bytes | None = None
    """The file's bytes, where the source holds them itself."""
    frame: int | None = None
    regions: list[SourceRegion] = field(default_factory=list)
    labels: list[Label] = field(default_factory=list)
    """Of the whole picture, where the source labels pictures and not regions."""
    split: str | None = None
    patient_id: str | None = None
    study_id: str | None = None
    patient_key: str | None = None
    """Keyed hash of the patient id, where that was taken away already; so `study_key`."""
    study_key: str | None = None
    modality: str | None = None
    pixel_spacing_mm: list[float] | None = None
    licence: str | None = None
    egress: Egress | None = None
    recipe: str | None = None
    problems: list[Problem] = field(default_factory=list)


class Source(Protocol):
    """A dataset adapter. Its attributes are what it was configured with: it is pickled to the workers."""

    @property
    def dataset(self) -> str:
        """The name in every row's `dataset`."""
        ...

    @property
    def licence(self) -> str:
        """The licence of rows whose item names none."""
        ...

    @property
    def egress(self) -> Egress:
        """Where pixels and captions may go, unless the item says otherwise."""
        ...

    @abstractmethod
    def fingerprint(self) -> str:
        """Changes whenever `items` would give something else. Raises ValueError where the source is not there."""
        ...

    @abstractmethod
    def items(self) -> Iterator[SourceItem]:
        """The items, streamed. Raises ValueError for a source that cannot be worked on."""
        ...

    def load(self, item: SourceItem, limits: Limits) -> tuple[Decoded, list[SourceRegion]]:
        """The item's pixels and its regions. Raises RowError."""
        return load_file(item, limits), item.regions


def load_file(item: SourceItem, limits: Limits) -> Decoded:
    """Reads and decodes an item's file. Raises RowError: not_found, access_denied, or as `imaging.decode` does."""
    data = item.data
    if data is None:
        if item.uri is None:
            raise RowError(Reason.NOT_FOUND, "the item names no file")
        data = read_limited(item.uri, limits)
    return decode(data, name=item.uri or "", frame=item.frame, limits=limits)


def read_limited(uri: str, limits: Limits) -> bytes:
    """A file's bytes, its size checked first. Raises RowError: not_found, access_denied, too_large.

    OSError where the file may well be there, but the store or the machine is in trouble: worth another try, no reject.
    """
    try:
        fs, path = storage.open_uri(uri)
        with fs.open_input_file(path) as stream:
            limits.check_file(stream.size())
            return bytes(stream.read())
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise RowError(Reason.NOT_FOUND, "the file is not there") from None
    except OSError as error:
        text = str(error)
        if isinstance(error, PermissionError) or any(code in text for code in storage.REFUSALS):
            raise RowError(Reason.ACCESS_DENIED, "reading the file was refused") from None
        if error.errno in _NO_SUCH_NAME or any(code in text for code in _NOT_THERE):
            raise RowError(Reason.NOT_FOUND, "the file is not there") from None
        raise


_NOT_THERE = ("NoSuchBucket", "NO_SUCH", "NOT_FOUND", "is a directory", "Is a directory")
_NO_SUCH_NAME = (errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL, errno.ENXIO)
