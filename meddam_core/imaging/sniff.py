"""Which kind of file some bytes are, from the bytes alone: names and extensions lie.

A DICOM file is recognised by its `DICM` mark, or, where preamble and mark are missing, by a first data element that can
only be DICOM's: nothing is ever read by force.
"""

from __future__ import annotations

import struct
from typing import Literal

Kind = Literal[
    "dicom", "png", "jpeg", "jpeg2000", "tiff", "webp", "bmp", "gif", "nifti", "gzip", "encrypted", "unknown"
]  # fmt: skip

_MAGIC: tuple[tuple[bytes, Kind], ...] = (
    (b"\x89PNG\r\n\x1a\n", "png"),
    (b"\xff\xd8\xff", "jpeg"),
    (b"\x00\x00\x00\x0cjP  \r\n\x87\n", "jpeg2000"),
    (b"\xff\x4f\xff\x51", "jpeg2000"),
    (b"II*\x00", "tiff"),
    (b"MM\x00*", "tiff"),
    (b"II+\x00", "tiff"),
    (b"MM\x00+", "tiff"),
    (b"GIF87a", "gif"),
    (b"GIF89a", "gif"),
    (b"\x1f\x8b\x08", "gzip"),
    (b"Salted__", "encrypted"),
    (b"age-encryption.org/", "encrypted"),
    (b"-----BEGIN PGP MESSAGE", "encrypted"),
)
_CMS_ENVELOPED = bytes.fromhex("06092a864886f70d010703")
"""Object id of enveloped data (RFC 5652), which DICOM's secure media profiles wrap files in (PS3.15 D.1)."""
_VRS = frozenset(
    b"AE AS AT CS DA DS DT FL FD IS LO LT OB OD OF OL OV OW PN SH SL SQ SS ST SV TM UC UI UL UN UR US UT UV".split()
)
_FIRST_GROUPS = (0x0002, 0x0008)


def sniff(data: bytes) -> Kind:
    """The kind of `data`; "unknown" if it is none that this package reads."""
    head = bytes(data[:512])
    if head[128:132] == b"DICM":
        return "dicom"
    for magic, kind in _MAGIC:
        if head.startswith(magic):
            return kind
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "webp"
    if head[:1] == b"\x30" and _CMS_ENVELOPED in head[:40]:
        return "encrypted"
    if head[344:348] in (b"n+1\x00", b"ni1\x00") or head[4:8] == b"n+2\x00":
        return "nifti"
    if _starts_as_dicom(head):
        return "dicom"
    if head[:2] == b"BM" and len(head) > 18 and head[6:10] == bytes(4):
        return "bmp"
    return "unknown"


def _starts_as_dicom(head: bytes) -> bool:
    """Whether the first bytes can be a data element of group 2 or 8, in any of DICOM's encodings."""
    if len(head) < 12:
        return False
    for order in "<>":
        group, element = struct.unpack_from(f"{order}HH", head)
        if group not in _FIRST_GROUPS or element > 0x0100:
            continue
        if head[4:6] in _VRS:
            return True
        length = struct.unpack_from("<I", head, 4)[0]
        if order == "<" and length <= 256 and length % 2 == 0:
            return True
    return False
