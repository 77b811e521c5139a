"""Fundus photographs, nuclei and whole slides, from miniature copies in the real layouts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from meddam_core.datasets.idrid import Idrid
from meddam_core.datasets.nuclei import nuclei_of, nuclei_regions
from meddam_core.datasets.nuinsseg import NuInsSeg
from meddam_core.datasets.pannuke import PanNuke
from meddam_core.imaging.render import render
from meddam_core.records import Reason
from meddam_core.regions.components import components
from meddam_core.regions.masks import mask_of
from tests.meddam_core.datasets import miniatures
from tests.meddam_core.datasets.run_source import rows_from, said


def test_idrid_gives_a_region_for_each_lesion_and_knows_what_is_absent(tmp_path: Path) -> None:
    images, rejected = rows_from(Idrid(path=str(miniatures.idrid(tmp_path))))
    assert [i.split for i in images] == ["train", "train", "test"] and {i.modality for i in images} == {"OP"}
    assert [r.reason for r in rejected] == [Reason.EXCLUDED]
    first, second, _ = images
    assert [said(first, i)["finding"] for i in range(len(first.regions))] == [
        "hard exudates", "haemorrhages", "haemorrhages", "microaneurysms", "optic disc",
    ]  # fmt: skip
    haemorrhage = next(
        i for i, r in enumerate(first.regions) if r.box[0] > 100 and said(first, i)["finding"] == "haemorrhages"
    )
    assert first.regions[haemorrhage].box == (141, 111, 160, 130)
    states = said(first, haemorrhage)
    assert states["Haemorrhages"] == "present" and states["Hard Exudates"] == "present"  # it reaches into the box
    assert states["Soft Exudates"] == states["Optic Disc"] == "absent" or states["Optic Disc"] == "undecided"
    assert states["Microaneurysms"] == "absent"
    below = next(i for i, r in enumerate(first.regions) if r.box[1] > 135)
    assert said(first, below)["Hard Exudates"] == "absent"
    mask = first.regions[below].mask
    assert mask is not None and mask_of(mask).sum() == miniatures.disc((240, 180), (60, 150), 8).sum()
    assert {said(second, i)["finding"] for i in range(len(second.regions))} == {"microaneurysms", "optic disc"}
    assert said(second, 0)["Haemorrhages"] == "absent"
    graded, _ = rows_from(Idrid(path=str(tmp_path), graded=True, disc=False))
    assert len(graded) == 4 and not graded[-1].regions
    assert [(label.name, label.value) for label in graded[-1].labels] == [
        ("retinopathy_grade", "3"), ("macular_edema_risk", "2"),
    ]  # fmt: skip
    with pytest.raises(ValueError, match="no mask named like"):
        list(Idrid(path=str(tmp_path / "B. Disease Grading")).items())


def test_parts_of_a_mask_are_joined_over_small_gaps() -> None:
    mask = np.zeros((40, 60), np.uint8)
    mask[5:10, 5:10] = mask[5:10, 13:18] = mask[30:32, 50:52] = 1
    assert [c.box for c in components(mask)] == [(5, 5, 10, 10), (13, 5, 18, 10), (50, 30, 52, 32)]
    joined = components(mask, min_area_px=5, join_px=6)
    assert [c.box for c in joined] == [(5, 5, 18, 10)] and joined[0].area_px == 50
    assert np.array_equal(joined[0].full((60, 40))[:, :20], mask[:, :20])


def test_pannuke_gives_nests_of_nuclei(tmp_path: Path) -> None:
    images, rejected = rows_from(PanNuke(path=str(miniatures.pannuke(tmp_path))))
    assert [i.split for i in images] == ["fold1", "fold1", "fold2", "fold2"]
    assert [r.reason for r in rejected] == [Reason.NO_REGIONS] * 2
    first = images[0]
    assert np.array_equal(render(first), miniatures.nuclei_patch(10)[0])
    assert len(first.regions) == 1  # seven neoplastic nuclei; the inflammatory ones are too few, or too far apart
    labels = said(first, 0)
    assert labels["cell_type"] == "neoplastic" and labels["tissue"] == "Breast" and labels["nuclei_density"] == "high"
    assert first.regions[0].box == (10, 10, 45, 45) and first.pixel_spacing_mm == [0.00025, 0.00025]
    whole, _ = rows_from(PanNuke(path=str(tmp_path), unit="patch"))
    assert whole[0].regions[0].box == (0, 0, 96, 96) and said(whole[0], 0)["num_nuclei"] == "11"
    (tmp_path / "Fold 1/masks/fold1/masks.npy").unlink()
    with pytest.raises(ValueError, match="fold1 lacks"):
        list(PanNuke(path=str(tmp_path)).items())


def test_a_majority_is_more_than_60_percent() -> None:
    _, instances = miniatures.nuclei_patch(0)
    for share, expected in ((9, "a"), (6, "undecided")):
        layers = [("a", np.where(instances <= share, instances, 0)), ("b", np.where(instances > share, instances, 0))]
        (region, *_) = nuclei_regions(nuclei_of(layers, 96, 96), unit="patch")
        assert region.labels[0].value == expected, share


def test_nuinsseg(tmp_path: Path) -> None:
    images, rejected = rows_from(NuInsSeg(path=str(miniatures.nuinsseg(tmp_path))))
    assert [r.reason for r in rejected] == [Reason.NOT_FOUND]
    assert [said(i, 0)["tissue"] for i in images] == ["bladder", "spleen"]
    assert "cell_type" not in said(images[0], 0) and said(images[0], 0)["num_nuclei"] == "9"
    with pytest.raises(ValueError, match="holds no ORGAN"):
        list(NuInsSeg(path=str(tmp_path), images="pictures").items())


def test_slides_are_cut_where_there_is_tissue(tmp_path: Path) -> None:
    pytest.importorskip("openslide")
    from meddam_core.datasets.slides import Slides

    slide = np.full((1024, 1536, 3), 244, np.uint8)
    rng = np.random.default_rng(0)
    slide[256:768, 512:1024] = np.clip(np.array((190, 90, 160)) + rng.normal(0, 12, (512, 512, 1)), 0, 255).astype(
        np.uint8
    )
    miniatures.tiled_tiff(tmp_path / "a.tif", slide)
    (tmp_path / "b.svs").write_bytes(b"no slide")
    images, rejected = rows_from(Slides(path=str(tmp_path), tile_px=128, mpp=0.5, context=0.5))
    assert [r.reason for r in rejected] == [Reason.NOT_AN_IMAGE]
    assert len(images) == 4 and {i.modality for i in images} == {"SM"}  # 256 pixels a tile of the slide: 2 x 2 of them
    assert images[0].pixel_spacing_mm == [0.0005, 0.0005] and (images[0].width, images[0].height) == (256, 256)
    for image in images:
        (region,) = image.regions
        assert region.box == (64, 64, 192, 192)
        inner = render(image)[64:192, 64:192].astype(int)
        assert abs(inner[..., 1].mean() - 90) < 4, "regions are tissue"
    assert render(images[0])[:32].min() > 235, "its surroundings are glass"
    assert len({i.study_key for i in images}) == 1
