"""Captions from the truth earn full marks from the judge; the second generator keeps the rules of the first."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from meddam_core.datasets.phantoms import KINDS, make_phantom, make_second
from meddam_core.datasets.phantoms.captions import caption_of, grammars
from meddam_core.judging.lexical import LexicalJudge
from meddam_core.judging.scores import Judged, make_sheet, point
from meddam_core.regions.geometry import tight_box
from qa_library.build import Settings, questions_of_image
from qa_library.loader import load_library

MODALITIES = {"chest": "DX", "ct": "CT", "skin": "XC"}


def test_there_are_twenty_wordings_and_some_are_held_out() -> None:
    lesion = [g for g in grammars() if g.subject == "lesion"]
    assert len(lesion) >= 20 and sum(g.held_out for g in lesion) >= 4
    assert len({g.id for g in grammars()}) == len(grammars())


@pytest.mark.parametrize(("length", "held_out"), [("paragraph", False), ("sentence", False), ("paragraph", True)])
def test_captions_from_the_truth_score_full_marks(length: str, held_out: bool) -> None:
    library, rng, rows = load_library(), np.random.default_rng(0), []
    judge = LexicalJudge(library)
    for number, kind in enumerate(KINDS):
        phantom = make_phantom(kind, seed=5, index=number)
        regions = [
            SimpleNamespace(region_id=100 * number + i, box=tight_box(r.mask_HW), labels=r.labels())
            for i, r in enumerate(phantom.regions) if r.truth["kind"] == "lesion"
        ]  # fmt: skip
        image = SimpleNamespace(
            dataset="phantoms",
            modality=MODALITIES[kind],
            recipe=f"phantom-{kind}",
            window=phantom.window,
            regions=regions,
        )
        said = {
            r.region_id: caption_of({label.name: label.value for label in r.labels}, rng, length, held_out=held_out)  # type: ignore[arg-type]
            for r in regions
        }
        for question in questions_of_image(image, library, Settings()).questions:
            rows.append(Judged(question, judge.judge(question, said[question.region_id]), kind))
    assert len(rows) > 20
    assert point(make_sheet(rows, strict=True)) == 1.0


def test_captions_need_the_labels_of_a_phantom() -> None:
    with pytest.raises(ValueError, match="labels of a phantom"):
        caption_of({"margin": "smooth"}, np.random.default_rng(0))


@pytest.mark.parametrize("kind", KINDS)
def test_the_second_generator_never_clips_a_crop(kind: str) -> None:
    picture = make_second(kind, seed=1, index=2)  # type: ignore[arg-type]
    again = make_second(kind, seed=1, index=2)  # type: ignore[arg-type]
    assert np.array_equal(picture.stored, again.stored) and picture.regions
    for region in picture.regions:
        x0, y0, x1, y1 = tight_box(region.mask_HW)
        assert min(x1 - x0, y1 - y0) >= 40
        assert x0 - (x1 - x0) >= 0 and x1 + (x1 - x0) <= 1024 and y0 - (y1 - y0) >= 0 and y1 + (y1 - y0) <= 1024
        assert caption_of(region.truth, np.random.default_rng(0))
