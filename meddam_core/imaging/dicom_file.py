"""The parts of a DICOM file: transfer syntax, header dataset, and where the pixel data lie, without copying them.

Reads files with and without preamble and file meta group, in every encoding of PS3.5, deflated ones within limits. What
had to be assumed is said in `DicomFile.notes` and ends up in the row's decoder string.
"""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass, field

from pydicom.dataset import Dataset
from pydicom.filereader import read_dataset
from pydicom.uid import UID

from meddam_core.imaging.limits import Limits, inflate
from meddam_core.records import Reason, RowError

IMPLICIT_LITTLE = "1.2.840.10008.1.2"
EXPLICIT_LITTLE = "1.2.840.10008.1.2.1"
DEFLATED = "1.2.840.10008.1.2.1.99"
EXPLICIT_BIG = "1.2.840.10008.1.2.2"
GE_PRIVATE_BIG = "1.2.840.113619.5.2"
"""GE's implicit little endian header with big endian pixel data."""
NATIVE = (IMPLICIT_LITTLE, EXPLICIT_LITTLE, DEFLATED, EXPLICIT_BIG, GE_PRIVATE_BIG)

_MEDIA_CLASS, _TRANSFER_SYNTAX = 0x0002, 0x0010
"""Elements of group 2."""
_PIXEL_DATA = 0x7FE00010
_PIXEL_TAGS = (0x7FE00008, 0x7FE00009, _PIXEL_DATA)
_LONG_VRS = (b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV")
_UNDEFINED = 0xFFFFFFFF


@dataclass(frozen=True, slots=True, kw_only=True)
class DicomFile:
    """A file taken apart. `dataset` still holds everything, also the patient: it must not leave this package."""

    transfer_syntax: str
    media_class: str
    """Media Storage SOP Class UID of the file meta; "" if it has none."""
    little_endian: bool
    dataset: Dataset = field(repr=False)
    pixel_tag: int | None
    """Pixel Data, Float Pixel Data or Double Float Pixel Data; None if the file has none."""
    pixel_vr: str = "OW"
    pixels: memoryview = field(repr=False)
    undefined_length: bool = False
    notes: tuple[str, ...] = ()

    @property
    def native(self) -> bool:
        """Whether the pixel data are uncompressed."""
        return self.transfer_syntax in NATIVE


def open_dicom(data: bytes, limits: Limits) -> DicomFile:
    """Take a DICOM file apart. Raises RowError(corrupt, too_large)."""
    notes: list[str] = []
    start = 132 if data[128:132] == b"DICM" else 0
    if start == 0:
        notes.append("no preamble")
    syntax, media_class, at = _file_meta(data, start)
    if syntax == DEFLATED:
        data, at = inflate(memoryview(data)[at:], wbits=-15, limits=limits), 0
    if not syntax:
        syntax = _guess_syntax(data[at : at + 6])
        notes.append("transfer syntax assumed")
    implicit = syntax in (IMPLICIT_LITTLE, GE_PRIVATE_BIG)
    little = syntax != EXPLICIT_BIG
    stream = io.BytesIO(data)
    stream.seek(at)
    dataset = read_dataset(stream, implicit, little, stop_when=lambda tag, _vr, _length: tag in _PIXEL_TAGS)
    tag, vr, value_at, length = _pixel_element(data, stream.tell(), "<" if little else ">")
    end = len(data) if length == _UNDEFINED else min(len(data), value_at + length)
    return DicomFile(
        transfer_syntax=syntax,
        media_class=media_class,
        little_endian=little and syntax != GE_PRIVATE_BIG,
        dataset=dataset,
        pixel_tag=tag,
        pixel_vr=vr,
        pixels=memoryview(data)[value_at:end],
        undefined_length=length == _UNDEFINED,
        notes=tuple(notes),
    )


def _file_meta(data: bytes, start: int) -> tuple[str, str, int]:
    """Transfer syntax, media storage class ("" if missing), and where the dataset begins.

    Group 2 is always explicit little endian; its group length is not believed.
    """
    at, found = start, {_MEDIA_CLASS: "", _TRANSFER_SYNTAX: ""}
    while at + 8 <= len(data):
        group, element, vr = struct.unpack_from("<HH2s", data, at)
        if group != 0x0002:
            break
        if vr in _LONG_VRS:
            if at + 12 > len(data):
                break
            length, header = struct.unpack_from("<I", data, at + 8)[0], 12
        elif vr.isalpha():
            length, header = struct.unpack_from("<H", data, at + 6)[0], 8
        else:  # written with implicit VR, against the standard
            length, header = struct.unpack_from("<I", data, at + 4)[0], 8
        value = data[at + header : at + header + length]
        if element in found:
            found[element] = value.decode("ascii", "replace").strip("\x00 ")
        at += header + length
    if at > len(data):
        raise RowError(Reason.CORRUPT, "the DICOM file ends within its first group")
    syntax = found[_TRANSFER_SYNTAX]
    if syntax and not UID(syntax).is_valid:
        raise RowError(Reason.CORRUPT, "the transfer syntax is not a valid identifier")
    return syntax, found[_MEDIA_CLASS], at


def _guess_syntax(first: bytes) -> str:
    """The transfer syntax of a dataset without file meta, from its first element: a letter pair is an explicit VR."""
    if len(first) < 6 or not first[4:6].isalpha() or not first[4:6].isupper():
        return IMPLICIT_LITTLE
    group_little = struct.unpack_from("<H", first)[0]
    return EXPLICIT_LITTLE if group_little < 0x0100 else EXPLICIT_BIG


def _pixel_element(data: bytes, at: int, order: str) -> tuple[int | None, str, int, int]:
    """(tag, VR, offset of the value, its length) of the pixel element at `at`; tag is None if there is none."""
    if at + 8 > len(data):
        return None, "", len(data), 0
    group, element, vr = struct.unpack_from(f"{order}HH2s", data, at)
    tag = group << 16 | element
    if tag not in _PIXEL_TAGS:
        return None, "", len(data), 0
    if vr not in _LONG_VRS:
        return tag, "OW", at + 8, struct.unpack_from(f"{order}I", data, at + 4)[0]
    if at + 12 > len(data):
        return None, "", len(data), 0
    return tag, vr.decode("ascii"), at + 12, struct.unpack_from(f"{order}I", data, at + 8)[0]
