"""Items to rows: regions checked one by one, keys instead of names, nothing raised for one bad file."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as PilImage

from meddam_core.datasets.base import Problem, SourceItem, SourceRegion
from meddam_core.datasets.manifest import Manifest
from meddam_core.datasets.pydicom_samples import PydicomSamples
from meddam_core.datasets.rows import Rejected, RowRules, rows_of
from meddam_core.imaging.limits import Limits
from meddam_core.imaging.png import decode_png
from meddam_core.records import Image, Label, Reason, image_id, region_id
from meddam_core.regions.geometry import tight_box
from meddam_core.regions.masks import mask_of

SOURCE = Manifest(path="list.jsonl")
RULES = RowRules(dataset="films", licence="CC0-1.0", egress="open", image_secret=b"salt")
PIXELS = np.random.default_rng(0).integers(0, 256, (40, 60), dtype=np.uint8)


def _png(pixels: np.ndarray, **extra: Any) -> bytes:
    buffer = io.BytesIO()
    PilImage.fromarray(pixels).save(buffer, "PNG", **extra)
    return buffer.getvalue()


def _item(*regions: SourceRegion, **changes: Any) -> SourceItem:
    return SourceItem(**{"key": "a.png", "data": _png(PIXELS), "modality": "DX", "regions": list(regions), **changes})


def _box(ordinal: int, *box: float, **changes: Any) -> SourceRegion:
    return SourceRegion(ordinal=ordinal, box=list(box), **changes)


def _rows(item: SourceItem, rules: RowRules = RULES, **where: int) -> tuple[list[Image], list[Rejected]]:
    return rows_of(SOURCE, item, **{"ordinal": 5, "shard": 2, "first_row": 9, **where}, rules=rules)


def test_a_row_holds_the_pixels_and_the_regions() -> None:
    polygon = SourceRegion(ordinal=1, segmentation=[[10, 10, 30, 10, 30, 30, 10, 30]])
    (row,), rejected = _rows(_item(_box(0, 5, 6, 20.5, 30, labels=[Label(name="finding", value="nodule")]), polygon))
    assert not rejected
    assert row.image_id == image_id(2, 9)
    assert [r.region_id for r in row.regions] == [region_id(row.image_id, i) for i in (0, 1)]
    assert row.regions[0].box == (5, 6, 21, 30) and row.regions[0].mask is None
    assert row.regions[1].mask is not None
    assert row.regions[1].box == tight_box(mask_of(row.regions[1].mask)) == (10, 10, 30, 30)
    assert row.image.bytes is not None and np.array_equal(decode_png(row.image.bytes), PIXELS)
    assert (row.width, row.height, row.modality, row.recipe) == (60, 40, "DX", "chest-film")
    assert (row.dataset, row.licence, row.egress, row.split) == ("films", "CC0-1.0", "open", "all")


def test_bad_regions_are_left_out_with_their_reasons_and_the_image_goes_on(tmp_path: Path) -> None:
    (tmp_path / "small.png").write_bytes(_png(np.ones((10, 10), np.uint8)))
    (tmp_path / "blank.png").write_bytes(_png(np.zeros((40, 60), np.uint8)))
    (row,), rejected = _rows(
        _item(
            _box(0, 100, 100, 200, 200),
            _box(1, 5, 5, 5, 9),
            _box(2, 5, 5, 20, 20),
            SourceRegion(ordinal=3, mask_uri=str(tmp_path / "small.png")),
            SourceRegion(ordinal=4, mask_uri=str(tmp_path / "blank.png")),
            SourceRegion(ordinal=5, mask_uri=str(tmp_path / "absent.png")),
            SourceRegion(ordinal=6, segmentation={"size": [40, 60], "counts": "~"}),
            problems=[Problem(reason=Reason.DUPLICATE_ID, detail="twice", region=7)],
        )
    )
    assert [r.box for r in row.regions] == [(5, 5, 20, 20)]
    assert {(r.region, r.reason) for r in rejected} == {
        (0, Reason.BOX_OUTSIDE),
        (1, Reason.BOX_EMPTY),
        (3, Reason.MASK_SIZE),
        (4, Reason.MASK_EMPTY),
        (5, Reason.NOT_FOUND),
        (6, Reason.BAD_ANNOTATION),
        (7, Reason.DUPLICATE_ID),
    }
    assert all(r.item == 5 and str(tmp_path) not in r.detail for r in rejected)


def test_an_image_without_any_usable_region_is_left_out() -> None:
    rows, rejected = _rows(_item(_box(0, 100, 100, 200, 200)))
    assert not rows and [r.reason for r in rejected] == [Reason.BOX_OUTSIDE, Reason.NO_REGIONS]
    rows, rejected = _rows(_item())  # it never had any: the recipe's detector may find some
    assert len(rows) == 1 and not rejected


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"data": None, "uri": "/nowhere/a.png"}, Reason.NOT_FOUND),
        ({"data": None, "uri": "/"}, Reason.NOT_FOUND),
        ({"data": None}, Reason.NOT_FOUND),
        ({"data": b""}, Reason.CORRUPT),
        ({"data": b"plain text"}, Reason.NOT_AN_IMAGE),
        ({"data": _png(PIXELS)[:90]}, Reason.CORRUPT),
        ({"problems": [Problem(reason=Reason.DUPLICATE_ID, detail="twice")]}, Reason.DUPLICATE_ID),
    ],
)
def test_dead_files_are_rejects(change: dict[str, Any], reason: Reason) -> None:
    rows, rejected = _rows(_item(_box(0, 1, 1, 9, 9), **change))
    assert not rows
    assert [(r.item, r.region, r.reason) for r in rejected] == [(5, None, reason)]


def test_too_large_pictures_are_rejects() -> None:
    rules = RowRules(dataset="d", licence="x", egress="deny", image_secret=b"salt", limits=Limits(max_pixels=2000))
    _, rejected = _rows(_item(), rules)
    assert [r.reason for r in rejected] == [Reason.TOO_LARGE]


def test_many_regions_continue_in_further_rows() -> None:
    regions = [_box(i, i, 0, i + 5, 9) for i in range(40)]
    rows, _ = _rows(_item(*regions))
    assert [len(r.regions) for r in rows] == [16, 16, 8]
    assert [r.image_id for r in rows] == [image_id(2, 9), image_id(2, 10), image_id(2, 11)]
    assert len({x.region_id for r in rows for x in r.regions}) == 40
    assert len({r.image_key for r in rows}) == 1 and len({r.image.bytes for r in rows}) == 1


def test_the_recipe_chooses_at_most_five_regions() -> None:
    regions = [_box(i, i, 0, i + 5, 9) for i in range(40)]
    rules = RowRules(dataset="d", licence="x", egress="deny", recipe="vindr-cxr", image_secret=b"one")
    other = RowRules(dataset="d", licence="x", egress="deny", recipe="vindr-cxr", image_secret=b"two")
    (row,), _ = _rows(_item(*regions), rules)
    (same,), _ = _rows(_item(*regions), other)
    assert len(row.regions) == 5 and row.recipe == "vindr-cxr"
    assert [r.box for r in row.regions] == [r.box for r in same.regions]  # the choice depends on nobody's secret
    assert row.image_key != same.image_key


def test_a_ct_window_is_refused_for_other_pictures() -> None:
    rules = RowRules(dataset="d", licence="x", egress="deny", recipe="lidc-idri", image_secret=b"s")
    _, rejected = _rows(_item(_box(0, 1, 1, 9, 9)), rules)
    assert [r.reason for r in rejected] == [Reason.UNSUPPORTED_PIXELS]


def test_keys_stand_for_names_and_only_with_a_secret() -> None:
    item = _item(_box(0, 1, 1, 9, 9), patient_id="DOE^JANE", study_id="1.2.3")
    (plain,), _ = _rows(item)
    assert plain.patient_key is None and plain.study_key is None
    with_secret = {"dataset": "films", "licence": "x", "egress": "deny", "image_secret": b"s"}
    (row,), _ = _rows(item, RowRules(**with_secret, patient_secret=b"s"))
    (again,), _ = _rows(item, RowRules(**with_secret, patient_secret=b"s"))
    (other,), _ = _rows(item, RowRules(**with_secret, patient_secret=b"t"))
    assert row.patient_key == again.patient_key and row.patient_key != other.patient_key
    assert row.patient_key and row.study_key and "DOE" not in row.patient_key


def test_pictures_that_may_show_a_person_do_not_leave() -> None:
    photograph = _item(_box(0, 1, 1, 9, 9), modality="XC")
    (row,), _ = _rows(photograph)
    assert row.egress == "deny"
    cleared = RowRules(dataset="d", licence="x", egress="open", image_secret=b"s", pixels_cleared=True)
    (row,), _ = _rows(photograph, cleared)
    assert row.egress == "open"


def test_pydicoms_own_files_become_rows_with_their_sides() -> None:
    source = PydicomSamples()
    rows: list[Image] = []
    for ordinal, item in enumerate(source.items()):
        images, rejected = rows_of(source, item, ordinal=ordinal, rules=RULES, shard=0, first_row=len(rows))
        assert not rejected
        rows += images
    assert {r.modality for r in rows} == {"CT", "MR", "NM", "US", "CR"}
    kidneys = [(r.box, {x.name: x.value for x in r.labels}) for i in rows for r in i.regions if len(r.labels) == 2]
    left = next(box for box, labels in kidneys if labels == {"structure": "kidney", "side": "left"})
    right = next(box for box, labels in kidneys if labels == {"structure": "kidney", "side": "right"})
    abdomen = next(r for r in rows if (r.width, r.height) == (484, 300))
    assert abdomen.orientation == "L\\P" and right[2] < left[0]  # columns run to the patient's left
    clip = next(r for r in rows if r.modality == "US")
    assert clip.frame == 12 and clip.egress == "deny"  # its pixels carry text


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (PermissionError(13, "Permission denied"), Reason.ACCESS_DENIED),
        (OSError("AWS Error ACCESS_DENIED during HeadObject operation"), Reason.ACCESS_DENIED),
        (OSError("AWS Error NO_SUCH_BUCKET during HeadObject operation"), Reason.NOT_FOUND),
        (OSError(36, "File name too long"), Reason.NOT_FOUND),
        (OSError("AWS Error SLOW_DOWN during GetObject operation"), None),
        (OSError("AWS Error NETWORK_CONNECTION during HeadObject operation: curlCode: 7"), None),
        (OSError(5, "Input/output error"), None),
    ],
)
def test_a_store_in_trouble_is_no_reason_to_reject_a_file(
    monkeypatch: pytest.MonkeyPatch, error: OSError, reason: Reason | None
) -> None:
    def open_uri(uri: str) -> Any:
        raise error

    monkeypatch.setattr("meddam_core.storage.open_uri", open_uri)
    item = _item(data=None, uri="s3://bucket/a.png")
    if reason is None:
        with pytest.raises(OSError, match=r"Error|error"):
            _rows(item)
    else:
        _, rejected = _rows(item)
        assert [r.reason for r in rejected] == [reason]
