"""What a model's reply says: one option, a refusal, or nothing that can be counted on.

Strict on purpose: a reply that names two options, or gives a letter and another option's text, names none.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from qa_library.questions import Option

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
CHOICE_KEY = "choice"

_FENCE = re.compile(r"^```(?:json)?\s*(.*?)\s*```$", re.DOTALL)
_LETTER = re.compile(
    r"^(?:the\s+)?(?:(?:correct\s+)?(?:answer|choice|option)\s*(?:is|:)?\s*)?[(\[\"'*]*([A-Za-z])[)\]\"'*]*[.:]?$", re.I
)
_LETTER_AND_TEXT = re.compile(r"^[(\[*]*([A-Za-z])[)\]*]*[.):]\s*(\S.*)$", re.DOTALL)
_REFUSAL = re.compile(
    r"\b(i(?:'m| am) sorry|i can(?:no|')t (?:help|assist|answer|provide|comply)|i am unable|i'm unable|as an ai)\b",
    re.I,
)


def parse_choice(reply: str, options: Sequence[Option]) -> str | None:
    """The id of the one option that a reply names, by letter, by id, by its text, or by letter and text that agree."""
    text = reply.strip()
    fenced = _FENCE.match(text)
    if fenced:
        text = fenced.group(1)
    if text.startswith("{"):
        return _from_json(text, options)
    return _from_text(text, options)


def is_refusal(reply: str) -> bool:
    """Whether a reply says that it won't answer."""
    return bool(_REFUSAL.search(reply.replace("’", "'")[:200]))


def _from_json(text: str, options: Sequence[Option]) -> str | None:
    try:
        content = json.loads(text)
    except ValueError:
        return None
    if not isinstance(content, dict) or not isinstance(content.get(CHOICE_KEY), str):
        return None
    return _from_text(content[CHOICE_KEY].strip(), options)


def _from_text(text: str, options: Sequence[Option]) -> str | None:
    for option in options:
        if text.casefold() == option.id.casefold() or _same(text, option.text):
            return option.id
    letter = _LETTER.match(text)
    if letter:
        return _by_letter(letter.group(1), options)
    both = _LETTER_AND_TEXT.match(text)
    if both:
        chosen = _by_letter(both.group(1), options)
        named = next((o.id for o in options if _same(both.group(2), o.text)), None)
        return chosen if chosen == named else None
    return None


def _by_letter(letter: str, options: Sequence[Option]) -> str | None:
    at = LETTERS.find(letter.upper())
    return options[at].id if 0 <= at < len(options) else None


def _same(a: str, b: str) -> bool:
    return a.strip(" .\n\"'").casefold() == b.strip(" .\n\"'").casefold()
