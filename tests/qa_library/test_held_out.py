"""Questions in words that are kept for tests: other text, and nothing else."""

from __future__ import annotations

import pytest

from meddam_core.judging.lexical import LexicalJudge
from qa_library import Settings, build_questions, load_library
from qa_library.lint import lint
from tests.qa_library.rows import image

PHANTOM = {"finding": "nodule", "density": "solid", "margin": "spiculated", "side": "left", "size_mm": "12"}
NODULE = {"margin": "5", "texture": "5", "spiculation": "1", "diameter_mm": "9"}
FILM = {"Pleural effusion": "present", "Pleural thickening": "absent", "side": "left"}


@pytest.mark.parametrize(
    "row",
    [
        image("phantoms", [((0, 0, 9, 9), PHANTOM)], modality="CT"),
        image("lidc-idri", [((0, 0, 9, 9), NODULE)], modality="CT"),
        image("vindr-cxr", [((0, 0, 9, 9), FILM)]),
    ],
    ids=lambda row: row.dataset,
)
def test_only_the_words_are_others(row) -> None:  # type: ignore[no-untyped-def]
    usual, held_out = (
        build_questions([row], settings=Settings(scale_given=True, held_out=h)).questions for h in (False, True)
    )
    assert len(usual) == len(held_out) > 2
    judge = LexicalJudge()
    for one, other in zip(usual, held_out, strict=True):
        assert other.text != one.text
        assert other.template_id == one.template_id + "+held-out"
        same = ("question_id", "kind", "polarity", "expected", "strict_expected", "option_ids", "template_set")
        assert all(getattr(one, name) == getattr(other, name) for name in same)
        words = {o.id: o.text for o in one.options}, {o.id: o.text for o in other.options}
        assert words[0] != words[1]
        assert len(set(words[1].values())) == len(words[1])
        assert "{" not in other.text
        for caption in ("A solid spiculated nodule on the left.", "A pleural effusion.", ""):
            assert judge.judge(one, caption).choice == judge.judge(other, caption).choice


def test_every_shipped_set_has_held_out_words() -> None:
    assert lint(load_library()) == []
    for template_set in load_library().sets.values():
        assert template_set.recognition.attribute or template_set.recognition.held_out


def test_the_wording_does_not_tell_what_is_expected() -> None:
    row = image("phantoms", [((0, 0, 9, 9), PHANTOM)], modality="CT")
    texts: dict[str, set[str]] = {}
    for seed in range(6):
        for q in build_questions([row], settings=Settings(seed=seed, held_out=True)).questions:
            if q.kind == "presence":
                texts.setdefault(q.attribute, set()).add(q.text.replace(q.value.replace("_", "-"), ""))
                assert not any(w in q.text.lower() for w in ("wrong", "correct", "true", "false"))
    assert texts
