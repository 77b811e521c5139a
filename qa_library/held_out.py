"""Questions in other words: a second wording of every question, kept for tests.

    held_out_question(question, template_set)      # the same question, options and truth; other text

Whoever curates or tunes by verdicts on one wording may learn what pleases it. A test that is worded apart shows whether
what was learnt is more than that. The meaning is the same: ids, expected options and their order are untouched.
"""

from __future__ import annotations

from dataclasses import replace

from qa_library.questions import NO, NOT_MENTIONED, OTHERWISE, STATED, YES, Option, Question
from qa_library.schema import TemplateSet
from qa_library.wording import tolerance_range

SUFFIX = "+held-out"
"""Ends the template ids of these questions."""


def held_out_question(question: Question, template_set: TemplateSet) -> Question:
    """The question in its held-out wording. Raises ValueError where the template set has none."""
    if question.kind == "recognition":
        text, words = _recognition(question, template_set), {YES: "It agrees.", NO: "It does not."}
    else:
        name = template_set.attribute(question.attribute).name
        text, words = _text(question, template_set, name), _words(question, name)
    options = tuple(Option(id=o.id, text=words.get(o.id, o.text)) for o in question.options)
    return replace(question, text=text, options=options, template_id=question.template_id + SUFFIX)


def _recognition(question: Question, template_set: TemplateSet) -> str:
    recognition = template_set.recognition
    if recognition.attribute is None:
        if not recognition.held_out:
            raise ValueError(f"{template_set.id} has no held_out wording of its recognition question; give it one")
        return recognition.held_out
    name = template_set.attribute(recognition.attribute).value(question.value).name
    wording = recognition.held_out or (
        "Claim about the marked region: it shows {value}, or something of the same kind. Does the description agree?"
    )
    return wording.format(value=name)


def _text(question: Question, template_set: TemplateSet, attribute: str) -> str:
    if question.kind == "choice":
        return f"Going by the description alone, what can be filled in for {attribute}?"
    if question.kind == "measure":
        assert question.truth is not None
        low, high = tolerance_range(template_set.attribute(question.attribute), question.truth)
        return f"Claim about {attribute}: {low:.0f} to {high:.0f} mm. What does the text say to it?"
    name = template_set.attribute(question.attribute).value(question.value).name
    return f"Claim about {attribute}: {name}. What does the text say to it?"


def _words(question: Question, attribute: str) -> dict[str, str]:
    if question.kind == "choice":
        return {
            OTHERWISE: f"Something that is not on this list, or no more than what {attribute} is not.",
            NOT_MENTIONED: "It leaves this open.",
        }
    if question.kind == "measure":
        return {
            STATED: "It bears the claim out: a length in this range is given.",
            OTHERWISE: "It contradicts: the length given is another one.", NOT_MENTIONED: "It gives no length.",
        }  # fmt: skip
    return {
        STATED: "It bears the claim out.",
        OTHERWISE: f"It contradicts the claim, by denying it or by another statement about {attribute}.",
        NOT_MENTIONED: "It leaves the claim open.",
    }
