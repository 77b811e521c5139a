"""The offline judge: the question library's words, with rules for negation, hedging, sides and sizes.

    judge = LexicalJudge(load_library())
    judge.judge(question, "A solid nodule without spiculation.").choice

Notes:
- Deterministic, needs no network and no model. docs/lexical_judge.md states how often it is right, and where it errs.
- Its words come from the templates of qa_library, which come from the field's vocabularies; it knows nothing of how
  any caption was made.
- A finding stated as possible counts as stated, and is marked as hedged.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, replace
from functools import cache, lru_cache

from meddam_core.judging import cues
from meddam_core.judging.assertion import Status, assertion, sentences
from meddam_core.judging.protocol import Unscored, Verdict, decided, unscored
from meddam_core.records import Egress
from qa_library.loader import Library, load_library
from qa_library.questions import NO, NOT_MENTIONED, OTHERWISE, STATED, YES, Question
from qa_library.schema import Attribute, TemplateSet, Value
from qa_library.terms import compile_term, fold, may_stand, positions, singular
from qa_library.wording import tolerance_range

VERSION = 1
"""Changes when the rules do."""
HEAD_REACH = 6
"""Words between an adjective and its head noun."""

_IN_GAPS = frozenset({"not", "no", "without", "never", "neither", "nor", "lack", "lacking", "absent"})
_SIDES = {"left": "right", "right": "left"}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(?:(?:x|by|×)\s*(\d+(?:\.\d+)?)\s*)?-?\s*(mm|millimet|cm|centimet)")


@dataclass(frozen=True, slots=True)
class Mention:
    """A value that a caption speaks of."""

    value: str
    status: Status
    hedged: bool
    sentence: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class _Span:
    """Where a term stands in a sentence."""

    start: int
    end: int
    gapped: bool
    """Other words stand in its gap."""
    negated: bool
    """A negation stands in its gap: "the heart is not enlarged"."""
    denial: bool = False
    """Words that deny the value rather than state it."""


class LexicalJudge:
    """Answers questions from the words of a caption alone."""

    def __init__(self, library: Library | None = None) -> None:
        self.library = library or load_library()

    @property
    def id(self) -> str:
        """Names the rules and the words."""
        return f"lexical-{VERSION}@{self.library.version}"

    async def answer(self, question: Question, caption: str, egress: Egress = "deny") -> Verdict:
        """As `judge`; nothing leaves the process."""
        return self.judge(question, caption)

    def judge(self, question: Question, caption: str) -> Verdict:
        """The verdict on one caption; unscored for questions of a template set that the library does not have."""
        template_set = self.library.sets.get(question.template_set)
        if template_set is None:
            return unscored(question, Unscored.CANNOT_JUDGE, self.id)
        if question.kind == "recognition":
            recognised = recognises(template_set, question.value, caption)
            return decided(question, YES if recognised else NO, self.id)
        attribute = template_set.attribute(question.attribute)
        if question.kind == "measure":
            assert question.truth is not None
            return decided(question, size_stated(attribute, question.truth, caption), self.id)
        if question.kind == "choice":
            choice, hedged = value_stated(template_set, attribute, caption)
        else:
            choice, hedged = how_stated(template_set, attribute, question.value, caption)
        return decided(question, choice, self.id, hedged=hedged)


def recognises(template_set: TemplateSet, value_id: str, caption: str) -> bool:
    """Whether the caption is about the region's finding, or one of its kind."""
    recognition = template_set.recognition
    if recognition.attribute is None:
        any_lesion = Value(id="any", name="any", terms=recognition.terms, decoys=recognition.decoys)
        carrier = Attribute(id="recognition", name="recognition", values=(any_lesion,))
        return any(m.status == "stated" for m in mentions(carrier, caption))
    attribute = template_set.attribute(recognition.attribute)
    same_kind = {value_id, *attribute.value(value_id).kin}
    return any(m.value in same_kind and m.status == "stated" for m in mentions(attribute, caption, template_set))


def how_stated(template_set: TemplateSet, attribute: Attribute, value_id: str, caption: str) -> tuple[str, bool]:
    """Whether the caption states a value, says otherwise, or does not mention it; and whether as possible only."""
    found = mentions(attribute, caption, template_set)
    own = [m for m in found if m.value == value_id]
    stated = [m for m in own if m.status == "stated"]
    if attribute.kind == "choice" and stated:
        chosen, hedged = value_stated(template_set, attribute, caption)
        combined = chosen in attribute.combinations and value_id in attribute.combinations[chosen]
        return (OTHERWISE if combined else STATED), hedged
    if stated:
        return STATED, all(m.hedged for m in stated)
    if any(m.status == "denied" for m in own):
        return OTHERWISE, False
    others = attribute.others_address or attribute.kind == "choice"
    if others and any(m.status == "stated" for m in found):
        return OTHERWISE, False
    if _normal(template_set, caption) and not any(m.status == "stated" for m in found):
        return OTHERWISE, False
    return NOT_MENTIONED, False


def value_stated(template_set: TemplateSet, attribute: Attribute, caption: str) -> tuple[str, bool]:
    """The one value that the caption gives an exclusive attribute: the most often stated, of equals the first."""
    found = mentions(attribute, caption, template_set)
    stated = [m for m in found if m.status == "stated"]
    if not stated:
        return (OTHERWISE if any(m.status == "denied" for m in found) else NOT_MENTIONED), False
    certain = [m for m in stated if not m.hedged] or stated
    values = {m.value for m in certain}
    for whole, parts in attribute.combinations.items():
        if values >= set(parts) or whole in values:
            return whole, certain is stated and all(m.hedged for m in stated)
    counts = Counter(m.value for m in certain)
    first = {m.value: -i for i, m in reversed(list(enumerate(certain)))}
    best = max(counts, key=lambda v: (counts[v], first[v]))
    return best, all(m.hedged for m in stated if m.value == best)


def size_stated(attribute: Attribute, truth_mm: float, caption: str) -> str:
    """Whether a length in the caption agrees with the truth."""
    low, high = tolerance_range(attribute, truth_mm)
    lengths = lengths_mm(caption)
    if any(low <= length <= high for length in lengths):
        return STATED
    return OTHERWISE if lengths else NOT_MENTIONED


def lengths_mm(caption: str) -> list[float]:
    """Every length in a caption, in mm; of "12 x 9 mm" the longer."""
    text = fold(caption).replace("×", "x")
    text = re.sub(r"\b(" + "|".join(cues.NUMBERS) + r")\b", lambda m: str(cues.NUMBERS[m.group()]), text)
    found = []
    for match in _SIZE.finditer(text):
        length = max(float(n) for n in match.groups()[:2] if n)
        found.append(length * (10 if match.group(3).startswith("c") else 1))
    return found


def mentions(attribute: Attribute, caption: str, template_set: TemplateSet | None = None) -> list[Mention]:
    """Every value of an attribute that a caption speaks of, in the order of the text.

    An adjective belongs to the nearest noun among the heads of all the set's attributes.
    """
    others = template_set.attributes if template_set is not None else ()
    rivals = frozenset(singular(fold(h)) for a in others for h in a.heads) - {
        singular(fold(h)) for h in attribute.heads
    }
    found: list[Mention] = []
    for number, words in enumerate(_sentences(caption)):
        found += _in_sentence(attribute, rivals, words, number)
    if attribute.binary and not any(m.status == "stated" for m in found):
        other = dict(zip(*_pair(attribute), strict=True))
        found += [replace(m, value=other[m.value], status="stated") for m in found if m.status == "denied"]
    return found


def _pair(attribute: Attribute) -> tuple[list[str], list[str]]:
    ids = [v.id for v in attribute.values]
    return ids, ids[::-1]


@lru_cache(maxsize=4096)
def _sentences(caption: str) -> tuple[list[str], ...]:
    return tuple(sentences(caption))


def _in_sentence(attribute: Attribute, rivals: frozenset[str], words: list[str], number: int) -> list[Mention]:
    exclusive, index = attribute.kind == "choice", positions(words)
    spans: list[tuple[Value, _Span]] = []
    for value in attribute.values:
        denials = _spans(value.denials, words, index)
        hidden = [*_spans(value.decoys, words, index), *denials]
        terms = _spans(value.terms, words, index, exclusive)
        terms += [
            s for s in _spans(value.adjectives, words, index) if _head_near(attribute, rivals, words, s.start, s.end)
        ]
        for span in terms:
            if any(h.start <= span.start and span.end <= h.end for h in hidden):
                continue
            if exclusive and span.gapped and (span.negated or _denied(attribute, words, span)):
                continue  # "ground glass without a solid component" is not the pair of both
            spans.append((value, span))
        spans += [(value, replace(span, denial=True)) for span in denials]
    if exclusive:
        spans = _longest(spans)
    return sorted((_mention(attribute, words, number, *span) for span in spans), key=lambda m: m.start)


def _denied(attribute: Attribute, words: list[str], span: _Span) -> bool:
    return assertion(words, span.start, span.end, place=attribute.place).status == "denied"


def _mention(attribute: Attribute, words: list[str], number: int, value: Value, span: _Span) -> Mention:
    meant = assertion(words, span.start, span.end, place=attribute.place, subject=attribute.kind == "choice")
    status, value_id = meant.status, value.id
    if attribute.image_sides and value_id in _SIDES and _of_the_image(words, span.start, span.end):
        value_id = _SIDES[value_id]
    if span.denial and span.negated:
        status = "stated"
    elif span.negated or (span.denial and words[span.start] == "non"):
        status = "denied"
    elif span.denial and status == "denied":  # "are not sharp" states what "are sharp" denies; "nor ..." says nothing
        status = "stated" if "not" in words[max(0, span.start - 3) : span.start] else "ignored"
    elif span.denial and status == "stated":
        status = "denied"
    return Mention(value_id, status, meant.hedged, number, span.start, span.end)


def _spans(
    terms: tuple[str, ...], words: list[str], index: dict[str, list[int]], exclusive: bool = False
) -> list[_Span]:
    """Where terms stand. A gap may hold a list ("fractures of the fifth and sixth ribs") but no second statement."""
    found: list[_Span] = []
    if not may_stand(terms, index):
        return found
    for term in terms:
        pattern = compile_term(term)
        for start in pattern.starts(index):
            end = pattern.match(words, start)
            if end is None:
                continue
            fixed = {w for place in pattern.places if place for w in place}
            gap = [w for w in words[start:end] if w not in fixed] if None in pattern.places else []
            if _two_statements(gap, exclusive):
                continue
            negated = bool(_IN_GAPS & set(gap))
            found.append(_Span(start, end, bool(gap), negated))
    return found


def _two_statements(gap: list[str], exclusive: bool) -> bool:
    """Whether the words in a gap belong to two statements, so that its ends do not belong together."""
    if {"but", "rather", "than", "opposed", "instead", "while", "whereas"} & set(gap) or (exclusive and "or" in gap):
        return True
    if "and" not in gap:
        return False
    before, after = set(gap[: gap.index("and")]), set(gap[gap.index("and") :])
    return bool(before & (cues.UNAFFECTED | cues.VERBS) or after & (cues.UNAFFECTED | cues.BE - {"are", "were"}))


def _longest(spans: list[tuple[Value, _Span]]) -> list[tuple[Value, _Span]]:
    """Of overlapping words of an exclusive attribute the longest phrase: "part solid" is not "solid"."""
    kept: list[tuple[Value, _Span]] = []
    for value, span in sorted(spans, key=lambda s: s[1].start - s[1].end):
        if not any(span.start < other.end and other.start < span.end for _, other in kept):
            kept.append((value, span))
    return kept


def _head_near(attribute: Attribute, rivals: frozenset[str], words: list[str], start: int, end: int) -> bool:
    """Whether the noun nearest to an adjective, in its clause, is a head of the attribute and not of another one."""
    own = {_head(h) for h in attribute.heads}
    best: tuple[float, bool] | None = None
    for step, stop in ((-1, max(-1, start - HEAD_REACH - 1)), (1, min(len(words), end + HEAD_REACH))):
        for at in range(start - 1 if step < 0 else end, stop, step):
            if words[at] in (";", "but", "however", "(", ")"):
                break
            mine = any(words[at] == h or (len(h) > 3 and words[at].startswith(h)) for h in own)
            if not mine and words[at] not in rivals:
                continue
            distance = at - end if step > 0 else start - 1 - at + 0.5  # of equals the noun that follows
            if best is None or distance < best[0]:
                best = (distance, mine)
            break
    return best is not None and best[1]


@cache
def _head(noun: str) -> str:
    return singular(fold(noun))


def _of_the_image(words: list[str], start: int, end: int) -> bool:
    """ "left side of the image" is the side of the picture, not of the patient."""
    if start > 0 and words[start - 1] in ("image", "picture", "screen", "viewer"):
        return True
    after = words[end : end + 6]
    if "of" in after:
        return bool(set(after[after.index("of") + 1 :][:3]) & cues.PICTURE)
    return bool(set(after[:2]) & {"image", "picture", "frame", "screen"})


def _normal(template_set: TemplateSet, caption: str) -> bool:
    return any(_spans(template_set.normal, words, positions(words)) for words in _sentences(caption))
