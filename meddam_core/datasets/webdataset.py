"""WebDataset tars: samples of files with one name, a picture among them and its regions as JSON.

    meddam ingest webdataset s3://bucket/tars --out s3://bucket/set

    000017.jpg  000017.json  000017.mask.png      # neighbours in the tar: one sample

`NAME.json` may hold what a line of a manifest may (box, mask, label, labels, regions, split, patient_id, ...; see
meddam_core.datasets.manifest), other keys are ignored; `NAME.cls` or `NAME.txt` of one line is a label; a further
picture whose name says mask, seg or label is a region's mask. A sample without any of these has no regions.

A tar is read once, as a stream of headers: of pictures and masks only their place in it is kept, and workers read them
from there. Of a compressed tar (.tar.gz) the files themselves are kept.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from meddam_core import storage
from meddam_core.datasets.base import Problem, Source, SourceItem, SourceRegion
from meddam_core.datasets.manifest import COLUMNS, item_of
from meddam_core.datasets.tables import files_below, names_digest, relative
from meddam_core.imaging.decode import decode
from meddam_core.imaging.decoded import Decoded
from meddam_core.imaging.limits import Limits
from meddam_core.records import Egress, Reason, RowError
from meddam_core.regions.masks import mask_of_png, rle_of

VERSION = 1
_SUFFIXES = (".tar", ".tar.gz", ".tgz")
_PICTURES = ("bmp", "dcm", "dicom", "gif", "jp2", "jpeg", "jpg", "png", "tif", "tiff", "webp")
_MASK_WORDS = ("mask", "seg", "label")
_WHOLE_FILES = ("json", "cls", "txt")
_MAX_TEXT_BYTES = 4 << 20


@dataclass(slots=True)
class _Sample:
    """Files of one name, so far."""

    name: str
    texts: dict[str, bytes] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    """Place in the tar ("start+length") by suffix."""
    data: dict[str, bytes] = field(default_factory=dict)
    """Content by suffix, of compressed tars."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WebDataset(Source):
    """Tars of samples."""

    path: str
    """Folder of the tars, or one of them, on S3 or disk."""
    split: str | None = None
    """Of all samples; by default what their JSON says."""
    dataset: str = "webdataset"
    licence: str = "unknown"
    egress: Egress = "deny"

    def fingerprint(self) -> str:
        """Of the settings and the tars' names, sizes and tags."""
        return hashlib.sha256(f"{VERSION} {self!r} {names_digest(self._tars())}".encode()).hexdigest()

    def items(self) -> Iterator[SourceItem]:
        """One item a sample, tar by tar. Raises ValueError where there is no tar."""
        tars = self._tars()
        if not tars:
            raise ValueError(f"{self.path} holds no .tar file; check its name")
        root = self.path if not self.path.lower().endswith(_SUFFIXES) else self.path.rpartition("/")[0]
        for tar in tars:
            name = relative(tar.uri, root)
            try:
                for sample in _samples(tar.uri):
                    yield self._item(f"{name}/{sample.name}", tar.uri, sample)
            except (tarfile.TarError, EOFError, OSError) as error:
                detail = f"the tar cannot be read to its end ({type(error).__name__})"
                yield SourceItem(key=name, problems=[Problem(reason=Reason.CORRUPT, detail=detail)])

    def load(self, item: SourceItem, limits: Limits) -> tuple[Decoded, list[SourceRegion]]:
        """The picture and regions, from their places in the tar. Raises RowError."""
        assert item.uri is not None
        data = item.data if item.data is not None else _content(item.uri, limits)
        decoded = decode(data, frame=item.frame, limits=limits)
        size, regions = (decoded.width, decoded.height), []
        for region in item.regions:
            if region.mask_uri is not None:
                mask_HW = mask_of_png(_content(region.mask_uri, limits), size)
                region = replace(region, mask_uri=None, segmentation=asdict(rle_of(mask_HW)))
            regions.append(region)
        return decoded, regions

    def _tars(self) -> list[storage.ObjectInfo]:
        folder = self.path.rpartition("/")[0] if self.path.lower().endswith(_SUFFIXES) else self.path
        found = files_below(folder or ".", _SUFFIXES)
        return found if folder == self.path else [o for o in found if o.uri.endswith(self.path.rpartition("/")[2])]

    def _item(self, key: str, tar: str, sample: _Sample) -> SourceItem:
        pictures = sorted(s for s in {**sample.files, **sample.data} if s.rpartition(".")[2] in _PICTURES)
        masks = [s for s in pictures if any(word in s for word in _MASK_WORDS)]
        images = [s for s in pictures if s not in masks]
        if len(images) != 1:
            detail = "the sample has no picture" if not images else "the sample has several pictures"
            return SourceItem(key=key, problems=[Problem(reason=Reason.NOT_AN_IMAGE, detail=detail)])
        line = _facts(sample)
        if line is None:
            detail = "the sample's JSON is no object"
            return SourceItem(key=key, problems=[Problem(reason=Reason.BAD_ANNOTATION, detail=detail)])
        item = item_of([{**line, "image": key}], "", None)
        if masks and sample.data:
            detail = "masks in a compressed tar are not supported: decompress it"
            return SourceItem(key=key, problems=[Problem(reason=Reason.BAD_ANNOTATION, detail=detail)])
        labels = [label for region in item.regions for label in region.labels] or item.labels
        further = [
            SourceRegion(ordinal=len(item.regions) + i, mask_uri=f"{tar}#{sample.files[s]}", labels=labels)
            for i, s in enumerate(masks)
        ]
        return replace(
            item, key=key, regions=[*item.regions, *further], data=sample.data.get(images[0]),
            uri=f"{tar}#{sample.files[images[0]]}" if images[0] in sample.files else tar,
            split=self.split or item.split,
        )  # fmt: skip


def _facts(sample: _Sample) -> dict[str, Any] | None:
    """What the sample's texts say, as a line of a manifest."""
    line: dict[str, Any] = {}
    if "json" in sample.texts:
        try:
            given = json.loads(sample.texts["json"])
        except ValueError:
            return None
        if not isinstance(given, dict):
            return None
        line = {k: v for k, v in given.items() if k in COLUMNS and k != "id" and v is not None}
    text = sample.texts.get("cls", sample.texts.get("txt", b"")).decode("utf-8", "replace").strip()
    if text and "\n" not in text and "label" not in line:
        line["label"] = text
    return line


def _samples(tar: str) -> Iterator[_Sample]:
    """The samples of a tar: neighbours with one name up to the first dot."""
    compressed = not tar.lower().endswith(".tar")
    fs, path = storage.open_uri(tar)
    opened = fs.open_input_stream(path, compression="gzip") if compressed else fs.open_input_file(path)
    with opened as stream, tarfile.open(fileobj=stream, mode="r|" if compressed else "r:") as archive:
        sample: _Sample | None = None
        for member in archive:
            folder, _, file = member.name.rpartition("/")
            base, _, suffix = file.partition(".")
            if not member.isfile() or not base or not suffix:
                continue
            name = f"{folder}/{base}" if folder else base
            if sample is None or sample.name != name:
                if sample is not None:
                    yield sample
                sample = _Sample(name)
            _add(sample, suffix.lower(), member, archive, compressed)
            archive.members = []  # type: ignore[attr-defined]  # else it would remember every file
        if sample is not None:
            yield sample


def _add(sample: _Sample, suffix: str, member: tarfile.TarInfo, archive: tarfile.TarFile, compressed: bool) -> None:
    if suffix in _WHOLE_FILES and member.size <= _MAX_TEXT_BYTES:
        content = archive.extractfile(member)
        sample.texts[suffix] = content.read() if content else b""
    elif compressed:
        Limits().check_file(member.size)
        content = archive.extractfile(member)
        sample.data[suffix] = content.read() if content else b""
    else:
        sample.files[suffix] = f"{member.offset_data}+{member.size}"


def _content(place: str, limits: Limits) -> bytes:
    """The bytes at `TAR#start+length`. Raises RowError: not_found, too_large, corrupt."""
    uri, _, at = place.rpartition("#")
    start, _, length = at.partition("+")
    limits.check_file(int(length))
    try:
        fs, path = storage.open_uri(uri)
        with fs.open_input_file(path) as stream:
            stream.seek(int(start))
            data = bytes(stream.read(int(length)))
    except FileNotFoundError:
        raise RowError(Reason.NOT_FOUND, "the tar is not there") from None
    if len(data) < int(length):
        raise RowError(Reason.CORRUPT, "the tar is cut short")
    return data
