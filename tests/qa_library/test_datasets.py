"""The labels that the dataset adapters write are the ones that the templates read."""

from __future__ import annotations

from collections import Counter

from meddam_core.datasets.lidc_labels import NAMES
from meddam_core.datasets.vindr_findings import LOCAL, MIDLINE
from meddam_core.records import Label, Window
from qa_library import build_questions, load_library
from qa_library.truth import truth_of
from tests.qa_library.rows import image

LIBRARY = load_library()


def test_every_vindr_finding_is_read_in_both_of_the_forms_it_comes_in() -> None:
    template_set = LIBRARY.sets["vindr_cxr"]
    for name in LOCAL:
        labels = [Label(name="finding", value=name, trust=2 / 3), Label(name=name, value="present", trust=2 / 3)]
        truth = truth_of(template_set, labels)
        assert len(truth.present("finding")) == 1, name
        assert not truth.dropped, name
    for name in MIDLINE:
        (fact,) = truth_of(template_set, [Label(name=name, value="present")]).present()
        assert fact.value.no_side, name


def test_one_reader_of_three_decides_nothing() -> None:
    labels = [Label(name="finding", value="Edema", trust=1 / 3), Label(name="Edema", value="undecided", trust=1 / 3)]
    truth = truth_of(LIBRARY.sets["vindr_cxr"], labels)
    assert truth.state("finding", "edema") == "undecided"


def test_every_grade_of_lidc_is_read() -> None:
    template_set = LIBRARY.sets["lidc_idri"]
    for name, values in NAMES.items():
        for value in values:
            truth = truth_of(template_set, [Label(name=name, value=value, trust=1.0)])
            assert not truth.dropped, (name, value)
            assert all(f.state != "undecided" for f in truth.facts.values()), (name, value)
    for name in ("margin", "texture", "sphericity", "lobulation", "spiculation"):
        for grade in ("1", "5"):
            assert truth_of(template_set, [Label(name=name, value=grade)]).facts, (name, grade)
    labels = {
        "finding": "nodule",
        "subtlety": "4",
        "malignancy": "3",
        "mean_diameter_mm": "8",
        "longest_diameter_mm": "9",
    }
    window = Window(center=0, width=1)
    row = image(
        "lidc-idri", [((0, 0, 9, 9), {**labels, "texture": "5"})], modality="CT", recipe="lidc-idri", window=window
    )
    table = build_questions([row])
    assert {reason for (reason, _), count in table.dropped.items() if count} <= {"excluded", "no_scale", "limit"}


def test_what_is_expected_of_a_typical_film() -> None:
    absent = {name: "absent" for name in LOCAL if name not in ("Pleural effusion", "Cardiomegaly")}
    effusion = {"finding": "Pleural effusion", "Pleural effusion": "present", "side": "right", "zone": "lower"}
    heart = {"finding": "Cardiomegaly", "Cardiomegaly": "present"}
    regions = [((100, 600, 300, 900), {**absent, **effusion}), ((420, 500, 760, 900), {**absent, **heart})]
    table = build_questions([image("vindr-cxr", regions)])
    counts = Counter((q.region_id & 15, q.polarity) for q in table.questions)
    assert [counts[0, p] for p in ("recognition", "positive", "negative")] == [1, 3, 3]
    assert [counts[1, p] for p in ("recognition", "positive", "negative")] == [1, 1, 1]
    elsewhere = {(q.region_id & 15, q.value) for q in table.questions if q.source == "elsewhere"}
    assert elsewhere == {(0, "cardiomegaly"), (1, "pleural_effusion")}
