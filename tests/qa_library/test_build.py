"""From labelled regions to questions."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from meddam_core.records import Image, Window
from qa_library import Settings, build_questions, from_table, load_library, to_table
from qa_library.questions import QUESTION_SCHEMA, Question
from tests.qa_library.rows import image

LUNG = Window(center=-600, width=1500)
SOFT = Window(center=40, width=350)
FINDINGS = [v for v in load_library().sets["vindr_cxr"].attribute("finding").values if v.ask]
ABSENT = {v.labels[0]: "absent" for v in FINDINGS}
NODULE = {
    "texture": "5.0",
    "margin": "4.5",
    "spiculation": "1.0",
    "lobulation": "2.0",
    "sphericity": "5",
    "side": "left",
}


def film(*regions: dict[str, str], boxes: list[tuple[int, int, int, int]] | None = None) -> Image:
    boxes = boxes or [(10 + 200 * i, 10, 100 + 200 * i, 100) for i in range(len(regions))]
    return image("vindr-cxr", [(b, {**ABSENT, **r}) for b, r in zip(boxes, regions, strict=True)])


def asked(questions: list[Question], polarity: str) -> list[tuple[str, str]]:
    return [(q.attribute, q.value) for q in questions if q.polarity == polarity]


def test_a_film_region_gets_recognition_positives_and_matched_negatives() -> None:
    table = build_questions([film({"Pleural effusion": "present", "side": "left", "zone": "lower"})])
    questions = table.questions
    assert asked(questions, "recognition") == [("finding", "pleural_effusion")]
    assert asked(questions, "positive")[0] == ("finding", "pleural_effusion")
    assert sorted(asked(questions, "positive")) == [
        ("finding", "pleural_effusion"),
        ("side", "left"),
        ("zone", "lower"),
    ]
    negatives = [q for q in questions if q.polarity == "negative"]
    assert len(negatives) == 3
    assert {q.attribute: q.source for q in negatives} == {
        "finding": "confuser",
        "side": "opposite_side",
        "zone": "wrong_value",
    }
    by_attribute = {q.attribute: q for q in negatives}
    assert by_attribute["side"].value == "right"
    assert by_attribute["side"].strict_expected == ("otherwise",)
    assert set(by_attribute["finding"].strict_expected) == {"otherwise", "not_mentioned"}
    assert all(set(q.expected) <= set(q.option_ids) for q in questions)


def test_the_wording_does_not_tell_what_is_expected() -> None:
    effusion = build_questions([film({"Pleural effusion": "present"})]).questions
    thickening = [build_questions([film({"Pleural thickening": "present"})], seed=s).questions for s in range(6)]
    positive = next(q for q in effusion if q.polarity == "positive")
    negative = next(q for qs in thickening for q in qs if q.polarity == "negative" and q.value == "pleural_effusion")
    assert {o.id: o.text for o in positive.options} == {o.id: o.text for o in negative.options}
    for question in [*effusion, *thickening[0]]:
        assert not any(w in question.text.lower() for w in ("wrong", "incorrect", "correct", "halluc"))


def test_undecided_truth_is_never_asked_and_counted() -> None:
    labels = {"Pleural effusion": "present", "Pleural thickening": "undecided", "Atelectasis": "undecided"}
    for seed in range(10):
        table = build_questions([film(labels)], seed=seed)
        assert not {v for _, v in asked(table.questions, "negative")} & {"pleural_thickening", "atelectasis"}
        assert table.dropped["undecided", "finding"] == 2


@pytest.mark.parametrize("polarity", ["present", "absent"])
def test_the_trust_threshold_is_the_same_for_both_polarities(polarity: str) -> None:
    other = "absent" if polarity == "present" else "present"
    labels = {"Pneumothorax": polarity, "Emphysema": other}
    trusted = image("vindr-cxr", [((0, 0, 9, 9), labels)], trust=0.5)
    doubted = image("vindr-cxr", [((0, 0, 9, 9), labels)], trust=0.49)
    assert len(build_questions([trusted]).questions) == 3
    table = build_questions([doubted])
    assert table.questions == []
    assert table.dropped["low_trust", "finding"] == 2


def test_what_holds_another_finding_is_never_its_negative() -> None:
    for seed in range(20):
        for finding in ("Consolidation", "Infiltration", "ILD", "Pulmonary fibrosis", "Edema", "Nodule/Mass"):
            other = film({finding: "present"}, {"Lung Opacity": "present"})
            questions = build_questions([other], seed=seed).questions
            first = [q for q in questions if q.region_id == other.regions[0].region_id]
            assert "lung_opacity" not in {v for _, v in asked(first, "negative")}
        opacity = build_questions([film({"Lung Opacity": "present"})], seed=seed).questions
        assert not {v for _, v in asked(opacity, "negative")} & {"consolidation", "infiltration", "ild", "edema"}


def test_a_finding_truly_elsewhere_is_asked_unless_the_boxes_meet() -> None:
    labels = ({"Cardiomegaly": "present", "Pneumothorax": "present"}, {"Cardiomegaly": "present"})
    for first, second in ((labels[0], labels[1]), (labels[1], labels[0])):
        pair = film({**first}, {**second})
        for region in pair.regions:  # what another region has is not labelled absent for the image
            if all(label.name != "Pneumothorax" or label.value != "present" for label in region.labels):
                region.labels[:] = [label for label in region.labels if label.name != "Pneumothorax"]
        apart = [q for q in build_questions([pair]).questions if q.source == "elsewhere"]
        assert [(q.value, q.polarity) for q in apart] == [("pneumothorax", "negative")]
    touching = film(
        {"Pneumothorax": "present"}, {"Cardiomegaly": "present"}, boxes=[(0, 0, 100, 100), (105, 0, 200, 100)]
    )
    assert not [q for q in build_questions([touching]).questions if q.source == "elsewhere"]


def test_midline_findings_have_no_side() -> None:
    table = build_questions([film({"Cardiomegaly": "present", "side": "left", "zone": "lower"})])
    assert {a for a, _ in asked(table.questions, "positive")} == {"finding"}
    assert table.dropped["no_side", "side"] == 1


def test_graded_attributes_are_one_exclusive_choice() -> None:
    table = build_questions(
        [image("lidc-idri", [((5, 5, 15, 15), NODULE)], modality="CT", window=LUNG)], settings=Settings(max_positives=9)
    )
    choices = {q.attribute: q for q in table.questions if q.kind == "choice"}
    assert {a: q.expected for a, q in choices.items()} == {
        "texture": ("solid",), "margin": ("sharp",), "shape": ("round",), "side": ("left",)
    }  # fmt: skip
    assert set(choices["texture"].option_ids) == {"solid", "part_solid", "ground_glass", "otherwise", "not_mentioned"}
    negatives = {(q.attribute, q.value): q for q in table.questions if q.polarity == "negative"}
    assert all(q.strict_expected == ("otherwise",) for q in negatives.values())


@pytest.mark.parametrize(
    ("attribute", "grade", "state"),
    [("margin", "4.0", "positive"), ("margin", "2.0", "positive"), ("margin", "3.0", None), ("margin", "3.5", None),
     ("spiculation", "4", "positive"), ("spiculation", "2", "negative"), ("spiculation", "2.5", None),
     ("texture", "4", None), ("texture", "1", "positive"), ("texture", "ground-glass", "positive")],
)  # fmt: skip
def test_grades_between_the_thresholds_are_undecided(attribute: str, grade: str, state: str | None) -> None:
    row = image("lidc-idri", [((5, 5, 15, 15), {attribute: grade})], modality="CT", window=LUNG)
    table = build_questions([row])
    polarities = {q.polarity for q in table.questions if q.attribute == attribute}
    assert (state in polarities) if state else not table.questions
    assert bool(table.dropped[("undecided", attribute)]) == (state is None)


@pytest.mark.parametrize(
    ("window", "recipe", "calcification", "texture"),
    [(LUNG, "generic", False, True), (SOFT, "generic", True, False), (None, "generic", False, False),
     (SOFT, "lidc-idri", False, True), (None, "lidc-idri-three-window", True, True)],
)  # fmt: skip
def test_only_what_the_rendering_shows_is_asked(
    window: Window | None, recipe: str, calcification: bool, texture: bool
) -> None:
    row = image(
        "lidc-idri",
        [((5, 5, 15, 15), {"calcification": "6", "texture": "1"})],
        modality="CT",
        window=window,
        recipe=recipe,
    )
    table = build_questions([row])
    attributes = {q.attribute for s in range(8) for q in build_questions([row], seed=s).questions}
    assert ("calcification" in attributes, "texture" in attributes) == (calcification, texture)
    assert table.dropped["not_shown", "calcification"] == (not calcification)


def test_sizes_are_asked_only_of_captioners_that_were_given_a_scale() -> None:
    row = image("lidc-idri", [((5, 5, 15, 15), {"diameter_mm": "9.2"})], modality="CT", window=LUNG)
    assert build_questions([row]).dropped["no_scale", "size"] == 1
    (_, size) = build_questions([row], settings=Settings(scale_given=True)).questions
    assert size.truth == 9.2
    assert "6 to 12 mm" in size.text


def test_skin_concepts_that_differ_by_size_are_not_negatives_of_each_other() -> None:
    labels = {v.labels[0]: "0" for a in load_library().sets["skincon"].attributes for v in a.values}
    row = image("skincon", [((0, 0, 9, 9), {**labels, "Papule": "1", "Erythema": "1"})], modality="XC")
    seen = Counter(v for s in range(40) for _, v in asked(build_questions([row], seed=s).questions, "negative"))
    assert not {"plaque", "nodule", "salmon", "poikiloderma"} & set(seen)
    assert {"vesicle", "purple"} <= set(seen)


def test_a_seed_decides_and_the_order_of_rows_does_not() -> None:
    rows = [image("lidc-idri", [((5, 5, 15, 15), NODULE)], ordinal=i, modality="CT", window=LUNG) for i in range(1, 30)]
    first = {q.question_id: q for q in build_questions(rows, seed=3).questions}
    random.Random(0).shuffle(rows)
    assert {q.question_id: q for q in build_questions(rows, seed=3).questions} == first
    assert {q.question_id: q for q in build_questions(rows, seed=4).questions} != first
    assert len(first) == len(build_questions(rows, seed=3).questions)
    counts = Counter(q.region_id for q in first.values())
    assert set(counts.values()) <= {7, 8, 9}


def test_labels_without_a_template_are_counted() -> None:
    table = build_questions(
        [film({"No finding": "present", "Something": "present"}), image("unknown", [((0, 0, 1, 1), {})])]
    )
    assert table.dropped["excluded", "No finding"] == 1
    assert table.dropped["no_template", "Something"] == 1
    assert table.dropped["no_template_set", "unknown"] == 1
    assert table.dropped["no_finding", "finding"] == 1
    assert (table.questions, table.num_regions) == ([], 2)


def test_contradicting_labels_are_undecided() -> None:
    row = image("vindr-cxr", [((0, 0, 9, 9), {"Nodule/Mass": "present", "nodule_mass": "absent"})])
    table = build_questions([row])
    assert table.questions == []
    assert table.dropped["contradiction", "finding"] == 1


def test_the_table_survives_arrow() -> None:
    questions = build_questions([film({"Pleural effusion": "present", "side": "left"})]).questions
    table = to_table(questions)
    assert table.schema.equals(QUESTION_SCHEMA, check_metadata=True)
    assert from_table(table) == questions
    with pytest.raises(ValueError, match="why"):
        from_table(table.drop_columns("why"))


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="max_positives"):
        Settings(max_positives=0)
    with pytest.raises(ValueError, match="no template set 'x'"):
        build_questions([film({"Edema": "present"})], settings=Settings(template_sets={"vindr-cxr": "x"}))
