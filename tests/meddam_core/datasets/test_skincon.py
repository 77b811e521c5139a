"""SkinCon: concepts, exclusions, skin type, pictures as they were seen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from meddam_core.captioner import RegionPreparer, ViewRules
from meddam_core.datasets.phantoms import Options, make_phantom
from meddam_core.datasets.skincon import SKIN_TYPE, SkinCon, concepts
from meddam_core.imaging.render import render
from meddam_core.records import Reason
from qa_library import load_library
from tests.meddam_core.datasets import miniatures
from tests.meddam_core.datasets.run_source import rows_from


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("skincon")
    miniatures.skincon(folder)
    return folder


def _source(folder: Path, **settings: Any) -> SkinCon:
    given: dict[str, Any] = {
        "annotations": str(folder / "annotations_fitzpatrick17k.csv"), "images": str(folder / "images"),
        "fitzpatrick": str(folder / "fitzpatrick17k.csv"),
    }  # fmt: skip
    return SkinCon(**(given | settings))


def test_the_48_concepts_are_those_that_questions_are_asked_about() -> None:
    assert len(concepts()) == len(set(concepts())) == 48
    assert {"Brown(Hyperpigmentation)", "Purpura/Petechiae", "Flat topped"} <= set(concepts())
    template_set = load_library().find("skincon")
    assert template_set is not None
    asked = {label for a in template_set.attributes for v in a.values for label in v.labels}
    assert set(concepts()) <= asked


def test_images_labels_and_what_is_left_out(folder: Path) -> None:
    images, rejected = rows_from(_source(folder))
    assert len(images) == 6
    assert [(r.item, r.reason) for r in rejected] == [(2, Reason.EXCLUDED), (5, Reason.NOT_FOUND)]
    first = images[0]
    assert not first.regions and first.recipe == "skincon" and first.modality == "XC"
    labels = {label.name: label.value for label in first.labels}
    assert [c for c in concepts() if labels[c] == "present"] == [c for j, c in enumerate(concepts()) if j % 7 == 0]
    assert set(labels.values()) == {"present", "absent", "1"} and labels[SKIN_TYPE] == "1"
    assert [{label.name: label.value for label in i.labels}.get(SKIN_TYPE) for i in images] == [
        "1",
        "2",
        "4",
        None,
        "1",
        "2",
    ]
    _, dropped = rows_from(_source(folder, drop_wrongly_labelled=True))
    assert [(r.item, r.reason) for r in dropped if r.reason is Reason.EXCLUDED] == [(2, "excluded"), (3, "excluded")]


def test_pictures_come_upright_and_as_coloured_as_they_were(folder: Path) -> None:
    images, _ = rows_from(_source(folder))
    for row, index in ((0, 0), (1, 1), (4, 6)):  # plain, rotated by EXIF, PNG under a name that the table calls .jpg
        truth = make_phantom("skin", 5, index, Options(size=512, max_lesions=1)).stored
        assert np.abs(render(images[row]).astype(int) - truth).mean() < 3


def test_regions_are_found_when_captions_are_made_and_take_the_labels_over(folder: Path) -> None:
    images, _ = rows_from(_source(folder))
    preparer = RegionPreparer(ViewRules(size=64))
    for image in images:
        prepared = preparer.prepare(image)
        assert 1 <= len(prepared) <= 5
        for ordinal, entry in enumerate(prepared):
            assert entry.views_N8SS is not None and entry.region.source == "detected"
            assert entry.region.region_id == image.image_id << 4 | ordinal
            assert entry.region.confidence is not None and 0 < entry.region.confidence <= 1
            assert entry.region.labels[:-1] == image.labels
            assert (entry.region.labels[-1].name, len(entry.region.labels)) == ("roi", len(image.labels) + 1)
    assert {p.region.labels[-1].value for i in images for p in preparer.prepare(i)} <= {"lesion", "central", "whole"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fitzpatrick": None, "drop_wrongly_labelled": True}, "give --fitzpatrick"),
        ({"annotations": "none.csv"}, "SkinCon's concept table is not at"),
        ({"fitzpatrick": "none.csv"}, "Fitzpatrick17k's table is not at"),
    ],
)
def test_what_cannot_work_is_said(folder: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(_source(folder, **settings).items())
    with pytest.raises(ValueError, match="no column 'Vesicle'"):
        list(_source(folder, annotations=str(folder / "fitzpatrick17k.csv")).items())
