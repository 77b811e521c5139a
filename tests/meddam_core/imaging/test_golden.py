"""Golden pixels per transfer syntax, from the files that pydicom's wheel carries.

The digests were compared, when they were written, with pydicom 3.0.2's own pixel_array; `test_as_pydicom` compares
again with whatever pydicom is installed.
"""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.filebase import DicomBytesIO

from meddam_core.imaging.decode import decode
from meddam_core.records import Reason, RowError
from tests.meddam_core.imaging.dicom_files import bundled

GOLDEN = {
    "693_J2KI.dcm": ((512, 512), 16, 32768, "MONOCHROME2", "pylibjpeg-openjpeg", "9b24a40b7a9c32b2"),
    "CT_small.dcm": ((128, 128), 16, 32768, "MONOCHROME2", "native", "91e2f47c00d5faed"),
    "ExplVR_BigEnd.dcm": ((60, 80, 3), 8, 0, "RGB", "native", "1583c4339dd36e91"),
    "GDCMJ2K_TextGBR.dcm": ((400, 400, 3), 8, 0, "RGB", "pylibjpeg-openjpeg", "bea5673fdd49313f"),
    "J2K_pixelrep_mismatch.dcm": ((512, 512), 13, 4096, "MONOCHROME2", "pylibjpeg-openjpeg", "2b69c190ba977616"),
    "JPEG-lossy.dcm": ((1024, 256), 12, 0, "MONOCHROME2", "imagecodecs", "d30242775a414c01"),
    "JPEG2000.dcm": ((1024, 256), 16, 32768, "MONOCHROME2", "pylibjpeg-openjpeg", "4e8fbd3e7b90f634"),
    "JPEGLSNearLossless_08.dcm": ((45, 10), 8, 0, "MONOCHROME2", "pyjpegls", "9eb46aa86c342094"),
    "JPEGLSNearLossless_16.dcm": ((50, 10), 16, 0, "MONOCHROME2", "pyjpegls", "f929318278115ce9"),
    "JPGExtended.dcm": ((1024, 256), 12, 0, "MONOCHROME2", "imagecodecs", "d30242775a414c01"),
    "MR_small.dcm": ((64, 64), 16, 32768, "MONOCHROME2", "native", "3d414f8df4d70360"),
    "MR_small_RLE.dcm": ((64, 64), 16, 32768, "MONOCHROME2", "pylibjpeg-rle", "3d414f8df4d70360"),
    "MR_small_bigendian.dcm": ((64, 64), 16, 32768, "MONOCHROME2", "native", "3d414f8df4d70360"),
    "MR_small_expb.dcm": ((64, 64), 16, 32768, "MONOCHROME2", "native", "3d414f8df4d70360"),
    "MR_small_implicit.dcm": ((64, 64), 16, 32768, "MONOCHROME2", "native", "3d414f8df4d70360"),
    "MR_small_jp2klossless.dcm": ((64, 64), 16, 32768, "MONOCHROME2", "pylibjpeg-openjpeg", "3d414f8df4d70360"),
    "MR_small_jpeg_ls_lossless.dcm": ((64, 64), 16, 32768, "MONOCHROME2", "pyjpegls", "3d414f8df4d70360"),
    "MR_small_padded.dcm": ((64, 64), 16, 32768, "MONOCHROME2", "native", "3d414f8df4d70360"),
    "SC_jpeg_no_color_transform.dcm": ((256, 256, 3), 8, 0, "RGB", "pillow", "be7aa556b206ac44"),
    "SC_jpeg_no_color_transform_2.dcm": ((256, 256, 3), 8, 0, "RGB", "pillow", "334275c10bc60e80"),
    "SC_rgb_dcmtk_+eb+cr.dcm": ((100, 100, 3), 8, 0, "RGB", "pillow", "e414aaca68669516"),
    "SC_rgb_dcmtk_+eb+cy+n1.dcm": ((100, 100, 3), 8, 0, "RGB", "pillow", "e0b1a561989d6f71"),
    "SC_rgb_dcmtk_+eb+cy+n2.dcm": ((100, 100, 3), 8, 0, "RGB", "pillow", "ddb100d8f45a7fbf"),
    "SC_rgb_dcmtk_+eb+cy+np.dcm": ((100, 100, 3), 8, 0, "RGB", "pillow", "e0b1a561989d6f71"),
    "SC_rgb_dcmtk_+eb+cy+s2.dcm": ((100, 100, 3), 8, 0, "RGB", "pillow", "ddb100d8f45a7fbf"),
    "SC_rgb_dcmtk_+eb+cy+s4.dcm": ((100, 100, 3), 8, 0, "RGB", "pillow", "ddb100d8f45a7fbf"),
    "SC_rgb_gdcm_KY.dcm": ((100, 100, 3), 8, 0, "RGB", "pylibjpeg-openjpeg", "169e619557b12114"),
    "SC_rgb_jls_lossy_line.dcm": ((100, 100, 3), 8, 0, "RGB", "pyjpegls", "bd5344c0a46bc6c0"),
    "SC_rgb_jls_lossy_sample.dcm": ((100, 100, 3), 8, 0, "RGB", "pyjpegls", "bd5344c0a46bc6c0"),
    "SC_rgb_jpeg.dcm": ((256, 256, 3), 8, 0, "RGB", "pillow", "be7aa556b206ac44"),
    "SC_rgb_jpeg_app14_dcmd.dcm": ((256, 256, 3), 8, 0, "RGB", "pillow", "334275c10bc60e80"),
    "SC_rgb_jpeg_dcmd.dcm": ((256, 256, 3), 8, 0, "RGB", "native", "be7aa556b206ac44"),
    "SC_rgb_jpeg_dcmtk.dcm": ((100, 100, 3), 8, 0, "RGB", "pillow", "ddb100d8f45a7fbf"),
    "SC_rgb_jpeg_gdcm.dcm": ((100, 100, 3), 8, 0, "RGB", "imagecodecs", "169e619557b12114"),
    "SC_rgb_jpeg_lossy_gdcm.dcm": ((100, 100, 3), 8, 0, "RGB", "pillow", "e42f7896adb9411a"),
    "SC_rgb_rle.dcm": ((100, 100, 3), 8, 0, "RGB", "pylibjpeg-rle", "169e619557b12114"),
    "SC_rgb_rle_16bit.dcm": ((100, 100, 3), 16, 0, "RGB", "pylibjpeg-rle", "36de0258708d3af7"),
    "SC_rgb_rle_16bit_2frame.dcm": ((100, 100, 3), 16, 0, "RGB", "pylibjpeg-rle", "36de0258708d3af7"),
    "SC_rgb_rle_2frame.dcm": ((100, 100, 3), 8, 0, "RGB", "pylibjpeg-rle", "169e619557b12114"),
    "SC_rgb_small_odd.dcm": ((3, 3, 3), 8, 0, "RGB", "native", "ef2df252ba3cd066"),
    "SC_rgb_small_odd_big_endian.dcm": ((3, 3, 3), 8, 0, "RGB", "native", "ef2df252ba3cd066"),
    "SC_rgb_small_odd_jpeg.dcm": ((3, 3, 3), 8, 0, "RGB", "pillow", "f750a80478763f97"),
    "SC_ybr_full_422_uncompressed.dcm": ((100, 100, 3), 8, 0, "RGB", "native", "ddb100d8f45a7fbf"),
    "examples_jpeg2k.dcm": ((480, 640, 3), 8, 0, "RGB", "pylibjpeg-openjpeg", "e16892020c73095e"),
    "examples_overlay.dcm": ((300, 484), 12, 0, "MONOCHROME2", "native", "679f753ac52bc113"),
    "examples_palette.dcm": ((350, 800, 3), 8, 0, "RGB", "native", "322156a65198e9be"),
    "examples_rgb_color.dcm": ((240, 320, 3), 8, 0, "RGB", "native", "a64f021b9093684b"),
    "examples_ybr_color.dcm": ((240, 320, 3), 8, 0, "RGB", "pillow", "52353e7c7c11b14a"),
    "image_dfl.dcm": ((512, 512), 8, 0, "MONOCHROME2", "native", "1f5f1b1c1a57606a"),
    "liver_1frame.dcm": ((512, 512), 1, 0, "MONOCHROME2", "native", "e036a07b502fdfd1"),
    "liver_expb_1frame.dcm": ((512, 512), 1, 0, "MONOCHROME2", "native", "e036a07b502fdfd1"),
}
"""file: (shape of `stored`, stored bits, file value -> stored value shift, photometric, decoder, digest)"""

REFUSED = {
    "ExplVR_BigEndNoMeta.dcm": Reason.NOT_AN_IMAGE,
    "ExplVR_LitEndNoMeta.dcm": Reason.NOT_AN_IMAGE,
    "JPEG2000-embedded-sequence-delimiter.dcm": Reason.CORRUPT,
    "MR_truncated.dcm": Reason.CORRUPT,
    "SC_rgb_rle_32bit.dcm": Reason.UNSUPPORTED_PIXELS,
    "SC_rgb_rle_32bit_2frame.dcm": Reason.UNSUPPORTED_PIXELS,
    "UN_sequence.dcm": Reason.NO_PIXELS,
    "badVR.dcm": Reason.CORRUPT,
    "empty_charset_LEI.dcm": Reason.NO_PIXELS,
    "meta_missing_tsyntax.dcm": Reason.CORRUPT,
    "nested_priv_SQ.dcm": Reason.CORRUPT,
    "no_meta.dcm": Reason.CORRUPT,
    "no_meta_group_length.dcm": Reason.NO_PIXELS,
    "priv_SQ.dcm": Reason.NO_PIXELS,
    "reportsi.dcm": Reason.NOT_AN_IMAGE,
    "reportsi_with_empty_number_tags.dcm": Reason.NOT_AN_IMAGE,
    "rtdose.dcm": Reason.UNSUPPORTED_PIXELS,
    "rtdose_1frame.dcm": Reason.UNSUPPORTED_PIXELS,
    "rtdose_expb.dcm": Reason.UNSUPPORTED_PIXELS,
    "rtdose_expb_1frame.dcm": Reason.UNSUPPORTED_PIXELS,
    "rtdose_rle.dcm": Reason.UNSUPPORTED_PIXELS,
    "rtdose_rle_1frame.dcm": Reason.UNSUPPORTED_PIXELS,
    "rtplan.dcm": Reason.NOT_AN_IMAGE,
    "rtplan_truncated.dcm": Reason.NOT_AN_IMAGE,
    "rtstruct.dcm": Reason.NOT_AN_IMAGE,
    "test-SR.dcm": Reason.NOT_AN_IMAGE,
    "waveform_ecg.dcm": Reason.NOT_AN_IMAGE,
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden(name: str) -> None:
    shape, bits, _, photometric, decoder, digest = GOLDEN[name]
    if decoder in ("imagecodecs", "pyjpegls"):
        pytest.importorskip({"pyjpegls": "jpeg_ls"}.get(decoder, decoder))
    decoded = decode(bundled(name))
    assert decoded.stored.shape == shape
    assert decoded.stored_bits == bits
    assert decoded.photometric == photometric
    assert decoder in decoded.decoder
    assert decoded.stored.dtype == (np.uint8 if bits <= 8 else np.uint16)
    assert int(decoded.stored.max()) < 1 << bits
    assert hashlib.sha256(decoded.stored.tobytes()).hexdigest()[:16] == digest


@pytest.mark.parametrize(
    "name", [n for n, g in GOLDEN.items() if "pillow" in g[4] or "native" in g[4] or "rle" in g[4]]
)
def test_as_pydicom(name: str) -> None:
    _, _, shift, _, decoder, _ = GOLDEN[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ds = pydicom.dcmread(DicomBytesIO(bundled(name)))
        plugin = "pillow" if "pillow" in decoder else "pydicom" if "rle" in decoder else ""
        ds.pixel_array_options(decoding_plugin=plugin)
        expected = ds.pixel_array
        if ds.PhotometricInterpretation == "PALETTE COLOR":
            expected = pydicom.pixels.apply_color_lut(expected, ds) >> 8  # its palette has 16 bits
    first = expected[0] if int(ds.get("NumberOfFrames") or 1) > 1 else expected
    assert np.array_equal(decode(bundled(name)).stored.astype(np.int64), first.astype(np.int64) + shift)


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_one_reason(name: str) -> None:
    with pytest.raises(RowError) as error:
        decode(bundled(name), name=name)
    assert error.value.reason == REFUSED[name]


def test_every_bundled_file_is_listed() -> None:
    names = {path.name for path in (Path(pydicom.__file__).parent / "data" / "test_files").glob("*.dcm")}
    assert names - set(GOLDEN) - set(REFUSED) == set()


@pytest.mark.parametrize("name", ["examples_ybr_color.dcm", "SC_rgb_rle_2frame.dcm", "SC_rgb_rle_16bit_2frame.dcm"])
def test_frames_one_by_one(name: str) -> None:
    first = decode(bundled(name))
    assert first.frame == 0
    last = decode(bundled(name), frame=first.num_frames - 1)
    assert last.num_frames == first.num_frames > 1
    assert last.frame == first.num_frames - 1
    assert not np.array_equal(first.stored, last.stored)
    for outside in (first.num_frames, -1):
        with pytest.raises(RowError) as error:
            decode(bundled(name), frame=outside)
        assert error.value.reason == Reason.BAD_ANNOTATION
