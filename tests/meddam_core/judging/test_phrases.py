"""Phrases stand where they were written, whatever the punctuation, and say what the rules read."""

from __future__ import annotations

import itertools

import pytest
import yaml

from meddam_core.judging.phrases import phrases
from qa_library import load_library
from tests.meddam_core.judging.pairs import FOLDER

LIBRARY = load_library()


def found(caption: str, set_id: str = "lidc_idri") -> list[tuple[str, str, str]]:
    return [(caption[p.start : p.end], p.value, p.status) for p in phrases(caption, LIBRARY.sets[set_id])]


def test_spans_are_of_the_text_as_written() -> None:
    assert found("Spiculated, ill-defined Nodule (part-solid); no lobulation.") == [
        ("Spiculated", "spiculated", "stated"), ("ill-defined", "poorly_defined", "stated"),
        ("Nodule", "lidc_idri", "stated"), ("part-solid", "part_solid", "stated"),
        ("lobulation", "lobulated", "denied"),
    ]  # fmt: skip


@pytest.mark.parametrize("dash", [" - ", "—", " – ", "\n", "; "])
def test_dashes_and_lines_do_not_move_what_follows(dash: str) -> None:
    caption = f"A nodule{dash}spiculated{dash}with a sharp margin."
    assert [text for text, _, _ in found(caption)] == ["nodule", "spiculated", "sharp"]


def test_other_scripts_and_nothing() -> None:
    assert found("") == []
    assert found("Ünïcode 結節 nodule ’spiculated’ naïve") == [
        ("nodule", "lidc_idri", "stated"), ("spiculated", "spiculated", "stated")
    ]  # fmt: skip


def test_of_all_hand_written_captions_every_span_holds_a_word() -> None:
    num = 0
    for file in sorted(FOLDER.glob("*.yaml")):
        for entry in yaml.safe_load(file.read_text()):
            caption = entry["caption"]
            spans = phrases(caption, LIBRARY.sets[entry["set"]])
            assert all(0 <= p.start < p.end <= len(caption) for p in spans)
            assert all(a.end <= b.start for a, b in itertools.pairwise(spans))
            assert all(caption[p.start : p.end].strip() == caption[p.start : p.end] for p in spans)
            num += len(spans)
    assert num > 300
