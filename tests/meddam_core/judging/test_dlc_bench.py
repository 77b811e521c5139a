"""DLC-Bench's parser and scores against what the reference program gave."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from meddam_core.judging.dlc_bench import (
    Question,
    evaluation_entry,
    judge_message,
    parse_reply,
    read_predictions,
    read_questions,
    recognition_question,
    rescore,
    score_region,
    write_evaluation,
    write_predictions,
)

ROOT = Path(__file__).parents[3]
ORACLE = json.loads((ROOT / "tests/data/oracle/dlc_bench.json").read_text())
STORED = ROOT.parent / "shared/data/dlc_bench/dam_3b_v1_eval.json"
needs_stored = pytest.mark.skipif(not STORED.is_file(), reason="the stored replies are not in the repository")

RECOGNITION = recognition_question("bird")
COLOUR = Question("Which?", (("The wing is not mentioned.", 0), ("It is grey.", 1), ("It is red.", -1)), "positive")
BOATS = Question(
    "Which?", (("Boats are not mentioned.", 1), ("Boats are mentioned.", -1)), "negative", "salient negative"
)


def outcome(reply: str, choices: list[str]) -> int | str | None:
    try:
        return parse_reply(reply, choices)
    except IndexError:
        return "raises IndexError"


def test_parser_equals_the_reference_on_every_case() -> None:
    cases = ORACLE["parse_cases"]
    assert len(cases) == 200
    wrong = [c for c in cases if outcome(c["pred"], c["choices"]) != c["result"]]
    assert wrong == []


@pytest.mark.parametrize(
    ("name", "words"),
    [("bird", "object in the description is a bird or an object of a"), ("apple", "is an apple or an object"),
     ("scissors", "objects in the description are scissors or objects of a"), ("bus", "is a bus or an object"),
     ("wine glass", "are wine glass or objects"), ("suv", "is a suv or")],
)  # fmt: skip
def test_recognition_question(name: str, words: str) -> None:
    assert words in recognition_question(name).text


def test_unrecognised_objects_earn_nothing_but_keep_their_penalties() -> None:
    right = score_region([RECOGNITION, COLOUR, BOATS], ["A. Yes", "B. It is grey.", "A"])
    assert (right.positive, right.negative, right.pooled) == (1.0, 1.0, 1.0)
    wrong = score_region([RECOGNITION, COLOUR, COLOUR, BOATS], ["No", "B", "C", "A"])
    assert (wrong.positive, wrong.negative) == (-0.5, 0.0)


def test_no_match_counts_zero_except_for_recognition() -> None:
    scored = score_region([RECOGNITION, COLOUR, BOATS], ["Yes", "Blau.", "A"])
    assert (scored.positive, scored.answers[0].choice) == (0.0, None)
    with pytest.raises(ValueError, match="recognition"):
        score_region([RECOGNITION, COLOUR], ["Perhaps", "B"])
    with pytest.raises(IndexError):
        score_region([RECOGNITION, COLOUR], ["Yes", ""])
    with pytest.raises(IndexError):
        score_region([RECOGNITION, COLOUR], ["Yes", "e. what"])


def entry(caption: str, replies: list[str]) -> dict[str, Any]:
    return evaluation_entry(caption, score_region([RECOGNITION, COLOUR, BOATS], replies))


def test_an_evaluation_file_rescores_to_itself(tmp_path: Path) -> None:
    regions = {
        "1": score_region([RECOGNITION, COLOUR, BOATS], ["Yes", "B", "B"]),
        "2": score_region([RECOGNITION, COLOUR], ["No", "C"]),
    }
    file = tmp_path / "eval.json"
    write_evaluation(file, {"1": "A grey bird.", "2": "A red bird."}, regions)
    result = rescore(file)
    assert (result.headline.positive, result.headline.negative, result.headline.average) == (0.0, -1.0, -0.5)
    assert result.per_key == regions
    assert json.loads(file.read_text())["2"]["score_neg"] is None


def test_what_the_rules_cannot_score_is_named_not_scored() -> None:
    answers = {"7": entry("A grey bird.", ["Yes", "B", "A"]), "8": entry("A bird.", ["Yes", "A", "A"])}
    answers["8"]["response"][1] = ""
    with pytest.raises(ValueError, match="8: a reply is empty"):
        rescore(answers)
    result = rescore(answers, skip_unscorable=True)
    assert list(result.per_key) == ["7"]
    assert "empty" in result.unscorable["8"]
    answers["8"]["response"].pop()
    with pytest.raises(ValueError, match="2 replies are stored for 3 questions"):
        rescore(answers)


def test_prediction_and_question_files(tmp_path: Path) -> None:
    write_predictions(tmp_path / "p.json", {"12": "A bird."}, "<image>\nDescribe.")
    assert json.loads((tmp_path / "p.json").read_text()) == {"12": "A bird.", "query": "<image>\nDescribe."}
    assert read_predictions(tmp_path / "p.json") == ({"12": "A bird."}, "<image>\nDescribe.")
    write_predictions(tmp_path / "p.json", {"12": "Error: out of memory"}, "q")
    with pytest.raises(ValueError, match="12"):
        read_predictions(tmp_path / "p.json")
    (tmp_path / "qa.json").write_text(
        json.dumps({"12": [{"question": "Which?", "choices": [["a", 1]], "type": "positive"}]})
    )
    (tmp_path / "names.json").write_text(json.dumps({"12": "apple"}))
    questions = read_questions(tmp_path / "qa.json", tmp_path / "names.json")
    assert [q.type for q in questions["12"]] == ["recognition", "positive"]
    (tmp_path / "names.json").write_text("{}")
    with pytest.raises(ValueError, match="no name"):
        read_questions(tmp_path / "qa.json", tmp_path / "names.json")


@needs_stored
def test_published_figures_from_the_stored_replies() -> None:
    result = rescore(STORED)
    expected = ORACLE["rescored_from_cached_judge_replies"]["dam_3b_v1"]
    assert {k: [r.positive, r.negative, r.pooled] for k, r in result.per_key.items()} == expected["per_key"]
    assert result.headline.positive == pytest.approx(expected["avg_pos"], abs=1e-12)
    assert result.headline.negative == pytest.approx(expected["avg_neg"], abs=1e-12)
    assert (
        f"{result.headline.positive:.4f} {result.headline.negative:.4f} {result.headline.average:.4f}"
        == "0.5102 0.8300 0.6701"
    )
    assert sum(not r.recognized for r in result.per_key.values()) == 8


@needs_stored
def test_questions_messages_and_entries_equal_the_recorded_ones() -> None:
    stored = json.loads(STORED.read_text())
    for key, region in rescore(STORED).per_key.items():
        recorded = stored[key]
        name = recorded["details_recognition"][0]["question"].split(" or ", 1)[0].split("description ", 1)[1]
        name = name.removeprefix("are ").removeprefix("is an ").removeprefix("is a ")
        assert recognition_question(name) == region.recognition.question
        asked = [region.recognition, *region.answers]
        assert [judge_message(recorded["pred"], a.question) for a in asked] == recorded["prompt"]
        assert evaluation_entry(recorded["pred"], region) == recorded
