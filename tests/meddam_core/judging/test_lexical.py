"""The offline judge against hand-checked captions, and its rules one by one."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import qa_library
from meddam_core.judging import lexical
from meddam_core.judging.lexical import LexicalJudge, lengths_mm
from meddam_core.judging.protocol import Judge, Unscored
from qa_library import Question, load_library, question_about, question_of_text
from tests.meddam_core.judging.pairs import FOLDER, read_pairs

LIBRARY = load_library()
JUDGE = LexicalJudge(LIBRARY)


def wrong(name: str) -> list[str]:
    return [
        f"{p.question.template_id} {p.question.value}: want {p.answer}, got {found}: {p.caption[:120]!r}"
        for p in read_pairs(name, LIBRARY)
        if (found := JUDGE.judge(p.question, p.caption).choice) != p.answer
    ]


@pytest.mark.parametrize("half", ["tuning", "heldout", "second_heldout", "third_heldout", "fourth_heldout"])
def test_at_least_95_percent_right_on_each_half(half: str) -> None:
    name = f"caption_questions_{half}.yaml"
    faults = wrong(name)
    assert len(faults) <= 0.05 * len(read_pairs(name, LIBRARY)), "\n".join(faults)


def test_the_hand_checked_set_is_large_and_varied() -> None:
    pairs = [p for half in ("tuning", "heldout") for p in read_pairs(f"caption_questions_{half}.yaml", LIBRARY)]
    assert len(pairs) >= 300
    assert {"negation", "hedging", "laterality", "synonym", "list", "blank", "long"} <= {p.style for p in pairs}
    assert {p.question.template_set for p in pairs} >= {
        "vindr_cxr",
        "lidc_idri",
        "skincon",
        "ophthalmology",
        "pathology",
    }
    captions = [{p.caption for p in read_pairs(f"caption_questions_{h}.yaml", LIBRARY)} for h in ("tuning", "heldout")]
    assert captions[0] & captions[1] <= {""}


def test_no_rule_has_fallen_back() -> None:
    assert wrong("caption_questions_regressions.yaml") == []


def test_the_words_come_from_nobodys_caption_grammar() -> None:
    """The judge's own modules, and all that they import of ours, know nothing of the phantoms."""
    seen: set[Path] = set()
    queue = [Path(lexical.__file__), Path(qa_library.__file__)]
    root = Path(qa_library.__file__).parents[1]
    while queue:
        file = queue.pop()
        if file in seen:
            continue
        seen.add(file)
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
                names += [f"{node.module}.{a.name}" for a in node.names] if isinstance(node, ast.ImportFrom) else []
                for name in names:
                    assert "phantom" not in name, f"{file.name} imports {name}"
                    path = root / Path(*name.split("."))
                    queue += [f for f in (path.with_suffix(".py"), path / "__init__.py") if f.is_file()]
    assert {"assertion.py", "cues.py", "terms.py", "schema.py"} <= {f.name for f in seen}


def test_it_is_a_judge_and_says_what_it_depends_on() -> None:
    assert isinstance(JUDGE, Judge)
    assert LIBRARY.version in JUDGE.id


def test_a_question_of_another_library_is_unscored() -> None:
    question = question_about(LIBRARY, "lidc_idri", "margin")
    strange = Question(**{**{f: getattr(question, f) for f in Question.__slots__}, "template_id": "ours/margin@1"})
    verdict = JUDGE.judge(strange, "Sharp margin.")
    assert (verdict.outcome, verdict.reason) == ("unscored", Unscored.CANNOT_JUDGE)


def test_a_hedged_finding_is_stated_and_marked() -> None:
    question = question_about(LIBRARY, "vindr_cxr", "finding/pneumothorax", polarity="negative")
    verdict = JUDGE.judge(question, "A small pneumothorax is possible.")
    assert (verdict.choice, verdict.outcome, verdict.hedged) == ("stated", "wrong", True)
    assert not JUDGE.judge(question, "A small pneumothorax.").hedged


def test_a_negated_mention_is_no_hallucination() -> None:
    question = question_about(LIBRARY, "vindr_cxr", "finding/pneumothorax", polarity="negative")
    assert JUDGE.judge(question, "No pneumothorax.").outcome == "correct"


@pytest.mark.parametrize(
    ("caption", "choice"),
    [("9 mm nodule", "stated"), ("a 1.1 cm nodule", "stated"), ("measures 22 x 15 mm", "otherwise"),
     ("small", "not_mentioned"), ("about eight millimetres", "stated")],
)  # fmt: skip
def test_sizes(caption: str, choice: str) -> None:
    question = question_about(LIBRARY, "lidc_idri", "size", truth_mm=9.2)
    assert JUDGE.judge(question, caption).choice == choice


@pytest.mark.parametrize(
    ("text", "lengths"), [("12 x 9 mm", [12]), ("1.2 cm", [12]), ("two centimetres", [20]), ("8-mm", [8]), ("no", [])]
)
def test_lengths(text: str, lengths: list[float]) -> None:
    assert lengths_mm(text) == lengths


@pytest.mark.parametrize(
    ("text", "attribute", "value"),
    [("Does the description mention a spiculated nodule margin?", "spiculation", "spiculated"),
     ("Is lobulation falsely described when it is not present?", "lobulation", "lobulated"),
     ("Is pneumothorax incorrectly mentioned in the localized description?", "finding", "pneumothorax"),
     ("Is there a pleural effusion?", "finding", "pleural_effusion")],
)  # fmt: skip
def test_questions_in_free_text(text: str, attribute: str, value: str) -> None:
    question = question_of_text(LIBRARY, text)
    assert question is not None
    assert (question.attribute, question.value) == (attribute, value)
    assert question_of_text(LIBRARY, "Is it nice?") is None


@pytest.mark.parametrize("key", ["finding/nothing", "nothing", "nothing/at/all"])
def test_unknown_keys_are_refused(key: str) -> None:
    with pytest.raises(ValueError, match="has no"):
        question_about(LIBRARY, "vindr_cxr", key)


QUESTIONS = [
    question_about(LIBRARY, s.id, f"{a.id}/{v.id}")
    for s in LIBRARY.sets.values()
    for a in s.attributes
    for v in a.values
]


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=200), st.sampled_from(QUESTIONS))
def test_any_caption_gets_one_of_the_options(caption: str, question: Question) -> None:
    verdict = JUDGE.judge(question, caption)
    assert verdict.choice in question.option_ids
    assert verdict == JUDGE.judge(question, caption)


def test_each_value_is_recognised_by_its_own_words() -> None:
    """Each term of each value, put into a sentence, states it; so no decoy or rule hides a word."""
    missed = []
    for template_set in LIBRARY.sets.values():
        for attribute in template_set.attributes:
            for value in attribute.values:
                for term in value.terms:
                    if ".." in term or "*" in term or term.startswith(("not ", "loss", "no ")):
                        continue
                    words = " ".join(part.split("/")[0] for part in term.split())
                    caption = f"There is {words}."
                    question = question_about(LIBRARY, template_set.id, f"{attribute.id}/{value.id}")
                    if JUDGE.judge(question, caption).choice != "stated":
                        missed.append((template_set.id, value.id, term))
    assert missed == []


def test_the_files_are_where_the_docs_say() -> None:
    doc = (FOLDER.parents[2] / "docs" / "lexical_judge.md").read_text()
    for file in FOLDER.glob("caption_questions_*.yaml"):
        assert file.name in doc
