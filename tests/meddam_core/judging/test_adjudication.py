"""Adjudication: what is drawn, what readers' answers say of a judge, and scores corrected for its errors."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from meddam_core.judging.adjudication import UNSURE, Candidate, Item, assess, corrected, draw, order_of
from meddam_core.judging.protocol import Unscored, decided, unscored
from meddam_core.judging.statistics import Interval
from meddam_core.reports.adjudication_sheet import adjudication_sheet
from qa_library import load_library, question_about

LIBRARY = load_library()
SENSITIVITY, SPECIFICITY, TRUTH = 0.9, 0.7, 0.6
"""Of the made judge, and how many captions are right."""


def made(num: int, seed: int = 0) -> tuple[list[Candidate], dict[str, bool]]:
    """Verdicts of a judge with known error rates, and whether the captions are right, by question id."""
    rng = random.Random(seed)
    question = question_about(LIBRARY, "lidc_idri", "spiculation/spiculated")
    candidates, right = [], {}
    for i in range(num):
        own = replace(question, question_id=f"{i}/q", region_id=i)
        right[own.question_id] = rng.random() < TRUTH
        says = rng.random() < (SENSITIVITY if right[own.question_id] else 1 - SPECIFICITY)
        verdict = decided(own, "stated" if says else "not_mentioned", "j")
        candidates.append(Candidate(question=own, caption=f"caption {i}", verdict=verdict))
    return candidates, right


def answers(items: list[Item], right: dict[str, bool]) -> dict[str, str]:
    return {i.item_id: "stated" if right[i.question.question_id] else "not_mentioned" for i in items}


def test_half_of_the_sample_is_judged_right_and_it_is_seeded() -> None:
    candidates, _ = made(2000)
    skipped = candidates[0].question
    candidates[0] = replace(candidates[0], verdict=unscored(skipped, Unscored.REFUSED, "j"))
    items = draw(candidates, 200, seed=1)
    assert (len(items), sum(i.judged_right for i in items)) == (200, 100)
    assert skipped not in [i.question for i in items]
    assert [i.item_id for i in draw(candidates, 200, seed=1)] == [i.item_id for i in items]
    assert {i.item_id for i in draw(candidates, 200, seed=2)} != {i.item_id for i in items}
    first, second = order_of(items, "reader-1"), order_of(items, "reader-2")
    assert first != second
    assert sorted(i.item_id for i in first) == sorted(i.item_id for i in second)
    few = draw([c for c in candidates if c.verdict.outcome == "correct"][:5], 200)
    assert len(few) == 5
    with pytest.raises(ValueError, match="no scored verdict"):
        draw(candidates[:1], 10)


def test_a_judge_s_error_rates_are_found_in_a_balanced_sample_and_the_score_is_corrected() -> None:
    candidates, right = made(40_000)
    share = sum(c.verdict.outcome == "correct" for c in candidates) / len(candidates)
    assert share == pytest.approx(SENSITIVITY * TRUTH + (1 - SPECIFICITY) * (1 - TRUTH), abs=0.01)
    items = draw(candidates, 3000)
    found = assess(items, answers(items, right), answers(items, right), share)
    assert found.sensitivity.value == pytest.approx(SENSITIVITY, abs=0.02)
    assert found.specificity.value == pytest.approx(SPECIFICITY, abs=0.03)
    assert (found.alpha, found.num_disagreed, found.num_open) == (1.0, 0, 0)
    mended = corrected(Interval(share, share - 0.01, share + 0.01), found)
    assert mended.value == pytest.approx(TRUTH, abs=0.02)
    assert mended.low < TRUTH < mended.high


def test_disagreements_and_open_answers_are_counted_and_left_out() -> None:
    candidates, right = made(400)
    items = draw(candidates, 40)
    first = answers(items, right)
    second = dict(first)
    a, b, c = (i.item_id for i in items[:3])
    second[a] = "not_mentioned" if first[a] == "stated" else "stated"
    second[b] = UNSURE
    del second[c]
    found = assess(items, first, second, 0.5)
    assert (found.num_reference, found.num_disagreed, found.num_open) == (37, 1, 2)
    assert 0.8 < found.alpha < 1
    assert found.same_option.value == pytest.approx(37 / 38)


def test_what_is_no_answer_is_refused() -> None:
    candidates, right = made(100)
    items = draw(candidates, 10)
    good = answers(items, right)
    with pytest.raises(ValueError, match="no item of this adjudication"):
        assess(items, {"beef": "stated"}, good, 0.5)
    with pytest.raises(ValueError, match="it takes not_mentioned, otherwise, stated, unsure"):
        assess(items, good, {items[0].item_id: "perhaps"}, 0.5)
    with pytest.raises(ValueError, match="agree on no item"):
        assess(items, good, {}, 0.5)


def test_a_judge_no_better_than_chance_corrects_nothing() -> None:
    candidates, _ = made(4000)
    items = draw(candidates, 400)
    rng = random.Random(3)
    coin = {i.item_id: rng.choice(["stated", "not_mentioned"]) for i in items}
    found = assess(items, coin, coin, 0.5)
    assert found.sensitivity.value + found.specificity.value == pytest.approx(1, abs=0.12)
    upside_down = {i.item_id: "not_mentioned" if i.judged_right else "stated" for i in items}
    wrong = assess(items, upside_down, upside_down, 0.5)
    assert corrected(Interval(0.6, 0.5, 0.7), wrong).value != corrected(Interval(0.6, 0.5, 0.7), wrong).value


def test_the_sheet_is_blind_and_loads_nothing() -> None:
    candidates, _ = made(50)
    hostile = replace(candidates[0], caption="<b>bold</b> & caption")
    html = adjudication_sheet(draw([hostile, *candidates[1:]], 50), "reader-1")
    assert "&lt;b&gt;bold&lt;/b&gt;" in html
    assert not any(word in html for word in ("correct", "lexical", "judged_right", "expected"))
    assert "http" not in html.split("</head>")[1].replace("http-equiv", "")
    assert html.count("<fieldset ") == 50
    assert html.count('type="radio"') == 200
