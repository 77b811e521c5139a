"""DICOM's traps: signs, padding, spare bits, tables, functional groups, spacing, sides, files without their parts."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import pytest
from pydicom.uid import DeflatedExplicitVRLittleEndian, RLELossless

from meddam_core.imaging.decode import decode
from meddam_core.imaging.limits import Limits
from meddam_core.imaging.render import render
from meddam_core.imaging.windows import physical_values
from meddam_core.records import Reason, RowError, Window
from tests.meddam_core.imaging.dicom_files import bundled, ct_phantom, dataset, dicom, file_bytes, item

GREY = np.arange(48, dtype=np.uint16).reshape(6, 8)


def reason_of(data: bytes, **options: Any) -> Reason:
    with pytest.raises(RowError) as error:
        decode(data, **options)
    return error.value.reason


# ---------------------------------------------------------------------------------------------------------------------
# values


def test_signed_values_are_shifted_and_the_shift_is_in_rescale() -> None:
    hu = ct_phantom()
    decoded = decode(dicom((hu + 1024).astype(np.int16), RescaleSlope=1, RescaleIntercept=-1024))
    assert decoded.stored.dtype == np.uint16
    assert np.array_equal(physical_values(decoded, decoded.stored), hu)


def test_signed_without_rescale_keeps_its_values() -> None:
    values = np.array([[-5, 0], [7, 32767]], np.int16)
    decoded = decode(dicom(values, Modality="MR"))
    assert np.array_equal(physical_values(decoded, decoded.stored), values)
    eight = decode(dicom(values.astype(np.int8), Modality="MR"))
    assert eight.stored.dtype == np.uint8
    assert np.array_equal(physical_values(eight, eight.stored), values.astype(np.int8))


@pytest.mark.parametrize("vr", ["US", "SS"])
def test_padding_written_with_the_wrong_sign(vr: str) -> None:
    hu = ct_phantom()
    ds = dataset(hu, RescaleSlope=1, RescaleIntercept=0)
    ds.add_new("PixelPaddingValue", vr, 63536 if vr == "US" else -2000)
    decoded = decode(file_bytes(ds))
    assert decoded.padding is not None
    first, last = decoded.padding
    assert np.array_equal((decoded.stored >= first) & (decoded.stored <= last), hu == -2000)
    assert (render(decoded, Window(center=-2000, width=100))[hu == -2000] == 0).all()


def test_padding_range() -> None:
    values = np.array([[0, 1, 2, 3, 100, 200]], np.uint16)
    decoded = decode(dicom(values, Modality="MG", PixelPaddingValue=3, PixelPaddingRangeLimit=1))
    assert decoded.padding == (1, 3)


def test_padding_that_no_pixel_can_have() -> None:
    ds = dataset(GREY, BitsStored=12, HighBit=11)
    ds.add_new("PixelPaddingValue", "US", 63536)
    assert decode(file_bytes(ds)).padding is None


def test_bits_that_are_not_stored_are_ignored() -> None:
    clean = GREY
    dirty = clean | np.uint16(0xF000)
    assert np.array_equal(decode(dicom(dirty, BitsStored=12, HighBit=11)).stored, clean)
    shifted = (clean << 4) | np.uint16(0x000F)
    assert np.array_equal(decode(dicom(shifted, BitsStored=12, HighBit=15)).stored, clean)
    negative = np.array([[0x0FFF, 0x0001]], np.uint16)  # -1 and 1 in 12 bits, upper bits zero
    decoded = decode(dicom(negative, BitsStored=12, HighBit=11, PixelRepresentation=1))
    assert physical_values(decoded, decoded.stored).tolist() == [[-1, 1]]


def test_overlay_in_unused_bits_is_dropped() -> None:
    with_overlay = GREY | np.where(GREY > 20, np.uint16(1 << 12), np.uint16(0))
    assert np.array_equal(decode(dicom(with_overlay, BitsStored=12, HighBit=11)).stored, GREY)


def test_planar_configuration() -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8)
    planes = np.moveaxis(rgb, 2, 0)
    ds = dataset(rgb, PlanarConfiguration=1, Modality="US")
    ds.PixelData = planes.tobytes()
    assert np.array_equal(decode(file_bytes(ds)).stored, rgb)


def test_32_bits_that_fit_and_that_do_not() -> None:
    values = np.array([[1_000_000, 1_000_500]], np.uint32)
    decoded = decode(dicom(values, Modality="RTDOSE", RescaleSlope=2, RescaleIntercept=0))
    assert np.array_equal(physical_values(decoded, decoded.stored), values * 2)
    wide = np.array([[0, 1_000_000]], np.uint32)
    assert reason_of(dicom(wide, Modality="RTDOSE")) == Reason.UNSUPPORTED_PIXELS


def test_one_bit_frames_that_do_not_begin_on_a_byte() -> None:
    masks = np.random.default_rng(1).integers(0, 2, (3, 5, 5), np.uint8)
    ds = dataset(masks, Modality="SEG", BitsAllocated=1, BitsStored=1, HighBit=0)
    packed = np.packbits(masks.ravel(), bitorder="little").tobytes()
    ds.PixelData = packed + bytes(len(packed) % 2)
    for frame in range(3):
        assert np.array_equal(decode(file_bytes(ds), frame=frame).stored, masks[frame])


def test_photometric_of_presentation_lut_shape() -> None:
    def photometric(given: str, shape: str) -> str:
        return decode(dicom(GREY, PhotometricInterpretation=given, PresentationLUTShape=shape)).photometric

    assert photometric("MONOCHROME2", "IDENTITY") == "MONOCHROME2"
    assert photometric("MONOCHROME2", "INVERSE") == "MONOCHROME1"
    assert photometric("MONOCHROME1", "INVERSE") == "MONOCHROME1"


# ---------------------------------------------------------------------------------------------------------------------
# tables and windows


def lut(values: np.ndarray[Any, Any], bits: int) -> Any:
    """A table of the header that begins at value 0."""
    return item(LUTDescriptor=[len(values), 0, bits], LUTData=values.astype("<u2").tobytes())


def test_modality_lut() -> None:
    table = lut(np.arange(48) ** 2, bits=16)
    decoded = decode(dicom(GREY, Modality="MG", ModalityLUTSequence=table))
    assert np.array_equal(decoded.stored, GREY)
    assert np.array_equal(physical_values(decoded, decoded.stored), GREY.astype(float) ** 2)


def test_voi_lut_behind_a_rescale() -> None:
    table = lut(np.minimum(255, 5 * np.arange(100)), bits=8)
    data = dicom(GREY, Modality="DX", VOILUTSequence=table, RescaleSlope=2, RescaleIntercept=3)
    decoded = decode(data)
    assert decoded.lut is not None
    assert decoded.lut.stage == "display"
    expected = np.minimum(255, 5 * np.minimum(99, 2 * GREY.astype(int) + 3))
    assert np.array_equal(render(decoded)[..., 0], expected)
    assert decoded.rescale is not None


def test_a_window_goes_before_a_voi_lut() -> None:
    table = lut(np.zeros(48, int), bits=8)
    decoded = decode(dicom(GREY, Modality="DX", VOILUTSequence=table, WindowCenter=24, WindowWidth=48))
    assert decoded.lut is None
    assert render(decoded).max() > 200


def test_first_window_of_a_list_and_its_function() -> None:
    elements = {"WindowCenter": [40, 600], "WindowWidth": [80, 900], "VOILUTFunction": "SIGMOID"}
    assert decode(dicom(GREY, **elements)).window == Window(center=40, width=80, function="SIGMOID")


@pytest.mark.parametrize(("center", "width"), [(40, 0), (40, -5), ("40", None)])
def test_impossible_windows_are_no_windows(center: Any, width: Any) -> None:
    assert decode(dicom(GREY, WindowCenter=center, WindowWidth=width)).window is None


# ---------------------------------------------------------------------------------------------------------------------
# geometry


def test_functional_groups_of_a_frame() -> None:
    frames = np.stack([GREY, GREY + 1])
    shared = item(PixelMeasuresSequence=item(PixelSpacing=[0.5, 0.25]))
    per_frame = [
        item(
            FrameVOILUTSequence=item(WindowCenter=10 + i, WindowWidth=20),
            PixelValueTransformationSequence=item(RescaleSlope=2, RescaleIntercept=i, RescaleType="HU"),
            PlaneOrientationSequence=item(ImageOrientationPatient=[1, 0, 0, 0, 1, 0]),
            PlanePositionSequence=item(ImagePositionPatient=[0, 0, 7.5 * i]),
        )[0]
        for i in range(2)
    ]
    ds = dataset(frames, SharedFunctionalGroupsSequence=shared, PerFrameFunctionalGroupsSequence=per_frame)
    second = decode(file_bytes(ds), frame=1)
    assert second.window == Window(center=11, width=20)
    assert second.rescale is not None
    assert (second.rescale.slope, second.rescale.intercept) == (2, 1)
    assert second.pixel_spacing_mm == (0.5, 0.25)
    assert second.orientation == "L\\P"
    assert second.identity.position_mm == 7.5


@pytest.mark.parametrize(
    ("elements", "patient", "detector"),
    [
        ({"Modality": "CT", "PixelSpacing": [0.7, 0.6]}, (0.7, 0.6), None),
        ({"Modality": "CT", "PixelSpacing": [0, 0]}, None, None),
        ({"Modality": "DX", "ImagerPixelSpacing": [0.2, 0.2]}, None, (0.2, 0.2)),
        ({"Modality": "DX", "PixelSpacing": [0.2, 0.2], "ImagerPixelSpacing": [0.2, 0.2]}, None, (0.2, 0.2)),
        ({"Modality": "DX", "PixelSpacing": [0.15, 0.15], "ImagerPixelSpacing": [0.2, 0.2]}, (0.15, 0.15), (0.2, 0.2)),
        ({"Modality": "CR", "PixelSpacing": [0.2, 0.2], "PixelSpacingCalibrationType": "FIDUCIAL"}, (0.2, 0.2), None),
        ({"Modality": "CR", "PixelSpacing": [0.2, 0.2]}, None, (0.2, 0.2)),
    ],
)
def test_spacing(elements: dict[str, Any], patient: Any, detector: Any) -> None:
    decoded = decode(dicom(GREY, **elements))
    assert (decoded.pixel_spacing_mm, decoded.detector_spacing_mm) == (patient, detector)


def test_ultrasound_spacing() -> None:
    region = {"RegionSpatialFormat": 1, "PhysicalUnitsXDirection": 3, "PhysicalUnitsYDirection": 3}
    regions = item(**region, PhysicalDeltaX=0.02, PhysicalDeltaY=-0.03)
    assert decode(dicom(GREY, Modality="US", SequenceOfUltrasoundRegions=regions)).pixel_spacing_mm == (0.3, 0.2)


@pytest.mark.parametrize(
    ("elements", "expected"),
    [
        ({"ImageOrientationPatient": [1, 0, 0, 0, 1, 0]}, "L\\P"),
        ({"ImageOrientationPatient": [-1, 0, 0, 0, 1, 0]}, "R\\P"),
        ({"ImageOrientationPatient": [0, 1, 0, 0, 0, -1]}, "P\\F"),
        ({"ImageOrientationPatient": [0.8, 0.6, 0, 0, 0, -1]}, "LP\\F"),
        ({"ImageOrientationPatient": [1, 0, 0, 1, 0, 0]}, None),
        ({"PatientOrientation": ["L", "F"]}, "L\\F"),
        ({"PatientOrientation": ["SMITH", "J"]}, None),
        ({}, None),
    ],
)
def test_orientation(elements: dict[str, Any], expected: str | None) -> None:
    assert decode(dicom(GREY, **elements)).orientation == expected


# ---------------------------------------------------------------------------------------------------------------------
# files in pieces


def test_without_preamble_and_file_meta() -> None:
    whole = dicom(GREY)
    no_preamble = whole[132:]
    decoded = decode(no_preamble)
    assert np.array_equal(decoded.stored, GREY)
    assert "no preamble" in decoded.decoder
    no_meta = whole[whole.index(b"\x08\x00\x16\x00UI") :]
    decoded = decode(no_meta)
    assert np.array_equal(decoded.stored, GREY)
    assert "transfer syntax assumed" in decoded.decoder


def test_gzipped_dicom() -> None:
    wrapped = zlib.compressobj(wbits=31)
    assert np.array_equal(decode(wrapped.compress(dicom(GREY)) + wrapped.flush()).stored, GREY)


def test_frames_without_an_offset_table_and_in_fragments() -> None:
    rle = bundled("SC_rgb_rle_2frame.dcm")
    expected = [decode(rle, frame=i).stored for i in range(2)]
    from pydicom import dcmread
    from pydicom.encaps import encapsulate, generate_frames
    from pydicom.filebase import DicomBytesIO

    ds = dcmread(DicomBytesIO(rle))
    frames = list(generate_frames(ds.PixelData, number_of_frames=2))
    ds.PixelData = encapsulate(frames, has_bot=False)
    for i in range(2):
        assert np.array_equal(decode(file_bytes(ds, RLELossless), frame=i).stored, expected[i])
    ds.PixelData = encapsulate(frames, fragments_per_frame=2)
    for i in range(2):
        assert np.array_equal(decode(file_bytes(ds, RLELossless), frame=i).stored, expected[i])


@pytest.mark.parametrize("name", ["CT_small.dcm", "JPEG2000.dcm", "SC_rgb_rle.dcm", "examples_ybr_color.dcm"])
def test_cut_short_is_corrupt_never_a_grey_half(name: str) -> None:
    whole = bundled(name)
    end = len(whole) - 140  # some end in padding that no picture misses
    for share in (1, 0.9, 0.6):
        assert reason_of(whole[: int(end * share)]) in (Reason.CORRUPT, Reason.NO_PIXELS)


def test_not_images() -> None:
    structured = dataset(None, SOPClassUID="1.2.840.10008.5.1.4.1.1.88.33", Modality="SR")
    assert reason_of(file_bytes(structured)) == Reason.NOT_AN_IMAGE
    pdf = dataset(None, SOPClassUID="1.2.840.10008.5.1.4.1.1.104.1", Modality="DOC", EncapsulatedDocument=b"%PDF-1.7")
    assert reason_of(file_bytes(pdf)) == Reason.NOT_AN_IMAGE
    assert reason_of(file_bytes(dataset(None, Rows=4, Columns=4))) == Reason.NO_PIXELS
    assert reason_of(dicom(GREY, PixelData=b"")) == Reason.NO_PIXELS
    encrypted = dataset(None, EncryptedAttributesSequence=item(EncryptedContent=b"\0" * 8))
    assert reason_of(file_bytes(encrypted)) == Reason.ENCRYPTED


def test_float_pixels() -> None:
    ds = dataset(GREY, Modality="MR")
    del ds.PixelData
    ds.FloatPixelData = GREY.astype(np.float32).tobytes()
    assert reason_of(file_bytes(ds)) == Reason.UNSUPPORTED_PIXELS


@pytest.mark.parametrize(
    ("elements", "reason"),
    [
        ({"BitsAllocated": 64}, Reason.UNSUPPORTED_PIXELS),
        ({"SamplesPerPixel": 4}, Reason.UNSUPPORTED_PIXELS),
        ({"PhotometricInterpretation": "HSV"}, Reason.UNSUPPORTED_PIXELS),
        ({"PhotometricInterpretation": "PALETTE COLOR"}, Reason.CORRUPT),
        ({"BitsStored": 17}, Reason.CORRUPT),
        ({"Rows": 0}, Reason.CORRUPT),
        ({"Rows": 7}, Reason.CORRUPT),
        ({"Rows": None}, Reason.CORRUPT),
        ({"Rows": 65535, "Columns": 65535}, Reason.TOO_LARGE),
        ({"NumberOfFrames": 2}, Reason.CORRUPT),
        ({"NumberOfFrames": 2_000_000}, Reason.TOO_LARGE),
    ],
)
def test_impossible_headers(elements: dict[str, Any], reason: Reason) -> None:
    assert reason_of(dicom(GREY, **elements)) == reason


@pytest.mark.parametrize("frame", [0, 1])
def test_frames_deflated_and_encapsulated_as_they_are(frame: int) -> None:
    frames = np.stack([GREY, GREY + 7])
    raw = [f.tobytes() for f in frames]
    deflated = []
    for one in raw:
        deflate = zlib.compressobj(wbits=-15)
        deflated.append(deflate.compress(one) + deflate.flush())
    plain = b"1.2.840.10008.1.2.1.98"
    for syntax, pieces in ((plain, raw), (b"1.2.840.10008.1.2.8.1\0", deflated)):
        data = file_bytes(dataset(frames, BitsStored=12, HighBit=11), plain.decode(), pieces)
        data = data.replace(plain, syntax)  # pydicom does not write the other one yet
        assert np.array_equal(decode(data, frame=frame).stored, frames[frame])


def test_unknown_transfer_syntax() -> None:
    data = file_bytes(dataset(GREY), frames=[b"\0" * 16], syntax="1.2.840.10008.1.2.4.102")
    assert reason_of(data) == Reason.UNSUPPORTED_CODEC


def test_codestream_of_another_size_than_the_header() -> None:
    """A small header must not hide a huge codestream: the sizes are compared before decoding."""
    whole = bundled("JPEG2000.dcm")
    at = whole.index(b"\xff\x4f\xff\x51")
    huge = bytearray(whole)
    huge[at + 8 : at + 16] = (60000).to_bytes(4, "big") * 2
    assert reason_of(bytes(huge)) == Reason.CORRUPT


def test_deflated_bomb() -> None:
    plain = file_bytes(dataset(GREY), DeflatedExplicitVRLittleEndian)
    meta = plain[: 144 + int.from_bytes(plain[140:144], "little")]  # group 2, as long as its first element says
    deflate = zlib.compressobj(wbits=-15)
    bomb = deflate.compress(bytes(50_000_000)) + deflate.flush()
    assert len(bomb) < 100_000
    assert reason_of(meta + bomb, limits=Limits(max_inflated_bytes=10_000_000)) == Reason.TOO_LARGE


def test_default_window_of_a_film_with_nonsense_in_its_header() -> None:
    decoded = decode(dicom(GREY * 80, Modality="DX", WindowCenter=15000, WindowWidth=30000))
    assert render(decoded).std() > 50


def test_burned_in_annotation_is_kept_as_a_fact() -> None:
    assert decode(dicom(GREY, BurnedInAnnotation="YES")).burned_in_annotation is True
    assert decode(dicom(GREY, BurnedInAnnotation="NO")).burned_in_annotation is False
    assert decode(dicom(GREY)).burned_in_annotation is None
