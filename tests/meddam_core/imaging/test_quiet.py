"""Silence is per thread, and ends with the last thread inside."""

from __future__ import annotations

import logging
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from meddam_core.imaging.decode import decode
from meddam_core.imaging.quiet import quiet
from meddam_core.records import RowError
from tests.meddam_core.imaging.dicom_files import bundled

NAMES = ("badVR.dcm", "CT_small.dcm", "MR_small_jp2klossless.dcm", "examples_ybr_color.dcm", "no_meta.dcm")


def outcome(name: str) -> bytes:
    try:
        return decode(bundled(name)).stored.tobytes()
    except RowError as error:
        return error.reason.encode()


def test_many_threads_decode_at_once_and_leave_the_filters_as_they_were() -> None:
    before = list(warnings.filters)
    alone = [outcome(name) for name in NAMES]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(outcome, NAMES * 20))
    assert together == alone * 20
    assert list(warnings.filters) == before


def test_another_threads_lines_are_heard(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("pydicom")
    with quiet():
        logger.warning("inside")
        with ThreadPoolExecutor(1) as pool:
            pool.submit(logger.warning, "outside").result()
    assert "outside" in caplog.text
    assert "inside" not in caplog.text


def test_an_error_ends_the_silence() -> None:
    with pytest.raises(RowError):
        decode(b"nothing")
    with pytest.warns(UserWarning, match="heard"):
        warnings.warn("heard", UserWarning, stacklevel=1)
    assert np.isfinite(decode(bundled("CT_small.dcm")).stored).all()
