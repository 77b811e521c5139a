"""Lungs are found where they are, lesions lie inside them in HU, and labels say what is true of the real patient."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from meddam_core.datasets.phantoms import Options, ct
from meddam_core.datasets.phantoms.inserted import InsertedPhantoms
from meddam_core.datasets.phantoms.lungs import find_lungs
from meddam_core.datasets.phantoms.texture import coordinates
from meddam_core.imaging.decode import decode
from meddam_core.records import Image
from meddam_core.regions.masks import mask_of
from meddam_core.training.texts import Texts
from tests.meddam_core.datasets.made_dicom import ct_slice
from tests.meddam_core.datasets.run_source import rows_from, said

SIDE, SPACING = 384, 0.9
SUPINE = (1, 0, 0, 0, 1, 0)
SOLID = Options(only=("form=whole&density=solid&texture=homogeneous&margin=smooth",), max_lesions=2)


def chest_slice(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """((H, W) HU of an empty chest, (H, W) bool where its lungs are)."""
    rng = np.random.default_rng(seed)
    drawn = ct.draw_slice(rng, 2 * SIDE)
    hu = cv2.resize(ct.background(rng, drawn), (SIDE, SIDE), interpolation=cv2.INTER_AREA)
    x, y = coordinates(SIDE)
    return hu + rng.normal(0, 15, hu.shape), (drawn.lung(x, y, -1) > 0) | (drawn.lung(x, y, 1) > 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Slices of three patients, one that shows no lung, and a text file."""
    made = tmp_path_factory.mktemp("ct")
    for number, patient in enumerate(("MRN-77001", "MRN-77001", "MRN-77002", "MRN-77003")):
        hu, _ = chest_slice(number)
        if patient == "MRN-77003":
            hu = np.full_like(hu, 40.0)
        (made / patient).mkdir(exist_ok=True)
        (made / patient / f"{number}.dcm").write_bytes(ct_slice(
            hu.astype(np.int16), patient_id=patient, study_uid=f"1.2.{number}", series_uid=f"1.3.{number}",
            z_mm=2.0 * number, number=number, spacing_mm=SPACING, cosines=SUPINE,
        ))  # fmt: skip
    (made / "notes.txt").write_text("no slice")
    return made


@pytest.fixture(scope="module")
def rows(folder: Path) -> list[Image]:
    images, rejected = rows_from(InsertedPhantoms(path=str(folder), options=SOLID, held_out=0.5))
    assert [(r.reason.value, r.detail) for r in rejected] == [("excluded", "no lungs were found on the slice")]
    return images


def test_lungs_are_where_they_are() -> None:
    hu, truth_HW = chest_slice()
    lungs = find_lungs(hu, (SPACING, SPACING), "L\\P")
    both = (lungs.mask_HW & truth_HW).sum()
    assert both / lungs.mask_HW.sum() > 0.97 and both / truth_HW.sum() > 0.78  # the trunks of vessels are left out
    assert lungs.side(SIDE * 0.25) == "right" and lungs.side(SIDE * 0.75) == "left"
    assert [lungs.zone(y) for y in (lungs.box[1] + 5, SIDE / 2, lungs.box[3] - 5)] == [
        "anterior", "middle", "posterior"
    ]  # fmt: skip
    prone = find_lungs(hu[::-1], (SPACING, SPACING), "L\\A")
    assert prone.zone(prone.box[1] + 5) == "posterior"
    assert find_lungs(hu[:, ::-1], (SPACING, SPACING), "R\\P").side(SIDE * 0.25) == "left"


def test_slices_without_two_lungs_are_refused() -> None:
    hu, _ = chest_slice()
    with pytest.raises(ValueError, match="not axial"):
        find_lungs(hu, (SPACING, SPACING), "A\\F")
    hu[:, SIDE // 2 :] = np.where(hu[:, SIDE // 2 :] < -400, 40, hu[:, SIDE // 2 :])
    with pytest.raises(ValueError, match="one lung only"):
        find_lungs(hu, (SPACING, SPACING), "L\\P")


def test_lesions_lie_in_the_lungs_with_their_density(folder: Path, rows: list[Image]) -> None:
    assert len(rows) == 3
    for number, image in enumerate(rows):
        file = next(folder.rglob(f"{number}.dcm"))
        before = decode(file.read_bytes(), name="")
        _, truth_HW = chest_slice(number)
        after_HW = decode(image.image.bytes, name="x.png").stored if image.image.bytes else None
        assert after_HW is not None and after_HW.shape == (2 * SIDE, 2 * SIDE)
        assert image.pixel_spacing_mm == pytest.approx([SPACING / 2, SPACING / 2])
        assert image.rescale is not None
        small_HW = cv2.resize(after_HW.astype(np.float32), (SIDE, SIDE), interpolation=cv2.INTER_AREA)
        touched_HW = np.zeros((SIDE, SIDE), bool)
        for index, region in enumerate(image.regions):
            mask_HW = mask_of(region.mask) > 0
            assert min(np.ptp(np.nonzero(mask_HW), axis=1)) >= 46
            small_mask_HW = cv2.resize(mask_HW.astype(np.uint8), (SIDE, SIDE), interpolation=cv2.INTER_AREA) > 0
            assert truth_HW[small_mask_HW].mean() > 0.93
            touched_HW |= cv2.dilate(small_mask_HW.astype(np.uint8), np.ones((15, 15), np.uint8)) > 0
            labels = said(image, index)
            if labels["kind"] == "lesion":
                hu = after_HW[cv2.erode(mask_HW.astype(np.uint8), np.ones((9, 9), np.uint8)) > 0]
                physical = hu * image.rescale.slope + image.rescale.intercept
                assert float(physical.mean()) == pytest.approx(ct.SOFT_HU, abs=12)
                assert 5 < float(physical.std()) < 40  # the scanner's noise goes on in it
                centre = np.nonzero(mask_HW)[1].mean()
                assert labels["side"] == ("right" if centre < SIDE else "left")
        assert touched_HW.any()
        assert np.abs(small_HW - before.stored.astype(np.float32))[~touched_HW].mean() < 6


def test_patients_are_held_out_as_a_whole_and_named_nowhere(folder: Path, rows: list[Image]) -> None:
    assert rows[0].split == rows[1].split and rows[0].patient_key == rows[1].patient_key != rows[2].patient_key
    source = InsertedPhantoms(path=str(folder), held_out=0.3)
    splits = [source.split_of(f"P{i}") for i in range(400)]
    assert set(splits) == {"train", "test"} and 0.2 < splits.count("test") / 400 < 0.4
    assert "MRN-7700" not in repr(rows) and "Planted" not in repr(rows)
    assert {(r.licence, r.egress) for r in rows} == {("unknown", "deny")}


def test_only_what_holds_in_a_real_slice_is_said(folder: Path, rows: list[Image]) -> None:
    labels = [said(image, i) for image in rows for i in range(len(image.regions))]
    assert {found["kind"] for found in labels} <= {"lesion", "distractor"}
    assert not any({"number", "neighbour"} & set(found) for found in labels)
    vouched, _ = rows_from(InsertedPhantoms(path=str(folder / "MRN-77001"), lesion_free=True, variants=2))
    found = [said(image, i) for image in vouched for i in range(len(image.regions))]
    assert len(vouched) == 4 and {"normal"} <= {f["kind"] for f in found} and all("number" in f for f in found)
    texts, rng = Texts.of(("meddam-v1",), "truth"), np.random.default_rng(0)
    from meddam_core.training.examples import Example

    views = np.zeros((8, 2, 2), np.uint8)
    for made in labels:
        example = Example(region_id=0, image_id=0, split="all", modality="CT", labels=made, views_8SS=views)
        assert "lung" in texts.choose(example, rng)[1]


def test_a_pattern_names_some_of_the_files(folder: Path) -> None:
    source = InsertedPhantoms(path=f"{folder}/*/[01].dcm")
    assert [item.key for item in source.items()] == ["MRN-77001/0.dcm#0", "MRN-77001/1.dcm#0"]
    other = replace(source, path=f"{folder}/*/0.dcm")
    assert other.fingerprint() != source.fingerprint()
    with pytest.raises(ValueError, match="names no CT slice"):
        list(replace(source, path=f"{folder}/*.txt").items())
