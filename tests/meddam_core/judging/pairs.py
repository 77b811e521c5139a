"""The hand-checked captions and answers as questions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import yaml

from qa_library import Library, Question, question_about

FOLDER = Path(__file__).parents[2] / "data" / "judging"


@dataclass(frozen=True)
class Pair:
    """A caption, a question and the option that a person chose."""

    caption: str
    style: str
    question: Question
    answer: str


def read_pairs(name: str, library: Library) -> list[Pair]:
    """All pairs of a file of tests/data/judging."""
    pairs = []
    for entry in yaml.safe_load((FOLDER / name).read_text()):
        for key, answer in entry["answers"].items():
            question = question_about(library, entry["set"], key)
            assert answer in question.option_ids, (key, answer)
            pairs.append(Pair(entry["caption"], entry["style"], question, answer))
    return pairs
