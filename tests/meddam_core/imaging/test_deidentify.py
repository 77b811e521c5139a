"""Nothing of a patient gets out: planted in every place a file has, and searched for in everything that comes out."""

from __future__ import annotations

import dataclasses
import io
import logging
import pickle
import traceback
import warnings
from typing import Any

import numpy as np
import pytest
from PIL import Image, PngImagePlugin
from pydicom.datadict import dictionary_VR, tag_for_keyword
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.tag import Tag

from meddam_core import records
from meddam_core.imaging.decode import decode
from meddam_core.imaging.deidentify import identity_keys, image_fields, keyed_hash, may_show_identity
from meddam_core.records import RowError
from tests.meddam_core.imaging.dicom_files import PHI, bundled, dataset, dicom, file_bytes, item

GREY = np.arange(4096, dtype=np.uint16).reshape(64, 64)
NAME = "/data/Quxzyname/4711.dcm"
SECRETS = ("quxzy", "testperson", "4711", "1941", "20190405", "3680043.8.498")


def leaks(*outputs: Any) -> list[str]:
    """Which planted strings are in the outputs, in any usual encoding."""
    blob = b"\n".join(o if isinstance(o, bytes) else repr(o).encode() + str(o).encode() for o in outputs).lower()
    return [s for s in SECRETS if s.encode() in blob or s.encode("utf-16-le") in blob]


def planted(**elements: Any) -> Dataset:
    """A dataset with a patient in every corner: free text, private tags, overlays, sequences, file meta."""
    ds = dataset(GREY, Modality="MR", **elements)
    ds.ImageComments = "Quxzyname came on 20190405"
    ds.PatientComments = "Quxzy 4711"
    ds.add_new(0x00091001, "LO", "QUXZY PRIVATE")
    ds.add_new(0x00090010, "LO", "QUXZYCREATOR")
    ds.add_new(0x60000010, "US", 8)
    ds.add_new(0x60000022, "LO", "Quxzyname overlay")
    ds.add_new(0x60003000, "OW", b"quxzyname0123456")
    ds.RequestAttributesSequence = item(RequestedProcedureDescription="Quxzy procedure", PatientID="QUXZYID-4711")
    return ds


def everything_of(data: bytes, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> list[Any]:
    """All that decoding and a row show to anyone: values, reprs, bytes, logs, warnings, output, errors."""
    caplog.set_level(logging.DEBUG)
    caplog.clear()  # making the file may have been noisy
    capfd.readouterr()
    outputs: list[Any] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            decoded = decode(data, name=NAME)
            row = records.Image(
                image_id=1, image_key="k", dataset="d", **identity_keys("secret", decoded), **image_fields(decoded)
            )
            outputs += [decoded, decoded.identity, row, row.image.bytes, row.preview.bytes, records.to_row(row)]
        except RowError as error:
            outputs += [error, error.detail, pickle.dumps(error), "".join(traceback.format_exception(error))]
    outputs += [str(w.message) for w in caught]
    outputs += [r.getMessage() for r in caplog.records]
    outputs += list(capfd.readouterr())
    return outputs


def test_a_planted_patient_is_in_the_file_and_in_nothing_that_comes_out(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    data = file_bytes(planted())
    assert leaks(data) == ["quxzy", "testperson", "4711", "1941", "20190405", "3680043.8.498"]
    assert leaks(*everything_of(data, caplog, capfd)) == []


BAD: dict[str, Any] = {
    "WindowCenter": "QUXZY",
    "PixelSpacing": ["QUXZY", "4711"],
    "ImageOrientationPatient": ["4711"] * 6,
    "PatientOrientation": ["QUXZYNAME", "TESTPERSON"],
    "Modality": "QUXZY",
    "BurnedInAnnotation": "QUXZY",
    "PhotometricInterpretation": "QUXZY",
    "NumberOfFrames": "QUXZY4711",
    "RescaleSlope": "QUXZY",
    "PresentationLUTShape": "QUXZY",
    "VOILUTFunction": "QUXZY",
    "SOPClassUID": "QUXZY.4711",
    "InstanceNumber": "QUXZY4711",
}


@pytest.mark.parametrize("keyword", BAD)
def test_patients_in_the_wrong_field(
    keyword: str, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    ds = planted(WindowCenter="2000", WindowWidth="3000", VOILUTFunction="LINEAR", NumberOfFrames="1")
    ds.RescaleIntercept = "0"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tag = tag_for_keyword(keyword)
        assert tag is not None
        value = "\\".join(BAD[keyword]) if isinstance(BAD[keyword], list) else BAD[keyword]
        raw = value.encode() + b" " * (len(value) % 2)
        ds._dict[Tag(tag)] = RawDataElement(Tag(tag), dictionary_VR(tag), len(raw), raw, 0, False, True)
        data = file_bytes(ds)
    assert raw in data
    assert leaks(*everything_of(data, caplog, capfd)) == []


@pytest.mark.parametrize("damage", ["cut", "no pixels", "report"])
def test_errors_name_no_patient(
    damage: str, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    data = file_bytes(planted())
    if damage == "cut":
        data = data[:-3000]
    elif damage == "no pixels":
        data = data[: data.index(b"\xe0\x7f\x10\x00")]
    else:
        data = file_bytes(dataset(None, SOPClassUID="1.2.840.10008.5.1.4.1.1.88.11", Modality="SR"))
    with pytest.raises(RowError):
        decode(data)
    assert leaks(*everything_of(data, caplog, capfd)) == []


@pytest.mark.parametrize("fmt", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_pictures_lose_their_metadata(
    fmt: str, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    text = PngImagePlugin.PngInfo()
    text.add_text("Patient", "Quxzyname 4711")
    exif = Image.Exif()
    exif[270] = "Quxzyname Testperson 4711"
    exif[306] = "20190405"
    options: dict[str, Any] = {"exif": exif}
    if fmt == "PNG":
        options["pnginfo"] = text
    out = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (20, 20, 3), np.uint8)
    Image.fromarray(pixels).save(out, fmt, **options)
    assert "quxzy" in leaks(out.getvalue())
    assert leaks(*everything_of(out.getvalue(), caplog, capfd)) == []


def test_libraries_speak_again_afterwards(caplog: pytest.LogCaptureFixture) -> None:
    decode(bundled("CT_small.dcm"))
    logging.getLogger("pydicom").warning("heard")
    assert "heard" in caplog.text
    with pytest.warns(UserWarning, match="heard"):
        warnings.warn("heard", UserWarning, stacklevel=1)


def test_only_allow_listed_fields_reach_a_row() -> None:
    fields = image_fields(decode(file_bytes(planted())))
    assert set(fields) <= {f.name for f in dataclasses.fields(records.Image)}
    assert not {"patient_key", "study_key", "image_key"} & set(fields)


def test_keys() -> None:
    decoded = decode(dicom(GREY))
    keys = identity_keys(b"secret", decoded)
    assert keys == identity_keys("secret", decode(dicom(GREY + 1)))
    assert keys != identity_keys("other", decoded)
    assert keys["patient_key"] != keys["study_key"]
    assert all(len(k or "") == 32 for k in keys.values())
    assert identity_keys("secret", decode(dicom(GREY, PatientID=""))) == {**keys, "patient_key": None}
    assert decoded.identity.patient_id == PHI["PatientID"]
    with pytest.raises(ValueError, match="secret"):
        keyed_hash("", "x")


@pytest.mark.parametrize(
    ("modality", "burned_in", "expected"),
    [("US", None, True), ("US", False, False), ("CT", None, False), ("CT", True, True), ("XC", None, True)],
)
def test_pictures_that_may_name_the_patient(modality: str, burned_in: bool | None, expected: bool) -> None:
    assert may_show_identity(modality, burned_in) is expected
