"""Any file a lab has -> one decoded picture, or one clear reason why not.

    decoded = decode(Path("scan.dcm").read_bytes())          # a single picture, or frame 0
    decoded = decode(volume_bytes, frame=40)                 # slice 40 of a NIfTI volume, frame 40 of a clip
    decoded = decode(film_bytes, box=(600, 700, 1500, 1800)) # only a part, without decoding all of it where possible

Invariants:
- the kind of file is taken from its content, never from its name;
- sizes are checked before anything is decoded;
- the outcome is a `Decoded` or a `RowError`, for any bytes whatsoever;
- no header value, name or identifier is in the error, in a log line or in a warning.
"""

from __future__ import annotations

import dataclasses

from meddam_core.imaging.decoded import Decoded, Identity, Stored
from meddam_core.imaging.dicom import decode_dicom
from meddam_core.imaging.dicom_file import open_dicom
from meddam_core.imaging.dicom_header import Header, identity
from meddam_core.imaging.limits import Limits, check_box, inflate
from meddam_core.imaging.quiet import quiet
from meddam_core.imaging.raster import FORMATS, decode_raster
from meddam_core.imaging.sniff import Kind, sniff
from meddam_core.imaging.volume import Volume, decode_nifti, open_nifti
from meddam_core.records import Box, Reason, RowError

_IMAGE_SUFFIXES = (
    ".bmp", ".dcm", ".dicom", ".gif", ".ima", ".jp2", ".jpeg", ".jpg", ".nii", ".nii.gz", ".png", ".tif", ".tiff",
    ".webp",
)  # fmt: skip
_SNIFF_BYTES = 4096


def decode(
    data: bytes, *, name: str = "", frame: int | None = None, box: Box | None = None, limits: Limits | None = None
) -> Decoded:
    """One picture of the file whose content is `data`, or only the part of it within `box`.

    name: the file's name, used only to word the reason for content of no known kind; it is never repeated.
    frame: which frame, page or slice, from 0; a volume (NIfTI) needs one, elsewhere it defaults to the first.
    box: (x0, y0, x1, y1), half-open, in pixels of the whole picture. A part is read from its own rows of uncompressed
    DICOM, and from its own code blocks of JPEG 2000; its pixels are those of the whole. A default window is the part's
    own: name one, or "header", where it matters.
    Raises RowError, and nothing else, for whatever is wrong with the data.
    """
    limits = limits or Limits()
    limits.check_file(len(data))
    if not data:
        raise RowError(Reason.CORRUPT, "the file is empty")
    kind = sniff(data)
    with quiet():
        try:
            return _decode(data, kind, name, frame, box, limits)
        except RowError as error:
            raise RowError(error.reason, error.detail) from None
        except MemoryError:
            raise RowError(Reason.OUT_OF_MEMORY, "there is not enough memory to decode the file") from None
        except Exception as error:  # noqa: BLE001 - the door to other people's decoders: whatever they raise is this row's
            raise RowError(
                Reason.CORRUPT, f"the file is broken: reading it as {kind} ended with {type(error).__name__}"
            ) from None


def read_identity(data: bytes, limits: Limits | None = None) -> Identity:
    """Who and which slice a DICOM file shows, from its header: the file's beginning is enough.

    Raises RowError, and nothing else: not_an_image for files of another kind, corrupt for broken ones.
    """
    return identity(read_header(data, limits))


def read_header(data: bytes, limits: Limits | None = None) -> Header:
    """A DICOM file's header, for adapters that read references and geometry in it; the file's beginning is enough.

    It holds everything, also the patient: nothing of it may go into a row but what is typed and known to be safe.
    Raises RowError as `read_identity`.
    """
    if data[128:132] != b"DICM":
        raise RowError(Reason.NOT_AN_IMAGE, "not a DICOM file")
    with quiet():
        try:
            return Header(open_dicom(data, limits or Limits()).dataset, 0)
        except RowError as error:
            raise RowError(error.reason, error.detail) from None
        except Exception as error:  # noqa: BLE001 - as in `decode`
            raise RowError(Reason.CORRUPT, f"the header is broken ({type(error).__name__})") from None


def read_volume(data: bytes, limits: Limits | None = None) -> Volume:
    """The NIfTI volume in .nii or .nii.gz bytes, in canonical orientation; for label maps. Raises RowError."""
    if sniff(data) not in ("nifti", "gzip"):
        raise RowError(Reason.NOT_AN_IMAGE, "not a NIfTI file")
    with quiet():
        try:
            return open_nifti(data, limits or Limits())
        except RowError as error:
            raise RowError(error.reason, error.detail) from None
        except Exception as error:  # noqa: BLE001 - as in `decode`
            raise RowError(Reason.CORRUPT, f"the volume is broken ({type(error).__name__})") from None


def _decode(data: bytes, kind: Kind, name: str, frame: int | None, box: Box | None, limits: Limits) -> Decoded:
    if kind == "dicom":
        return decode_dicom(data, frame=frame, box=box, limits=limits)
    if kind in FORMATS:
        return _part(decode_raster(data, kind=kind, frame=frame, limits=limits), box)
    if kind == "nifti":
        return _part(decode_nifti(data, frame=frame, limits=limits), box)
    if kind == "gzip":
        inner = sniff(inflate(data, wbits=31, limits=limits, enough=_SNIFF_BYTES))
        if inner in ("unknown", "gzip"):
            raise RowError(Reason.NOT_AN_IMAGE, "a compressed file that holds no image")
        return _decode(inflate(data, wbits=31, limits=limits), inner, name, frame, box, limits)
    if kind == "encrypted":
        raise RowError(Reason.ENCRYPTED, "the file is encrypted")
    if name.lower().endswith(_IMAGE_SUFFIXES):
        raise RowError(Reason.CORRUPT, "named like an image, but its content is of no known kind")
    raise RowError(Reason.NOT_AN_IMAGE, "the content is of no known kind of image")


def _part(whole: Decoded, box: Box | None) -> Decoded:
    if box is None:
        return whole
    check_box(box, rows=whole.height, columns=whole.width)
    part: Stored = whole.stored[box[1] : box[3], box[0] : box[2]].copy()
    return dataclasses.replace(whole, stored=part)
