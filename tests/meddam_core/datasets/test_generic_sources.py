"""SEG, RTSTRUCT, NIfTI label maps, folders of masks and WebDataset tars, from files made here in their real formats."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image as PilImage

from meddam_core.datasets.dicom_regions import DicomRegions, safe_name
from meddam_core.datasets.mask_folder import MaskFolder
from meddam_core.datasets.nifti_labels import NiftiLabels
from meddam_core.datasets.webdataset import WebDataset
from meddam_core.imaging.dicom_header import Header
from meddam_core.imaging.render import render
from meddam_core.records import Image, Reason, to_row
from meddam_core.regions.contours import mask_of_contours
from meddam_core.regions.masks import mask_of
from tests.meddam_core.datasets import miniatures
from tests.meddam_core.datasets.miniatures import disc
from tests.meddam_core.datasets.run_source import rows_from, said

SIZE = (64, 48)


def _mask(image: Image, region: int = 0) -> NDArray[np.uint8]:
    rle = image.regions[region].mask
    assert rle is not None
    return mask_of(rle)


def _square(x0: float, y0: float, x1: float, y1: float) -> NDArray[np.float64]:
    return np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)])


def _sources(tmp_path: Path, kind: str, **settings: str) -> DicomRegions:
    return DicomRegions(path=str(tmp_path / "objects"), images=str(tmp_path / "ct"), kind=kind, **settings)  # type: ignore[arg-type]


def test_segments_lie_on_the_images_they_name(tmp_path: Path) -> None:
    series = miniatures.ct_series(tmp_path / "ct")
    masks = [disc(SIZE, (20 + f, 20), 3 + f // 2 * (1 if f % 2 else -1) * 0.5) for f in range(10)]
    miniatures.seg_object(tmp_path / "objects/seg.dcm", series, masks, ["Liver", "Mustermann lesion"])
    (tmp_path / "objects/readme.txt").write_text("not DICOM")
    images, rejected = rows_from(_sources(tmp_path, "SEG", slices="all"))
    assert not rejected and len(images) == 5 and all(len(i.regions) == 2 for i in images)
    for z, ds in enumerate(series):
        image = next(i for i in images if np.array_equal(_mask(i), masks[2 * z]))
        stored = np.asarray(PilImage.open(io.BytesIO(image.image.bytes or b"")))
        assert np.array_equal(stored, np.frombuffer(ds.PixelData, np.uint16).reshape(48, 64)), (
            "the mask is on its slice"
        )
        assert np.array_equal(_mask(image, 1), masks[2 * z + 1])
        assert said(image, 0)["finding"] == "Liver" and said(image, 1)["finding"] == "segment 2"  # it named the patient
        assert image.pixel_spacing_mm == [1.5, 0.5] and image.recipe == "ct"
    assert len({i.patient_key for i in images}) == 1 and images[0].patient_key
    text = str([to_row(i) for i in images])
    assert not [w for w in miniatures.planted() if w.lower() in text.lower()]


def test_of_each_segment_the_largest_slice_by_default(tmp_path: Path) -> None:
    series = miniatures.ct_series(tmp_path / "ct")
    masks = [disc(SIZE, (20, 20), r) for r in (3, 5, 8, 4, 0)]
    masks[4][:] = 0
    miniatures.seg_object(tmp_path / "objects/seg.dcm", series, masks, ["Liver"])
    images, _ = rows_from(_sources(tmp_path, "SEG"))
    assert len(images) == 1 and np.array_equal(_mask(images[0]), masks[2])


def test_segments_without_references_are_placed_and_misplaced_ones_refused(tmp_path: Path) -> None:
    series = miniatures.ct_series(tmp_path / "ct")
    masks = [disc(SIZE, (20, 20), 5)] * 5
    miniatures.seg_object(tmp_path / "objects/seg.dcm", series, masks, ["Liver"], references=False)
    images, rejected = rows_from(_sources(tmp_path, "SEG", slices="all"))
    assert len(images) == 5 and not rejected
    miniatures.seg_object(tmp_path / "objects/seg.dcm", series, masks, ["Liver"], position=[-20.0, -27.0, 0.0])
    images, rejected = rows_from(_sources(tmp_path, "SEG", slices="all"))
    assert not images and {r.reason for r in rejected} == {Reason.BAD_ANNOTATION}
    for file in (tmp_path / "ct").glob("*-3.dcm"):
        file.unlink()
    miniatures.seg_object(tmp_path / "objects/seg.dcm", series, masks, ["Liver"])
    images, rejected = rows_from(_sources(tmp_path, "SEG", slices="all"))
    assert len(images) == 4 and [r.reason for r in rejected] == [Reason.NOT_FOUND]
    small = [disc((32, 48), (20, 20), 5)] * 5
    miniatures.seg_object(tmp_path / "objects/seg.dcm", series, small, ["Liver"])
    _, rejected = rows_from(_sources(tmp_path, "SEG", slices="all"))
    assert {r.reason for r in rejected} == {Reason.MASK_SIZE, Reason.NOT_FOUND}


@pytest.mark.parametrize("references", [True, False])
def test_contours_become_masks_on_their_slice(tmp_path: Path, references: bool) -> None:
    series = miniatures.ct_series(tmp_path / "ct")
    outer, hole = _square(9.5, 9.5, 29.5, 29.5), _square(14.5, 14.5, 19.5, 19.5)
    rois = {
        "GTV": {1: [_square(0.5, 0.5, 4.5, 4.5)], 2: [outer, hole]},
        "P1234567": {3: [_square(30.2, 5.1, 40.4, 8.9)]},
    }
    miniatures.rtstruct(tmp_path / "objects/rs.dcm", series, rois, references)
    images, rejected = rows_from(_sources(tmp_path, "RTSTRUCT", slices="all"))
    assert not rejected and len(images) == 3
    expected = np.zeros((48, 64), np.uint8)
    expected[10:30, 10:30] = 1
    expected[15:20, 15:20] = 0
    (large,) = [i for i in images if i.regions[0].box == (10, 10, 30, 30)]
    assert np.array_equal(_mask(large), expected) and said(large, 0) == {"finding": "GTV", "GTV": "present"}
    (third,) = [i for i in images if said(i, 0)["finding"] == "structure 2"]  # a long number may be an id
    assert third.regions[0].box == (31, 6, 41, 9)
    largest, _ = rows_from(_sources(tmp_path, "RTSTRUCT"))
    assert sorted(i.regions[0].box for i in largest) == [(10, 10, 30, 30), (31, 6, 41, 9)]
    assert not [w for w in miniatures.planted() if w.lower() in str([to_row(i) for i in images]).lower()]


def test_pixels_are_inside_where_their_centres_are() -> None:
    rng = np.random.default_rng(0)
    for _ in range(40):
        corners = rng.uniform(-5, 25, (int(rng.integers(3, 9)), 2))
        y, x = np.mgrid[0:20, 0:20]
        inside = np.zeros((20, 20), bool)
        for (xa, ya), (xb, yb) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
            if ya == yb:
                continue
            crosses = ((ya <= y) != (yb <= y)) & (x >= xa + (y - ya) / (yb - ya) * (xb - xa))
            inside ^= crosses
        assert np.array_equal(mask_of_contours([corners], (20, 20)), inside)
    keyhole = np.concatenate([_square(2, 2, 12, 12), [(2, 2)], _square(5, 5, 8, 8), [(5, 5)]])
    apart = mask_of_contours([_square(2, 2, 12, 12), _square(5, 5, 8, 8)], (20, 20))
    assert np.array_equal(mask_of_contours([keyhole], (20, 20)), apart) and apart.sum() == 100 - 9


def test_names_that_may_tell_the_patient_are_replaced(tmp_path: Path) -> None:
    header = Header(miniatures.ct_series(tmp_path / "ct", 1)[0], 0)
    assert safe_name(" GTV  left ", header, "x") == "GTV left"
    for name in ("erika_gtv", "Mustermann", "lesion 20240131", "", None):
        assert safe_name(name, header, "x") == "x"


def test_there_must_be_something_to_work_on(tmp_path: Path) -> None:
    miniatures.ct_series(tmp_path / "ct", 1)
    (tmp_path / "objects").mkdir()
    with pytest.raises(ValueError, match="no SEG object"):
        list(_sources(tmp_path, "SEG").items())
    with pytest.raises(ValueError, match="holds no DICOM image"):
        list(DicomRegions(path=str(tmp_path), images=str(tmp_path / "objects"), kind="SEG").items())


def test_labels_of_a_volume_on_its_slices(tmp_path: Path) -> None:
    labels, volumes, names = miniatures.nifti_labels(tmp_path)
    source = NiftiLabels(path=str(labels), images=str(volumes), names=str(names), modality="CT")
    images, rejected = rows_from(source)
    assert [r.reason for r in rejected] == [Reason.NOT_FOUND] and len(images) == 1
    (image,) = images
    assert image.frame == 2 and image.modality == "CT" and image.study_key and image.orientation == "L\\P"
    assert [said(image, i)["finding"] for i in (0, 1)] == ["liver", "tumour"]
    stored = render(image, window="header")
    for region, value in ((0, 900), (1, 1500)):
        x0, y0, x1, y1 = image.regions[region].box
        pixels = np.asarray(PilImage.open(io.BytesIO(image.image.bytes or b""))).astype(int)
        physical = pixels * (image.rescale.slope if image.rescale else 1) + (
            image.rescale.intercept if image.rescale else 0
        )
        assert (physical[_mask(image, region) > 0] == value).all(), "the mask is on what it labels"
        assert (x1 - x0) * (y1 - y0) == _mask(image, region).sum()
    assert stored.shape == (30, 40, 3)
    every, _ = rows_from(NiftiLabels(path=str(labels), images=str(volumes), slices="all"))
    assert [(i.frame, len(i.regions)) for i in every] == [(1, 1), (2, 2)]
    assert said(every[0], 0)["finding"] == "label 1"
    names.write_text("[]")
    with pytest.raises(ValueError, match="no names of labels"):
        list(source.items())


def test_masks_belong_to_pictures_by_name(tmp_path: Path) -> None:
    picture, mask = np.full((40, 60, 3), 128, np.uint8), disc((60, 40), (20, 20), 8) * 255
    for name in ("a", "a_b", "c", "d", "alone"):
        miniatures.save(tmp_path / "images" / f"{name}.jpg", picture)
    for name in ("a_polyp", "a_b_segmentation", "vessel/c", "d/disc", "d/1", "d/cup"):
        miniatures.save(tmp_path / "masks" / f"{name}.png", mask)
    miniatures.save(tmp_path / "masks" / "stranger.png", mask)
    source = MaskFolder(path=str(tmp_path / "masks"), images=str(tmp_path / "images"), label="lesion")
    images, rejected = rows_from(source)
    found = [[said(i, r).get("finding") for r in range(len(i.regions))] for i in images]
    assert found == [["polyp"], ["lesion"], ["vessel"], ["lesion", "cup", "disc"]]
    assert [r.reason for r in rejected] == [Reason.NO_REGIONS]
    assert images[0].regions[0].box == (12, 12, 29, 29)


def test_masks_in_parts_and_values(tmp_path: Path) -> None:
    picture = np.full((40, 60), 128, np.uint8)
    values = disc((60, 40), (12, 12), 6) + 2 * disc((60, 40), (40, 20), 9) + disc((60, 40), (14, 33), 4)
    miniatures.save(tmp_path / "images/a.png", picture)
    miniatures.save(tmp_path / "masks/a.png", values)
    settings = {"path": str(tmp_path / "masks"), "images": str(tmp_path / "images")}
    parts, _ = rows_from(MaskFolder(**settings, regions="parts"))  # type: ignore[arg-type]
    assert [r.box for r in parts[0].regions] == [(6, 6, 19, 19), (31, 11, 50, 30), (10, 29, 19, 38)]
    by_value, _ = rows_from(MaskFolder(**settings, regions="values", names="1=spot;2=lake"))  # type: ignore[arg-type]
    assert [(said(by_value[0], i)["finding"], r.box) for i, r in enumerate(by_value[0].regions)] == [
        ("spot", (6, 6, 19, 38)), ("lake", (31, 11, 50, 30)),
    ]  # fmt: skip
    with pytest.raises(ValueError, match="1=liver"):
        MaskFolder(**settings, names="liver")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no file of"):
        list(MaskFolder(path=str(tmp_path / "nowhere"), images=settings["images"]).items())


def test_one_folder_of_pictures_and_masks(tmp_path: Path) -> None:
    for name in ("a", "a_1", "b"):
        miniatures.save(tmp_path / f"{name}.png", np.full((20, 30, 3), 99, np.uint8))
        miniatures.save(tmp_path / f"{name}_mask.png", disc((30, 20), (9, 9), 5))
    images, rejected = rows_from(MaskFolder(path=str(tmp_path), images=str(tmp_path)))
    assert len(images) == 3 and not rejected and all(len(i.regions) == 1 for i in images)


@pytest.mark.parametrize(("name", "mode"), [("set.tar", "w"), ("set.tar.gz", "w:gz")])
def test_samples_of_a_tar(tmp_path: Path, name: str, mode: str) -> None:
    miniatures.webdataset(tmp_path / "tars" / name, mode)
    images, rejected = rows_from(WebDataset(path=str(tmp_path / "tars")))
    compressed = mode == "w:gz"
    reasons = [r.reason for r in rejected]
    assert reasons == [Reason.BAD_ANNOTATION] * (1 + compressed) + [Reason.NOT_AN_IMAGE]
    assert len(images) == 3 - compressed
    first, last = images[0], images[-1]
    assert first.split == "test" and first.patient_key and first.regions[0].box == (5, 5, 30, 30)
    assert said(first, 0) == {"finding": "polyp"}
    assert not last.regions and [label.name for label in last.labels] == ["3"]
    if not compressed:
        assert np.array_equal(_mask(images[1]), disc((60, 40), (20, 20), 8)) and said(images[1], 0) == {
            "adenoma": "present"
        }
        one, _ = rows_from(WebDataset(path=str(tmp_path / "tars" / name), split="dev"))
        assert len(one) == 3 and {i.split for i in one} == {"dev"}


def test_a_broken_tar_is_a_reject_and_the_others_go_on(tmp_path: Path) -> None:
    whole = miniatures.webdataset(tmp_path / "b.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(whole[:700])
    (tmp_path / "c.tar").write_bytes(b"nonsense" * 100)
    images, rejected = rows_from(WebDataset(path=str(tmp_path)))
    assert len(images) >= 3 and sum(r.reason is Reason.CORRUPT for r in rejected) >= 1
