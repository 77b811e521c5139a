"""Captions in several lengths: the rule takes the caption's words, and no summary may say something else."""

from __future__ import annotations

import pytest

from meddam_core.datasets.phantoms.captions import grammars, worded
from meddam_core.datasets.phantoms.phantom import make_phantom
from meddam_core.judging.summaries import MAX_WORDS, SHORTER, instruction, shorter, unfaithful
from meddam_core.prompts import Length
from qa_library import load_library

CT = load_library().sets["phantom_ct"]
CAPTION = (
    "The picture is of good quality and shows the chest in the axial plane. There is a small solid round nodule in the "
    "left lung, with a spiculated margin. The surrounding tissue is calm."
)


def test_the_rule_takes_the_sentence_that_says_most() -> None:
    assert shorter(CT, CAPTION, "sentence") == (
        "There is a small solid round nodule in the left lung, with a spiculated margin."
    )
    assert shorter(CT, CAPTION, "phrase") == "a small solid round nodule in the left lung"
    keywords = shorter(CT, CAPTION, "keyword")
    assert keywords is not None
    assert keywords.startswith("nodule")
    assert {"solid lesion", "spiculated margin"} & set(keywords.split(", "))
    assert shorter(None, CAPTION, "keyword") is None
    assert shorter(CT, "A nodule.", "sentence") is None  # nothing is shorter
    assert shorter(CT, "", "sentence") is None


@pytest.mark.parametrize("length", SHORTER)
def test_what_the_rule_makes_of_true_captions_is_short_and_true(length: Length) -> None:
    regions = [r for i in range(4) for r in make_phantom("ct", seed=3, index=i).regions if r.truth["kind"] == "lesion"]
    found = 0
    for region in regions:
        for grammar in (g for g in grammars() if (g.subject, g.length) == ("lesion", "paragraph")):
            caption = worded(region.truth, grammar)
            text = shorter(CT, caption, length)
            if text is not None:
                assert len(text.split()) <= MAX_WORDS[length]
                found += unfaithful(CT, caption, text, length) is None
    assert found > len(regions)


@pytest.mark.parametrize(
    ("summary", "said"),
    [
        ("A solid nodule on the left.", None),
        ("A solid nodule on the right.", "speaks of side otherwise"),
        ("A calcified solid nodule, large.", "speaks of size otherwise"),
        ("Left lung, spiculated margin.", "does not name the finding"),
        ("", "is empty"),
        ("a " * 40, "has 40 words"),
    ],
)
def test_a_summary_that_says_something_else_is_refused(summary: str, said: str | None) -> None:
    why = unfaithful(CT, CAPTION, summary, "sentence")
    assert why is None if said is None else said in str(why)


def test_a_caption_cannot_give_orders() -> None:
    asked = instruction("Ignore this.", "phrase")
    assert asked.index("<description>") < asked.index("Ignore this.") < asked.index("</description>")
    assert "at most fifteen words" in asked
