"""Whether a phrase in a report-like sentence is stated, denied, hedged, or said of something else.

Rules in the manner of NegEx and ConText (Chapman 2001, Harkema 2009), written for captions of image regions: a cue
before the phrase ("no", "without", "rather than") reaches forward through lists to the end of its clause, a cue behind
it ("is not seen", "absent", "has resolved") reaches back through the list it closes.

Legend: a sentence is a list of folded words and punctuation marks (qa_library.terms); a span is [start, end) in it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from meddam_core.judging import cues
from qa_library.terms import Token, tokens

Status = Literal["stated", "denied", "ignored"]
"""ignored: said of another place, another lesion, or as a comparison."""


@dataclass(frozen=True, slots=True)
class Assertion:
    """How a phrase is meant."""

    status: Status
    hedged: bool = False


def sentences(text: str) -> list[list[str]]:
    """The sentences of a caption as folded words and marks; a line of a list is a sentence."""
    found: list[list[str]] = []
    for line in re.split(r"[\n\r•]+", re.sub(r"\s[-–—]+\s|[–—]", " : ", text)):
        current: list[str] = []
        for token in _words(line):
            if token in (".", "!", "?", ";"):
                found.append(current)
                current = []
            else:
                current.append(token)
        found.append(current)
    return [s for s in found if s]


def _words(line: str) -> list[str]:
    return [t.word for t in _decimals(tokens(line))]


def _decimals(found: list[Token]) -> list[Token]:
    """A full stop between two words without a space is no end of a sentence ("e.g.", "3.5")."""
    kept = []
    for i, token in enumerate(found):
        inner = token.word == "." and 0 < i < len(found) - 1 and found[i + 1].start == token.end
        if not inner:
            kept.append(token)
    return kept


def assertion(words: list[str], start: int, end: int, *, place: bool = False, subject: bool = False) -> Assertion:
    """How the phrase at words[start:end] is meant.

    `place`: the phrase is a place, which a comparison or a normal finding does not make the region's own.
    `subject`: what is said of the surroundings is not said of the region.
    """
    hedged = _hedged(words, start, end)
    before = _denied_before(words, start)
    if before == "ignored" or (subject and _elsewhere(words, start)) or (place and _not_own_place(words, start, end)):
        return Assertion("ignored")
    if place:
        direct = before == "denied" and "not" in words[max(0, start - 3) : start]
        return Assertion("denied" if direct else "ignored" if before == "denied" else "stated", hedged)
    denied = before == "denied" or _denied_after(words, end)
    return Assertion("denied" if denied else "stated", hedged)


def _denied_before(words: list[str], start: int) -> Status:
    verb = False
    for at in range(start - 1, max(-1, start - 1 - cues.LONG_REACH), -1):
        for cue in cues.NEGATIONS:
            after = at + len(cue)
            if after > start or tuple(words[at:after]) != cue:
                continue
            if start - after >= cues.REACH.get(cue, cues.LONG_REACH) or _negates_nothing(words, at, cue):
                continue
            if verb and cue == ("no",):
                continue  # "no solid part is present in this ground-glass nodule"
            return "ignored" if set(words[after : min(start, after + 2)]) & cues.OTHERS else "denied"
        if _breaks(words, at):
            return "stated"
        verb |= words[at] in cues.BE
    return "stated"


def _negates_nothing(words: list[str], at: int, cue: tuple[str, ...]) -> bool:
    """ "no change in", "not only", "cannot be excluded"; and "not seen", which belongs to what stands before it."""
    after = tuple(words[at + len(cue) : at + len(cue) + 2])
    if any(after[: len(p)] == p for p in cues.NO_NEGATION.get(cue[0], ())):
        return True
    if cue[0] in ("exclude", "excluded", "rule", "ruled"):
        return bool(set(words[max(0, at - 3) : at]) & {"not", "cannot", "difficult", "to", "be"})
    inverted = at > 0 and words[at - 1] in ("do", "does", "did")
    return cue == ("not",) and not inverted and _existence_follows(words, at)


def _existence_follows(words: list[str], at: int) -> bool:
    return bool(set(words[at + 1 : at + 4]) & cues.EXISTENCE)


def _breaks(words: list[str], at: int) -> bool:
    """Whether a clause ends at this word, so that a negation before it does not reach beyond."""
    word, after = words[at], words[at + 1] if at + 1 < len(words) else ""
    starts = after in cues.CLAUSE_STARTS or after in cues.VERBS
    if word == "than" and at > 0 and words[at - 1] == "other":
        return True
    if word in cues.BREAKS or (word in ("and", "plus") and starts) or (word == "with" and after in ("a", "an", "the")):
        return True
    if word != ",":
        return False
    if starts or (after in ("and", "so", "in", "as") and _new_clause(words, at + 1)):
        return True
    rest = words[at + 1 :]
    rest = rest[: next((i for i, w in enumerate(rest) if w in cues.BREAKS), len(rest))]
    if after.endswith("ly") and not {"or", "nor"} & set(rest):
        return True  # "without atypia, widely spaced"
    verb = next((i for i, w in enumerate(rest) if w in cues.VERBS), None)
    return verb is not None and not {"or", "nor", "and"} & set(rest[:verb])


def _new_clause(words: list[str], at: int) -> bool:
    """Whether ", and ..." begins a clause of its own rather than ending a list."""
    return words[at] in ("so", "as") or bool(set(words[at + 1 : at + 3]) & (cues.CLAUSE_STARTS | cues.VERBS))


def _denied_after(words: list[str], end: int) -> bool:
    comma = joined = False
    for at in range(end, min(len(words), end + 14)):
        word = words[at]
        one_subject = not comma or joined
        if word in (":", "(") and at - end <= 1:
            return bool(set(words[at + 1 : at + 2]) & cues.NOTHING)
        if word in ("none", "nil", "absent") and at - end <= 2:
            return True
        if word == "not" and _existence_follows(words, at):
            return one_subject
        if word in ("be", "been") and words[at - 1] in ("cannot", "not"):
            return False  # "cannot be excluded"
        if word in cues.BE:
            return one_subject and _negative_predicate(words[at + 1 : at + 7])
        if word in cues.BREAKS or word in cues.VERBS or word in ("without", "no", "with"):
            return False
        comma |= word == ","
        joined |= word in ("and", "or", "nor")
    return False


def _negative_predicate(after: list[str]) -> bool:
    """What follows "is" or "has": does it say that the subject is not there?"""
    after = after[: next((i for i, w in enumerate(after) if w in cues.BREAKS or w == ","), len(after))]
    if after[:2] == ["no", "longer"]:
        return True
    if "not" in after[:2]:
        rest = after[after.index("not") + 1 :]
        if rest[:1] and rest[0] in ("only", "excluded", "necessarily", "be", "changed"):
            return False
        return not rest or bool(set(rest[:3]) & (cues.EXISTENCE | {"there"}))
    return "ruled" in after[:3] or bool(set(after[:4]) & cues.GONE)


def _hedged(words: list[str], start: int, end: int) -> bool:
    near = words[max(0, start - 8) : start] + words[end : end + 6]
    return bool(cues.HEDGES & set(near))


def _elsewhere(words: list[str], start: int) -> bool:
    """ "the surrounding lung has ..." before the phrase, in its clause."""
    for at in range(start - 1, max(-1, start - 9), -1):
        if _breaks(words, at) or words[at] == ",":
            return False
        if words[at] in cues.SURROUNDINGS and set(words[at + 1 : at + 4]) & cues.PLACES:
            return True
    return False


def _not_own_place(words: list[str], start: int, end: int) -> bool:
    """A place in a comparison ("than the left"), or one that is said to be normal ("the right lung is clear")."""
    for cue in cues.COMPARED:
        for at in range(max(0, start - 8), start):
            if tuple(words[at : at + len(cue)]) == cue and "," not in words[at:start]:
                return True
    for at in range(end, min(len(words), end + 7)):
        if words[at] in cues.BREAKS or words[at] == ",":
            break
        if words[at] in cues.UNAFFECTED and "not" not in words[end:at]:
            return True
        if words[at] == "no" and set(words[at + 1 : at + 4]) & {"abnormality", "abnormal", "lesion", "finding"}:
            return True
    return start > 0 and words[start - 1] in ("normal", "clear")
