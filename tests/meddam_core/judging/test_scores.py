"""MedDLC-score, its strict variant, and the controls that show what it measures."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest

from meddam_core.datasets.phantoms import make_phantom
from meddam_core.datasets.phantoms.phantom import Options
from meddam_core.judging.controls import (
    BLANK,
    LabelledRegion,
    caption_of,
    majority_captions,
    shuffled_captions,
    truth_captions,
)
from meddam_core.judging.lexical import LexicalJudge
from meddam_core.judging.protocol import Unscored, decided, unscored
from meddam_core.judging.scores import (
    Judged,
    by_stratum,
    common_datasets,
    compare,
    make_sheet,
    normalised,
    point,
    with_interval,
)
from meddam_core.records import EncodedImage, Image, Label, Region, Window, image_of, region_id
from qa_library import Question, build_questions, load_library, question_about
from qa_library.truth import truth_of
from tests.qa_library.rows import image

LIBRARY = load_library()
JUDGE = LexicalJudge(LIBRARY)
KINDS = {"chest": "DX", "ct": "CT", "skin": "XC"}


@cache
def phantoms() -> tuple[list[Image], list[LabelledRegion], list[Question]]:
    """Rows of 36 phantoms with their truth, and the questions about them."""
    images = []
    for i in range(36):
        kind = list(KINDS)[i % 3]
        regions = []
        for ordinal, region in enumerate(make_phantom(kind, 0, i, Options(size=512)).regions[:16]):  # type: ignore[arg-type]
            rows, columns = region.mask_HW.nonzero()
            box = (int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1)
            regions.append(Region(region_id=region_id(i, ordinal), box=box, labels=region.labels()))
        images.append(
            Image(
                image_id=i, image_key=str(i), dataset="phantoms", recipe=f"phantom-{kind}", modality=KINDS[kind],
                image=EncodedImage(), preview=EncodedImage(), width=512, height=512, regions=regions,
            )
        )  # fmt: skip
    known = [LabelledRegion(r.region_id, i.dataset, i.modality, r.labels) for i in images for r in i.regions]
    return images, known, build_questions(images, seed=1).questions


def judged(captions: dict[int, str]) -> list[Judged]:
    questions = phantoms()[2]
    return [
        Judged(q, JUDGE.judge(q, captions.get(q.region_id, BLANK)), cluster=str(image_of(q.region_id)))
        for q in questions
    ]


def strict_and_paper(captions: dict[int, str]) -> tuple[float, float]:
    rows = judged(captions)
    return point(make_sheet(rows, strict=True)), point(make_sheet(rows))


def test_about_eight_questions_a_region() -> None:
    _, known, questions = phantoms()
    assert 7 <= len(questions) / len(known) <= 9


def test_captions_from_the_truth_score_near_100_in_both_polarities() -> None:
    _, known, _ = phantoms()
    sheet = make_sheet(judged(truth_captions(known, LIBRARY)), strict=True)
    assert point(sheet, "positive") >= 0.98
    assert point(sheet, "negative") >= 0.98


def test_blank_captions_score_0_in_the_strict_variant_only() -> None:
    strict, paper = strict_and_paper({})
    assert (strict, paper) == (0.0, 0.5)


def test_a_nodule_in_the_lung_does_not_pass() -> None:
    _, known, _ = phantoms()
    strict, paper = strict_and_paper({r.region_id: "A nodule in the lung." for r in known})
    assert strict < 0.03
    assert paper > 0.4
    nodule = {"texture": "5", "margin": "5", "spiculation": "1", "lobulation": "1", "sphericity": "5", "side": "left"}
    row = image("lidc-idri", [((5, 5, 15, 15), nodule)], modality="CT", window=Window(center=-600, width=1500))
    rows = [
        Judged(q, JUDGE.judge(q, "A nodule in the lung."), "p")
        for s in range(5)
        for q in build_questions([row], seed=s).questions
    ]
    assert all(r.verdict.outcome == "correct" for r in rows if r.question.polarity == "recognition")
    assert point(make_sheet(rows, strict=True)) == 0.0


def test_shuffled_captions_are_worth_as_much_as_the_majority_caption() -> None:
    _, known, _ = phantoms()
    truth = truth_captions(known, LIBRARY)
    dealt = shuffled_captions(truth, known, LIBRARY)
    for strict in (False, True):
        shuffled = with_interval(make_sheet(judged(dealt), strict=strict), num=400).average
        majority = with_interval(make_sheet(judged(majority_captions(known, LIBRARY)), strict=strict), num=400).average
        assert shuffled.low <= majority.value <= shuffled.high
        assert shuffled.value < 0.8
    own = [r.region_id for r in known if truth[r.region_id] == dealt[r.region_id]]
    assert len(own) < 0.3 * len(known)
    assert sorted(dealt.values()) == sorted(truth.values())


def test_truth_captions_of_the_real_datasets_score_100() -> None:
    film = {v.labels[0]: "absent" for v in LIBRARY.sets["vindr_cxr"].attribute("finding").values}
    skin = {v.labels[0]: "0" for a in LIBRARY.sets["skincon"].attributes for v in a.values}
    findings = [v for v in LIBRARY.sets["vindr_cxr"].attribute("finding").values if v.ask]
    concepts = [v.labels[0] for a in LIBRARY.sets["skincon"].attributes for v in a.values]
    rows = [
        image(
            "vindr-cxr",
            [((9, 9, 99, 99), {**film, v.labels[0]: "present", "side": "left", "zone": "lower"})],
            ordinal=i,
        )
        for i, v in enumerate(findings)
    ]
    rows += [
        image("skincon", [((0, 0, 9, 9), {**skin, a: "1", b: "1"})], ordinal=100 + i, modality="XC")
        for i, (a, b) in enumerate(zip(concepts, [*concepts[7:], *concepts[:7]], strict=True))
    ]
    faults = []
    for row in rows:
        known = [LabelledRegion(r.region_id, row.dataset, row.modality, r.labels) for r in row.regions]
        captions = truth_captions(known, LIBRARY)
        for question in build_questions([row], seed=3).questions:
            verdict = JUDGE.judge(question, captions[question.region_id])
            if verdict.choice not in question.strict_expected:
                faults.append(
                    (
                        question.template_id,
                        question.value,
                        question.polarity,
                        verdict.choice,
                        captions[question.region_id],
                    )
                )
    assert faults == []


def ask(key: str, polarity: str = "positive", dataset: str = "lidc_idri", region: int = 1) -> Question:
    question = question_about(LIBRARY, dataset, key, polarity=polarity, region_id=region)  # type: ignore[arg-type]
    return replace(question, dataset=dataset)


def answer(question: Question, choice: str, cluster: str = "p", caption: str = "0") -> Judged:
    return Judged(question, decided(question, choice, "hand"), cluster, caption)


def test_values_weigh_equally_within_attributes_and_attributes_within_datasets() -> None:
    rows = [answer(ask("texture/solid", region=i), "stated") for i in range(9)]
    rows += [
        answer(ask("texture/part_solid", region=20), "not_mentioned"),
        answer(ask("shape/round", region=30), "stated"),
    ]
    rows.append(answer(ask("finding/edema", dataset="vindr_cxr", region=40), "not_mentioned"))
    balanced, pooled = make_sheet(rows), make_sheet(rows, weighting="questions")
    assert point(balanced, "positive") == pytest.approx(((0.5 + 1.0) / 2 + 0.0) / 2)
    assert point(pooled, "positive") == pytest.approx((10 / 11 + 0.0) / 2)
    counts = {(s.attribute, s.value): (share, n) for s, share, n in by_stratum(balanced)}
    assert counts["lidc_idri/texture", "solid"] == (1.0, 9)


def test_the_gate_of_the_strict_variant() -> None:
    question, gate = ask("spiculation/spiculated", "negative"), ask("recognition")
    for recognised, choice, strict, paper in [
        ("yes", "otherwise", 1, 1), ("yes", "not_mentioned", 0, 1), ("no", "otherwise", 0, 1), ("yes", "stated", 0, 0)
    ]:  # fmt: skip
        rows = [answer(question, choice), answer(gate, recognised)]
        found = [point(make_sheet(rows, strict=s), "negative") for s in (True, False)]
        assert found == [strict, paper]


def test_each_caption_of_a_region_has_its_own_gate() -> None:
    question, gate = ask("spiculation/spiculated", "negative"), ask("recognition")
    rows = [answer(question, "otherwise", caption=c) for c in "ab"]
    rows += [answer(gate, "yes", caption="a"), answer(gate, "no", caption="b")]
    assert point(make_sheet(rows, strict=True), "negative") == 0.5


def test_regions_of_two_datasets_that_share_an_id_have_their_own_gates() -> None:
    rows = []
    for dataset, recognised in (("a", "yes"), ("b", "no")):
        rows.append(replace(answer(ask("margin/sharp", dataset="lidc_idri"), "stated"), cluster=dataset))
        rows.append(answer(ask("recognition"), recognised))
        rows[-2:] = [replace(r, question=replace(r.question, dataset=dataset)) for r in rows[-2:]]
    sheet = make_sheet(rows, strict=True)
    assert {s.dataset: share for s, share, _ in by_stratum(sheet)} == {"a": 1.0, "b": 0.0}


def test_what_cannot_be_judged_is_neither_right_nor_wrong() -> None:
    rows = [answer(ask("margin/sharp", region=1), "stated")]
    rows += [Judged(q := ask("margin/sharp", region=2), unscored(q, Unscored.UNPARSABLE, "j"), "p")]
    sheet = make_sheet(rows)
    assert point(sheet, "positive") == 1.0
    assert sheet.unscored == {"unparsable": 1}
    assert sheet.unscored_rate == 0.5
    gate = ask("recognition")
    gated = [
        answer(ask("margin/sharp", region=0), "stated"),
        Judged(replace(gate, region_id=0), unscored(gate, Unscored.REFUSED, "j"), "p"),
    ]
    assert make_sheet(gated, strict=True).unscored == {"refused": 1}


def test_only_common_datasets_are_compared() -> None:
    a = [answer(ask("margin/sharp"), "stated"), answer(ask("finding/edema", dataset="vindr_cxr"), "stated")]
    b = [answer(ask("margin/sharp"), "not_mentioned")]
    assert common_datasets({"a": a, "b": b}) == ["lidc_idri"]
    assert make_sheet(a, datasets=["lidc_idri"]).datasets == ["lidc_idri"]


def test_two_models_are_compared_question_by_question() -> None:
    asked = [("margin/sharp", "positive"), ("spiculation/spiculated", "negative")]
    questions = [ask(key, polarity, region=i) for i in range(60) for key, polarity in asked]
    worse = [answer(q, "not_mentioned" if q.region_id % 3 else "stated", cluster=str(q.region_id)) for q in questions]
    better = [
        answer(q, "stated" if q.polarity == "positive" else "otherwise", cluster=str(q.region_id)) for q in questions
    ]
    result = compare(worse, better)
    assert result.difference.value == pytest.approx(((40 / 60) + (20 / 60)) / 2)
    assert result.p_value < 0.01
    assert compare(better, worse).difference.value == pytest.approx(-result.difference.value)
    with pytest.raises(ValueError, match="in common"):
        compare(worse, [answer(ask("shape/round"), "stated")])


def test_normalised_score() -> None:
    assert normalised(0.8, 0.6, 1.0) == pytest.approx(0.5)
    assert normalised(0.6, 0.6, 0.6) != normalised(0.6, 0.6, 0.6)


def test_a_truth_caption_denies_what_is_absent() -> None:
    truth = truth_of(LIBRARY.sets["lidc_idri"], [Label(name="spiculation", value="1"), Label(name="margin", value="5")])
    assert caption_of(LIBRARY.sets["lidc_idri"], truth) == (
        "There is a nodule. There is no spiculated margin. There is a sharp, well-defined margin."
    )
