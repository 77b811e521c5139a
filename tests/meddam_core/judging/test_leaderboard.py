"""Leaderboards: what is counted, who is ranked where, and what the controls do to the scale."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest

from meddam_core.judging.leaderboard import Leaderboard, System, holm, make_leaderboard
from meddam_core.judging.protocol import Unscored, decided, unscored
from meddam_core.judging.published import PAPER_TABLE
from meddam_core.judging.scores import Judged
from qa_library import Question, load_library, question_about

LIBRARY = load_library()


def ask(key: str, polarity: str, region: int, dataset: str = "lidc_idri") -> Question:
    question = question_about(LIBRARY, "lidc_idri", key, polarity=polarity, region_id=region)  # type: ignore[arg-type]
    return replace(question, dataset=dataset)


@cache
def questions(dataset: str, num: int = 40) -> tuple[Question, ...]:
    """For each region a recognition question, a positive and a negative."""
    asked = [("recognition", "recognition"), ("margin/sharp", "positive"), ("spiculation/spiculated", "negative")]
    return tuple(ask(key, polarity, region, dataset) for region in range(num) for key, polarity in asked)


def judged(share: float, datasets: tuple[str, ...] = ("a", "b"), judge: str = "hand") -> list[Judged]:
    """Right answers on that share of the regions, silence on the others."""
    rows = []
    for dataset in datasets:
        for question in questions(dataset):
            right = question.region_id < share * 40
            silent = {"recognition": "no", "positive": "not_mentioned", "negative": "not_mentioned"}
            choice = question.strict_expected[0] if right else silent[question.polarity]
            rows.append(Judged(question, decided(question, choice, judge), str(question.region_id)))
    return rows


def board(*systems: System) -> Leaderboard:
    return make_leaderboard(systems, num=200)


CONTROLS = [
    System(name="blank", role="blank", judged=judged(0)),
    System(name="majority", role="majority", judged=judged(0.5)),
    System(name="truth", role="truth", judged=judged(1)),
]


def test_systems_are_ordered_and_ranked_as_far_as_the_data_allow() -> None:
    close = [System(name="first", judged=judged(0.8)), System(name="second", judged=judged(0.775))]
    found = board(System(name="last", judged=judged(0.2)), *close, *CONTROLS)
    assert [m.name for m in found.models] == ["first", "second", "last"]
    assert [m.rank for m in found.models] == [(1, 2), (1, 2), (3, 3)]
    assert [c.role for c in found.controls] == ["blank", "majority", "truth"]
    assert all(c.rank is None for c in found.controls)
    pair = next(p for p in found.pairs if {p.first, p.second} == {"first", "last"})
    assert pair.significant
    assert pair.comparison.difference.low > 0
    assert (found.num_regions, found.num_questions, found.num_clusters) == (80, 160, 80)


def test_the_normalised_score_lies_between_majority_and_truth() -> None:
    found = board(System(name="half way", judged=judged(0.75)), System(name="poor", judged=judged(0.25)), *CONTROLS)
    scaled = {s.name: s.normalised.value for s in (*found.models, *found.controls) if s.normalised}
    assert scaled == pytest.approx({"half way": 0.5, "poor": -0.5, "blank": -1.0, "majority": 0.0, "truth": 1.0})
    alone = board(System(name="half way", judged=judged(0.75)))
    assert alone.models[0].normalised is None


def test_a_blank_system_scores_0_strictly_and_50_by_the_paper() -> None:
    (blank,) = board(System(name="blank", judged=judged(0))).models
    assert blank.scores["strict"].average.value == 0
    assert blank.scores["paper"].average.value == 0.5


def test_only_common_datasets_and_questions_count_and_what_is_left_out_is_said() -> None:
    whole, part = judged(1), judged(0.5, datasets=("a",))[:-3]
    found = board(System(name="whole", judged=whole), System(name="part", judged=part))
    assert found.datasets == ("a",)
    assert {m.num_questions for m in found.models} == {78}
    assert found.left_out == (
        "Datasets that not every system was judged on: b.",
        "whole: 3 questions that not every system was asked.",
    )
    with pytest.raises(ValueError, match="in common"):
        board(System(name="x", judged=judged(1, ("a",))), System(name="y", judged=judged(1, ("b",))))


def test_what_cannot_be_judged_is_counted_beside_the_score() -> None:
    rows = [
        replace(r, verdict=unscored(r.question, Unscored.NO_CAPTION, "hand")) if r.question.region_id == 3 else r
        for r in judged(1)
    ]
    (standing,) = board(System(name="m", judged=rows)).models
    assert standing.scores["strict"].average.value == 1
    assert standing.unscored == {"no_caption": 4}
    assert standing.unscored_rate == pytest.approx(4 / 160)


def test_figures_of_two_judges_are_not_put_side_by_side() -> None:
    with pytest.raises(ValueError, match="2 judges"):
        board(System(name="a", judged=judged(1)), System(name="b", judged=judged(1, judge="other")))
    with pytest.raises(ValueError, match="same name"):
        board(System(name="a", judged=judged(1)), System(name="a", judged=judged(0.5)))
    with pytest.raises(ValueError, match="at least one"):
        board(*CONTROLS)


def test_breakdowns_are_of_the_same_answers() -> None:
    (found,) = board(System(name="m", judged=judged(0.5))).models
    assert set(found.by_dataset["strict"]) == {"a", "b"}
    cells = {(c.dataset, c.attribute, c.polarity): c for c in found.by_attribute["strict"]}
    assert cells["a", "lidc_idri/margin", "positive"].share.value == 0.5
    assert cells["b", "lidc_idri/spiculation", "negative"].num_questions == 40
    assert found.by_dataset["strict"]["a"].average.low < 0.5 < found.by_dataset["strict"]["a"].average.high


def test_own_captions_dealt_out() -> None:
    (found,) = board(System(name="m", judged=judged(0.9), own_shuffled=judged(0.5))).models
    assert found.own_shuffled is not None
    assert found.own_unshuffled is not None
    assert (found.own_shuffled.value, found.own_unshuffled.value) == pytest.approx((0.5, 0.9))


def test_controls_may_stand_on_a_sample_but_not_on_other_datasets() -> None:
    sample = [j for j in judged(1) if j.question.region_id < 10]
    truth = System(name="truth", role="truth", judged=sample)
    lacking = System(name="blank", role="blank", judged=judged(0, datasets=("a",)))
    found = board(System(name="m", judged=judged(0.5)), truth, lacking)
    assert found.models[0].num_questions == 160
    assert [(c.role, c.num_regions) for c in found.controls] == [("truth", 20)]
    assert found.left_out == ("The control blank: it was not judged on every dataset.",)


def test_holm() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_the_paper_s_average_is_the_mean_of_its_polarities() -> None:
    for row in PAPER_TABLE:
        assert row.med_dlc == pytest.approx((row.positive + row.negative) / 2, abs=0.11), row.model
