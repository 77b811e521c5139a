"""DLC-Bench's files and figures: rescoring stored judge replies, predictions and evaluation files.

    rescore("dam_3b_v1_eval.json").headline        # the three published numbers, from the replies alone

Notes:
- The rules (meddam_core.judging.dlc_bench_rules) stop for some replies where the reference program crashes. `rescore`
  then names the annotations, or with `skip_unscorable` leaves them out of the averages and lists them.
- The `avg` that the benchmark's own files record is a mean of pooled scores from an older version; the headline is
  (Pos + Neg) / 2.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from meddam_core.judging.dlc_bench_rules import (
    Answer,
    Question,
    RegionScore,
    judge_message,
    mean,
    parse_reply,
    recognition_question,
    score_region,
)

__all__ = [
    "Answer", "Headline", "Question", "RegionScore", "Rescore", "evaluation_entry", "headline", "judge_message",
    "parse_reply", "read_predictions", "read_questions", "recognition_question", "rescore", "score_region",
    "write_evaluation", "write_predictions",
]  # fmt: skip

QUERY_KEY = "query"
"""The entry of a predictions file that holds the captioner's prompt instead of a caption."""


@dataclass(frozen=True, slots=True)
class Headline:
    """The published figures: means over annotations, and their mean."""

    positive: float
    negative: float
    average: float


@dataclass(frozen=True, slots=True)
class Rescore:
    """Scores from stored replies. `unscorable` maps keys left out of the averages to the reason."""

    headline: Headline
    per_key: dict[str, RegionScore]
    unscorable: dict[str, str] = field(default_factory=dict)

    @property
    def num_unmatched(self) -> int:
        """Replies that named no choice; by the benchmark's rules they count 0."""
        return sum(a.choice is None for r in self.per_key.values() for a in r.answers)

    def to_json(self) -> dict[str, Any]:
        """Plain values for `--json`: the headline, and positive, negative and pooled score a key."""
        return {
            "avg_pos": self.headline.positive,
            "avg_neg": self.headline.negative,
            "avg": self.headline.average,
            "num_keys": len(self.per_key),
            "num_recognition_wrong": sum(not r.recognized for r in self.per_key.values()),
            "num_unmatched_replies": self.num_unmatched,
            "unscorable": self.unscorable,
            "per_key": {
                k: {
                    "score_pos": r.positive,
                    "score_neg": r.negative,
                    "score": r.pooled,
                    "recognition_result": r.recognized,
                }
                for k, r in self.per_key.items()
            },
        }


def headline(regions: Mapping[str, RegionScore]) -> Headline:
    """Means over annotations; the negative one over those that have negative questions. Raises ValueError for none."""
    negatives = [n for r in regions.values() if (n := r.negative) is not None]
    if not regions or not negatives:
        raise ValueError("no annotation could be scored")
    positive, negative = mean([r.positive for r in regions.values()]), mean(negatives)
    return Headline(positive, negative, (positive + negative) / 2)


def read_questions(qa: str | Path, class_names: str | Path) -> dict[str, list[Question]]:
    """`qa.json` and `class_names.json` as question lists by annotation id, the recognition question first."""
    questions, names = _read_json(qa), _read_json(class_names)
    missing = [key for key in questions if key not in names]
    if missing:
        raise ValueError(f"{Path(class_names).name} has no name for {len(missing)} annotations, such as {missing[0]}")
    return {k: [recognition_question(names[k]), *(_question(q) for q in qs)] for k, qs in questions.items()}


def read_predictions(path: str | Path) -> tuple[dict[str, str], str | None]:
    """A predictions file as ({annotation id: caption}, the captioner's prompt).

    Raises ValueError for captions that are not text or that record an error ("Error: ...").
    """
    entries = _read_json(path)
    query = entries.pop(QUERY_KEY, None)
    bad = [k for k, caption in entries.items() if not isinstance(caption, str) or caption.startswith("Error:")]
    if bad:
        raise ValueError(
            f"{Path(path).name}: {len(bad)} captions are missing or record an error, such as that of {bad[0]}"
        )
    return entries, query


def write_predictions(path: str | Path, captions: Mapping[str, str], query: str) -> None:
    """Writes captions in the form that the benchmark's own scorer reads."""
    text = json.dumps({**{str(k): v for k, v in captions.items()}, QUERY_KEY: query}, indent=4)
    Path(path).write_text(text, encoding="utf-8")


def evaluation_entry(caption: str, region: RegionScore) -> dict[str, Any]:
    """One annotation as the reference's evaluation file records it: caption, details, messages, replies, scores."""

    def detail(index: int, answer: Answer) -> dict[str, Any]:
        question = answer.question
        entry: dict[str, Any] = {"question": question.text, "choices": [list(c) for c in question.choices]}
        entry["type"] = question.type
        if question.subtype is not None:
            entry["subtype"] = question.subtype
        entry |= {"pred_answer": answer.reply.strip(), "pred_index": answer.choice}
        if question.type == "recognition":
            return entry | {"eval_result": "correct" if region.recognized else "incorrect"}
        return entry | {"question_index": index, "eval_result": answer.score}

    details = [detail(i, a) for i, a in enumerate(region.answers)]
    asked = (region.recognition, *region.answers)
    return {
        "pred": caption,
        "details_positives": [d for d in details if d["type"] == "positive"],
        "details_negatives": [d for d in details if d["type"] == "negative"],
        "details_recognition": [detail(-1, region.recognition)],
        "prompt": [judge_message(caption, a.question) for a in asked],
        "response": [a.reply for a in asked],
        "score": region.pooled,
        "score_pos": region.positive,
        "score_neg": region.negative,
        "neg_valid_num": sum(a.question.type == "negative" for a in region.answers),
        "recognition_result": region.recognized,
    }


def write_evaluation(path: str | Path, captions: Mapping[str, str], regions: Mapping[str, RegionScore]) -> None:
    """Writes the reference's evaluation file: one entry a key, and the averages."""
    result = headline(regions)
    entries: dict[str, Any] = {k: evaluation_entry(captions[k], r) for k, r in regions.items()}
    entries |= {"avg_pos": result.positive, "avg_neg": result.negative}
    Path(path).write_text(json.dumps(entries, indent=4), encoding="utf-8")


def rescore(answers: str | Path | Mapping[str, Any], *, skip_unscorable: bool = False) -> Rescore:
    """Scores an evaluation file afresh from the judge replies it stores; its own scores are not looked at.

    Raises ValueError naming the annotations with replies that the benchmark's rules cannot score, or leaves these out
    of the averages with `skip_unscorable`.
    """
    entries = _read_json(answers) if isinstance(answers, str | Path) else answers
    per_key: dict[str, RegionScore] = {}
    unscorable: dict[str, str] = {}
    for key, entry in entries.items():
        if not isinstance(entry, Mapping):  # the averages of the file
            continue
        try:
            region = score_region(*_stored_replies(entry))
            _ = region.positive
        except IndexError:
            unscorable[key] = "a reply is empty, or names a choice that is not there"
        except (ValueError, ZeroDivisionError) as e:
            unscorable[key] = str(e) if isinstance(e, ValueError) else "there is no positive question"
        else:
            per_key[key] = region
    if unscorable and not skip_unscorable:
        listed = "; ".join(f"{k}: {why}" for k, why in list(unscorable.items())[:10])
        raise ValueError(f"{len(unscorable)} annotations cannot be scored by the benchmark's rules ({listed})")
    return Rescore(headline(per_key), per_key, unscorable)


def _stored_replies(entry: Mapping[str, Any]) -> tuple[list[Question], list[str]]:
    """Questions and replies of an evaluation entry, in the order they were asked."""
    details = [*entry.get("details_positives", []), *entry.get("details_negatives", [])]
    details.sort(key=lambda d: int(d["question_index"]))
    details = [*entry.get("details_recognition", []), *details]
    replies = entry.get("response") or [d.get("pred_answer") for d in details]
    if len(replies) != len(details):
        raise ValueError(f"{len(replies)} replies are stored for {len(details)} questions")
    if any(not isinstance(reply, str) for reply in replies):
        raise ValueError("a reply is missing")
    return [_question(d) for d in details], list(replies)


def _question(entry: Mapping[str, Any]) -> Question:
    choices = tuple((str(text), score) for text, score in entry["choices"])
    return Question(entry["question"], choices, entry["type"], entry.get("subtype"))


def _read_json(path: str | Path) -> dict[str, Any]:
    content = json.loads(Path(path).read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{Path(path).name} holds no object with one entry for each annotation")
    return content
