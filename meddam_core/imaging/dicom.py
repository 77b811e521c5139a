"""A DICOM file -> one decoded picture with the header facts that may stay.

    decode_dicom(Path("film.dcm").read_bytes())

Reading never uses force, files without pixels (reports, plans, waveforms) are skipped with a reason, and a frame is
decoded by one named decoder. Not applied: ICC profiles inside DICOM, overlays (dropped: they may hold names), display
shutters, supplemental palettes.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
from functools import cache

from pydicom.uid import UID

from meddam_core.imaging import dicom_header
from meddam_core.imaging.decoded import Decoded
from meddam_core.imaging.dicom_file import DicomFile, open_dicom
from meddam_core.imaging.dicom_header import Header
from meddam_core.imaging.dicom_luts import lut_of
from meddam_core.imaging.dicom_pixels import frame_format, stored_frame
from meddam_core.imaging.limits import Limits, check_box
from meddam_core.records import Box, Reason, Rescale, RowError

_PIXEL_DATA = 0x7FE00010


def decode_dicom(data: bytes, *, frame: int | None = None, box: Box | None = None, limits: Limits) -> Decoded:
    """One frame of a DICOM file, or only the part within `box`; frame 0 where none is named. Raises RowError."""
    file = open_dicom(data, limits)
    header = Header(file.dataset, frame or 0)
    _check_has_pixels(file, header)
    fmt = frame_format(header, limits)
    if not 0 <= header.frame < fmt.num_frames:
        raise RowError(Reason.BAD_ANNOTATION, f"frame {frame} of a file with {fmt.num_frames}")
    if box is not None:
        check_box(box, rows=fmt.rows, columns=fmt.columns)
    pixels = stored_frame(file, header, fmt, limits, box)
    modality = dicom_header.modality(header)
    grey = pixels.photometric != "RGB"
    rescale = dicom_header.rescale(header) if grey else None
    window = dicom_header.window(header) if grey else None
    lut = None
    if grey:
        lut = lut_of(
            header,
            modality=modality,
            rescale=rescale,
            has_window=window is not None,
            bits=pixels.bits,
            shift=pixels.shift,
            little=file.little_endian,
        )
    spacing, detector_spacing = dicom_header.spacings_mm(header, modality)
    return Decoded(
        stored=pixels.stored,
        stored_bits=pixels.bits,
        rescale=_shifted(rescale, pixels.shift),
        window=window,
        lut=lut,
        photometric=_photometric(header, pixels.photometric),
        padding=_padding(header, fmt.signed, fmt.bits_allocated, pixels.shift, pixels.bits) if grey else None,
        decoder="; ".join((f"pydicom {_pydicom()} + {pixels.decoder}", *file.notes)),
        pixel_spacing_mm=spacing,
        detector_spacing_mm=detector_spacing,
        orientation=dicom_header.orientation(header),
        modality=modality,
        burned_in_annotation=dicom_header.burned_in(header),
        num_frames=fmt.num_frames,
        frame=header.frame if fmt.num_frames > 1 else None,
        identity=dicom_header.identity(header),
    )


@cache
def _pydicom() -> str:
    return importlib.metadata.version("pydicom")


def _check_has_pixels(file: DicomFile, header: Header) -> None:
    if file.pixel_tag == _PIXEL_DATA:
        return
    if file.pixel_tag is not None:
        raise RowError(Reason.UNSUPPORTED_PIXELS, "floating-point pixels don't fit in 16 bits")
    if len(file.dataset) == 0:
        raise RowError(Reason.CORRUPT, "the DICOM file has no dataset")
    if header.items("EncryptedAttributesSequence"):
        raise RowError(Reason.ENCRYPTED, "the DICOM file has encrypted attributes and no pixel data")
    sop_class = UID(header.text("SOPClassUID") or file.media_class)
    known = sop_class.name if sop_class.is_valid and sop_class.name != str(sop_class) else ""
    if "Image Storage" in known or "Segmentation" in known or header.integer("Rows"):
        raise RowError(Reason.NO_PIXELS, "a DICOM image without pixel data: cut short, or only its header")
    if not sop_class and "Modality" not in file.dataset:
        raise RowError(Reason.NO_PIXELS, "a DICOM dataset without pixel data")
    raise RowError(Reason.NOT_AN_IMAGE, f"a DICOM object without pixels: {known or 'of an unknown class'}")


def _photometric(header: Header, photometric: str) -> str:
    """PresentationLUTShape INVERSE asks for what MONOCHROME1 asks for; together they ask for it once."""
    if photometric != "RGB" and header.text("PresentationLUTShape") == "INVERSE":
        return "MONOCHROME1"
    return photometric


def _shifted(rescale: Rescale | None, shift: int) -> Rescale | None:
    if shift == 0:
        return rescale
    given = rescale or Rescale()
    return dataclasses.replace(given, intercept=given.intercept - given.slope * shift)


def _padding(header: Header, signed: bool, allocated: int, shift: int, bits: int) -> tuple[int, int] | None:
    """Padding as stored values; None if no stored value can be padding."""
    found = dicom_header.padding(header, signed=signed, bits_allocated=allocated)
    if found is None:
        return None
    first, last = max(found[0] + shift, 0), min(found[1] + shift, (1 << bits) - 1)
    return (first, last) if first <= last else None
