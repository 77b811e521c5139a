"""The real files of ../shared, where they are at hand: the same pixels as the manifest says, or one clear reason."""

from __future__ import annotations

import csv
from typing import Any

import numpy as np
import pytest

from meddam_core.imaging.decode import decode
from meddam_core.imaging.render import render
from meddam_core.imaging.windows import physical_values
from meddam_core.records import Reason, RowError
from tests.meddam_core.imaging.dicom_files import SHARED

MANIFEST = SHARED / "zoo_manifest.csv"
pytestmark = pytest.mark.skipif(not MANIFEST.exists(), reason="the shared data are not at hand")

NEVER = {
    "rtdose.dcm": Reason.UNSUPPORTED_PIXELS,
    "rtdose_rle.dcm": Reason.UNSUPPORTED_PIXELS,
    "SC_rgb_rle_32bit.dcm": Reason.UNSUPPORTED_PIXELS,
}
"""Files that other readers decode, and that 16 bits can't hold."""


def rows() -> list[dict[str, Any]]:
    if not MANIFEST.exists():
        return []
    with MANIFEST.open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("row", rows(), ids=lambda r: r["path"].rsplit("/", 1)[-1])
def test_as_the_manifest_says(row: dict[str, Any]) -> None:
    data = (SHARED / row["path"]).read_bytes()
    name = row["path"].rsplit("/", 1)[-1]
    if not row["shape"] or name in NEVER:
        try:
            decoded = decode(data, name=name)
        except RowError as error:
            assert error.reason == NEVER.get(name, error.reason)  # noqa: PT017
            return
        assert name == "JPEG-lossy.dcm", "more than the manifest's readers could"
        assert decoded.stored.max() == 264
        return
    decoded = decode(data, name=name)
    shape = [int(n) for n in row["shape"].split("x")]
    if row["photometric"] == "PALETTE COLOR":
        assert decoded.stored.shape == (*shape, 3)
        return
    assert list(decoded.stored.shape) == (shape[1:] if decoded.num_frames > 1 else shape)
    values = decoded.stored.astype(float)
    if decoded.photometric != "RGB":
        slope, intercept = float(row["slope"] or 1), float(row["intercept"] or 0)
        values = (physical_values(decoded, decoded.stored) - intercept) / slope
    if decoded.num_frames == 1:
        assert (values.min(), values.max()) == pytest.approx((float(row["min"]), float(row["max"])), abs=1e-6)
    else:
        assert values.min() >= float(row["min"])
        assert values.max() <= float(row["max"])


@pytest.mark.parametrize(
    ("patient", "z", "box"),
    [("LIDC-IDRI-0001", "-117.500000", (299, 343, 335, 385)), ("LIDC-IDRI-0003", "-189.000000", (350, 337, 385, 366))],
)
def test_boxes_of_real_nodules_are_bright_spots_in_dark_lung(
    patient: str, z: str, box: tuple[int, int, int, int]
) -> None:
    (path,) = (SHARED / "lidc" / patient).rglob(f"{z}.dcm")
    image_HW = render(decode(path.read_bytes()), "lung")[..., 0].astype(float)
    x0, y0, x1, y1 = box
    inside = image_HW[y0 + 5 : y1 - 5, x0 + 5 : x1 - 5].mean()
    ring = np.concatenate([image_HW[y0 - 12 : y0 - 4, x0:x1].ravel(), image_HW[y0:y1, x0 - 12 : x0 - 4].ravel()])
    assert inside > ring.mean() + 60


def test_slices_of_a_series_sort_by_position() -> None:
    for series in ("LIDC-IDRI-0001", "LIDC-IDRI-0002"):
        found = {float(p.stem): decode(p.read_bytes()) for p in (SHARED / "lidc" / series).rglob("*.dcm")}
        assert all(d.identity.position_mm == pytest.approx(z) for z, d in found.items())
        assert len({d.rescale for d in found.values()}) == 1, "one shift for the whole series"
        assert {d.orientation for d in found.values()} == {"L\\P"}


def test_lung_window_shows_what_the_headers_soft_tissue_window_hides() -> None:
    path = next((SHARED / "lidc" / "LIDC-IDRI-0002").rglob("*.dcm"))
    decoded = decode(path.read_bytes())
    assert decoded.window is not None
    assert (decoded.window.center, decoded.window.width) == (40, 350)
    hu = physical_values(decoded, decoded.stored)
    lung = (hu > -950) & (hu < -600)
    assert render(decoded)[lung].std() < 1
    assert render(decoded, "lung")[lung].std() > 10
