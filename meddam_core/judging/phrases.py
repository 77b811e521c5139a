"""Where in a caption its claims stand: spans of the text as it was written, each with the attribute it speaks of.

for phrase in phrases("Spiculated nodule, left lung.", template_set):
    caption[phrase.start : phrase.end]
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from meddam_core.judging.assertion import Status, sentences
from meddam_core.judging.claims import library_attributes
from meddam_core.judging.lexical import mentions
from qa_library.schema import TemplateSet
from qa_library.terms import tokens

_LOOK_AHEAD = 6
"""Words that the rules may add or drop between two words of the text (a dash becomes a mark)."""
_EDGES = ".,;:!?()[]\"'’‘“”"


@dataclass(frozen=True, slots=True, kw_only=True)
class Phrase:
    """Words of a caption that state or deny one value."""

    start: int
    end: int
    attribute: str
    value: str
    status: Status
    hedged: bool = False


def phrases(caption: str, template_set: TemplateSet) -> list[Phrase]:
    """The phrases of a caption in their order; of two that overlap the longer."""
    places = _places(caption)
    found: list[Phrase] = []
    for attribute in library_attributes(template_set):
        if attribute.kind == "measure":
            continue
        for mention in mentions(attribute, caption, template_set):
            spans = [s for s in places[mention.sentence][mention.start : mention.end] if s is not None]
            if spans and mention.status != "ignored":
                found.append(
                    Phrase(
                        start=min(s for s, _ in spans), end=max(e for _, e in spans), attribute=attribute.id,
                        value=mention.value, status=mention.status, hedged=mention.hedged,
                    )
                )  # fmt: skip
    kept: list[Phrase] = []
    for phrase in sorted(found, key=lambda p: (p.start - p.end, p.start)):
        if not any(phrase.start < other.end and other.start < phrase.end for other in kept):
            kept.append(phrase)
    return sorted(kept, key=lambda p: p.start)


def _places(caption: str) -> list[list[tuple[int, int] | None]]:
    """For each word of each sentence, as the rules read them, where it stands in the caption; None if nowhere."""
    written: list[tuple[str, tuple[int, int]]] = []
    for chunk in re.finditer(r"[^\s–—]+|[–—]", caption):
        left = len(chunk.group()) - len(chunk.group().lstrip(_EDGES))
        right = len(chunk.group().rstrip(_EDGES))
        span = (chunk.start() + left, chunk.start() + right) if left < right else chunk.span()
        written += [(token.word, span) for token in tokens(chunk.group())]
    at, places = 0, []
    for sentence in sentences(caption):
        own: list[tuple[int, int] | None] = []
        for word in sentence:
            ahead = next((i for i in range(at, min(len(written), at + _LOOK_AHEAD)) if written[i][0] == word), None)
            own.append(None if ahead is None else written[ahead][1])
            at = at if ahead is None else ahead + 1
        places.append(own)
    return places
