"""The rules of DLC-Bench, the public benchmark of detailed localized captions: questions, reply parser, scores.

Notes:
- The rules stay as published, also where ours differ: a reply that names no choice counts 0. Source of every rule:
  github.com/NVlabs/describe-anything at 153ad3d, evaluation/eval_model_outputs.py (Apache-2.0), observed by running it.
- Where the reference program stops with an IndexError or ValueError, `parse_reply` and `score_region` raise the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

QuestionType = Literal["recognition", "positive", "negative"]
LETTERS = "abcde"
"""The reference knows five choices."""

JUDGE_MODEL = "meta-llama/Meta-Llama-3.1-8B-Instruct"
JUDGE_SETTINGS = {"temperature": 0.0, "max_tokens": 300, "top_p": 1, "frequency_penalty": 0, "presence_penalty": 0}
"""The published judge; one user message a question, no system message."""

# The judge was chosen for this exact wording: part of the benchmark's definition, so kept to the letter.
_MESSAGE = """Answer the multiple-choice question based on the text description of an object in an image. \
You need to follow these rules:
1. Do not output any reasoning. Do not perform correction. Please output exactly one answer from the choices for each \
question. Do not repeat the question.
2. There is no need for exact matching. Please choose the closest option based on the description.

The description is:
{caption}

From the description above, please answer the following question with one of the choices:
{question}
"""
_SINGULAR_S = frozenset({"bus", "lens", "canvas", "cactus", "octopus", "walrus", "asparagus"})
_PLURAL_IN_THE_RECORD = frozenset({"wine glass"})
"""inflect took this class name for a plural when the published replies were made."""


@dataclass(frozen=True, slots=True)
class Question:
    """One multiple-choice question about a caption. Choices carry the score they earn, in the file's own order."""

    text: str
    choices: tuple[tuple[str, float | str], ...]
    type: QuestionType
    subtype: str | None = None

    @property
    def choice_texts(self) -> list[str]:
        """The choices without their scores."""
        return [text for text, _ in self.choices]


@dataclass(frozen=True, slots=True)
class Answer:
    """A question with the judge's reply, the choice read from it (None: no match) and the score it earned."""

    question: Question
    reply: str
    choice: int | None
    score: float


@dataclass(frozen=True, slots=True)
class RegionScore:
    """One annotation of the benchmark. Scores lie in [-1, 1]."""

    recognized: bool
    recognition: Answer
    answers: tuple[Answer, ...]

    @property
    def positive(self) -> float:
        """Mean over the positive questions. Raises ZeroDivisionError when there are none, as the reference does."""
        return mean([a.score for a in self.answers if a.question.type == "positive"])

    @property
    def negative(self) -> float | None:
        """Mean over the negative questions, None when there are none."""
        scores = [a.score for a in self.answers if a.question.type == "negative"]
        return mean(scores) if scores else None

    @property
    def pooled(self) -> float:
        """Mean over all questions; not part of the headline."""
        return mean([a.score for a in self.answers])


def recognition_question(class_name: str) -> Question:
    """The question that precedes all others of an annotation: is the object recognised at all?"""
    tail = "objects of a similar type? Again, It does not have to be an exact match."
    if _is_plural(class_name):
        text = f"Is it likely that the objects in the description are {class_name} or {tail}"
    else:
        vowel = class_name[:1].lower() in "aeiou" and class_name[:3].lower() not in ("uni", "use", "uti", "eur")
        article = "an" if vowel else "a"
        tail = tail.replace("objects", "an object", 1)
        text = f"Is it likely that the object in the description is {article} {class_name} or {tail}"
    return Question(text, (("Yes", "correct"), ("No", "incorrect")), "recognition")


def judge_message(caption: str, question: Question) -> str:
    """The one user message that the judge is sent for a question."""
    choices = "\n".join(f"{LETTERS[i].upper()}. {text}" for i, text in enumerate(question.choice_texts))
    return _MESSAGE.format(caption=caption, question=f"{question.text}\n{choices}".strip())


def parse_reply(reply: str, choices: Sequence[str]) -> int | None:
    """The choice that a judge's reply names, None if it names none, by the reference's rules in their order.

    The result can lie beyond the choices ("E. ..." of two). Raises IndexError where the reference does: for an empty
    reply, and for a bare letter that belongs to no choice and is no part of the only one found.
    """
    text = reply.strip().lower()
    lowered = [choice.strip().lower() for choice in choices]
    for i, choice in enumerate(lowered):
        if text in (choice, f"{LETTERS[i]}. {choice}", LETTERS[i]):
            return i
    inside = [(i, text.index(choice), len(choice)) for i, choice in enumerate(lowered) if choice in text]
    if len(inside) == 1:  # before the letter rule: "B. Yes" with the choices Yes, No is Yes
        return inside[0][0]
    if text[0] in LETTERS and text[1] == ".":
        return LETTERS.index(text[0])
    if inside:
        return max(inside, key=lambda m: (m[1], m[2], -m[0]))[0]
    around = [(len(choice), -i) for i, choice in enumerate(lowered) if text in choice]
    if around:
        return -max(around)[1]
    if text[0] in LETTERS and text[1] == "\n":
        return LETTERS.index(text[0])
    return None


def score_region(questions: Sequence[Question], replies: Sequence[str]) -> RegionScore:
    """Scores an annotation from the judge's replies. `questions` begins with the recognition question.

    When the object was not recognised nothing can earn points, but penalties stay.
    Raises IndexError for replies that stop the reference, ValueError for a recognition reply that names no choice
    and for counts that differ.
    """
    if len(questions) != len(replies):
        raise ValueError(f"{len(replies)} replies for {len(questions)} questions")
    if not questions or questions[0].type != "recognition":
        raise ValueError("the recognition question must come first")
    chosen = [parse_reply(reply, q.choice_texts) for q, reply in zip(questions, replies, strict=True)]
    earned = [0 if i is None else q.choices[i][1] for q, i in zip(questions, chosen, strict=True)]
    if earned[0] not in ("correct", "incorrect"):
        raise ValueError("the reply to the recognition question names no choice")
    recognized = earned[0] == "correct"
    answers = []
    for question, reply, choice, points in zip(questions[1:], replies[1:], chosen[1:], earned[1:], strict=True):
        score = float(points) if recognized else min(0.0, float(points))
        answers.append(Answer(question, reply, choice, score))
    return RegionScore(recognized, Answer(questions[0], replies[0], chosen[0], float(recognized)), tuple(answers))


def _is_plural(name: str) -> bool:
    last = name.lower().split()[-1] if name.strip() else ""
    plural = last.endswith("s") and not last.endswith("ss") and last not in _SINGULAR_S
    return plural or name.lower() in _PLURAL_IN_THE_RECORD


def mean(values: Sequence[float]) -> float:
    """The plain mean; raises ZeroDivisionError for none."""
    return sum(values) / len(values)
