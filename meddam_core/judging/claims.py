"""A claim audit: a caption cut into claims, each supported, contradicted or unverifiable by known labels.

    for claim in audit("A spiculated nodule in the left lung, likely benign.", template_set, truth):
        claim.text, claim.verdict                  # "spiculated" supported ...

Needs no judge and no question table: words and relations come from the question library, negation and hedging from the
rules of the lexical judge, and it errs where that does (docs/lexical_judge.md).

Notes:
- A claim is a value of an attribute that the caption states or denies, once a caption; or a length.
- Stated and known to be there, or denied and known to be absent: supported. The other way round: contradicted.
- What the labels leave open is unverifiable, and so is a clause that speaks of nothing in the library.
- A broader or narrower word for what is there (an opacity where a consolidation is) is not contradicted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from meddam_core.judging.assertion import Status, sentences
from meddam_core.judging.lexical import Mention, lengths_mm, mentions
from qa_library.schema import Attribute, TemplateSet, Value
from qa_library.truth import MEASURE, Truth
from qa_library.wording import tolerance_range

ClaimVerdict = Literal["supported", "contradicted", "unverifiable"]
VERDICTS: tuple[ClaimVerdict, ...] = ("supported", "contradicted", "unverifiable")
KIND = "kind"
"""The attribute of claims about what sort of region it is, where the set has one class ("nodule")."""
FREE = ""
"""The attribute of clauses that speak of nothing in the library."""
MIN_FREE_WORDS = 3
_CLAUSE_ENDS = frozenset({",", ":", "(", ")", "but", "while", "which", "with", "without", "and"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """One thing that a caption says."""

    text: str
    """Its words, folded as the rules read them."""
    attribute: str
    value: str
    status: Status
    """stated or denied."""
    verdict: ClaimVerdict
    hedged: bool = False


def audit(caption: str, template_set: TemplateSet, truth: Truth) -> list[Claim]:
    """The claims of a caption, attribute by attribute, then what is left of its clauses."""
    words = sentences(caption)
    found: list[Claim] = []
    spoken: set[tuple[int, int]] = set()
    for attribute in library_attributes(template_set):
        if attribute.kind == "measure":
            found += _lengths(caption, attribute, truth)
            continue
        spoken_of = mentions(attribute, caption, template_set)
        spoken |= {(m.sentence, at) for m in spoken_of for at in range(m.start, m.end)}
        found += _claims(attribute, spoken_of, words, truth)
    return found + _free(words, spoken, any(a.kind == "measure" for a in template_set.attributes))


def library_attributes(template_set: TemplateSet) -> list[Attribute]:
    """The set's attributes, and for a set of one class that class."""
    recognition = template_set.recognition
    if recognition.attribute is not None:
        return list(template_set.attributes)
    kind = Value(id=template_set.id, name=recognition.terms[0], terms=recognition.terms, decoys=recognition.decoys)
    return [Attribute(id=KIND, name="the kind of region", values=(kind,)), *template_set.attributes]


def _claims(attribute: Attribute, found: Sequence[Mention], words: list[list[str]], truth: Truth) -> list[Claim]:
    claims: dict[tuple[str, Status], Claim] = {}
    stated = {m.value for m in found if m.status == "stated"}
    for mention in found:
        key = (mention.value, mention.status)
        if mention.status == "ignored" or key in claims:
            continue
        text = " ".join(words[mention.sentence][mention.start : mention.end])
        claims[key] = Claim(
            text=text, attribute=attribute.id, value=mention.value, status=mention.status,
            verdict=_verdict(attribute, mention, stated, truth), hedged=mention.hedged,
        )  # fmt: skip
    return list(claims.values())


def _verdict(attribute: Attribute, mention: Mention, stated: set[str], truth: Truth) -> ClaimVerdict:
    said_so = mention.status == "stated"
    if attribute.id == KIND:
        return "supported" if said_so else "contradicted"
    state = truth.state(attribute.id, mention.value)
    if state == "present":
        return "supported" if said_so else "contradicted"
    for whole, parts in attribute.combinations.items():
        if (
            said_so
            and mention.value in parts
            and stated >= set(parts)
            and truth.state(attribute.id, whole) == "present"
        ):
            return "supported"  # "a solid part and a ground-glass part" of a part-solid nodule
    if state == "absent":
        if not said_so:
            return "supported"
        return "unverifiable" if _same_by_another_name(attribute.value(mention.value), truth) else "contradicted"
    return "unverifiable"


def _same_by_another_name(value: Value, truth: Truth) -> bool:
    """Whether something that is there holds this value, is held by it, or cannot be told from it."""
    return any(
        value.id in fact.value.never_negative_with or fact.value.id in value.never_negative_with
        for fact in truth.present()
    )


def _lengths(caption: str, attribute: Attribute, truth: Truth) -> list[Claim]:
    known = truth.facts.get((attribute.id, MEASURE.id))
    claims = []
    for length in dict.fromkeys(lengths_mm(caption)):
        verdict: ClaimVerdict = "unverifiable"
        if known is not None and known.number is not None and known.state == "present":
            low, high = tolerance_range(attribute, known.number)
            verdict = "supported" if low <= length <= high else "contradicted"
        claims.append(
            Claim(text=f"{length:g} mm", attribute=attribute.id, value=MEASURE.id, status="stated", verdict=verdict)
        )
    return claims


def _free(words: list[list[str]], spoken: set[tuple[int, int]], measures: bool) -> list[Claim]:
    """Clauses without a word of the library; a length is one where the set `measures`."""
    claims = []
    for number, sentence in enumerate(words):
        start = 0
        for at in range(len(sentence) + 1):
            if at < len(sentence) and sentence[at] not in _CLAUSE_ENDS:
                continue
            clause = sentence[start:at]
            told = any((number, i) in spoken for i in range(start, at)) or (measures and lengths_mm(" ".join(clause)))
            if len(clause) >= MIN_FREE_WORDS and not told:
                claims.append(
                    Claim(text=" ".join(clause), attribute=FREE, value="", status="stated", verdict="unverifiable")
                )
            start = at + 1
    return claims


@dataclass(slots=True)
class ClaimTally:
    """Counts over many captions; sums, so that tallies of files add up."""

    num_captions: int = 0
    num_contradicted_captions: int = 0
    """Captions with at least one contradicted claim."""
    num_known: int = 0
    """Facts that are known to be there and can be asked about."""
    num_known_stated: int = 0
    verdicts: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Counts by (attribute, verdict)."""
    contradictions: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    """Counts by (attribute, value claimed, stated or denied)."""

    def add(self, claims: Iterable[Claim], truth: Truth) -> None:
        """Counts one caption."""
        claims = list(claims)
        self.num_captions += 1
        self.num_contradicted_captions += any(c.verdict == "contradicted" for c in claims)
        known = {k for k, f in truth.facts.items() if f.state == "present" and f.value.ask and f.number is None}
        stated = {(c.attribute, c.value) for c in claims if c.verdict == "supported" and c.status == "stated"}
        self.num_known += len(known)
        self.num_known_stated += len(known & stated)
        for claim in claims:
            self.verdicts[claim.attribute, claim.verdict] += 1
            if claim.verdict == "contradicted":
                self.contradictions[claim.attribute, claim.value, claim.status] += 1

    def count(self, verdict: ClaimVerdict) -> int:
        """Claims with a verdict."""
        return sum(n for (_, v), n in self.verdicts.items() if v == verdict)

    @property
    def precision(self) -> float | None:
        """Share of supported claims among those that can be verified; None where none can."""
        supported, contradicted = self.count("supported"), self.count("contradicted")
        return supported / (supported + contradicted) if supported + contradicted else None

    @property
    def recall(self) -> float | None:
        """Share of the known facts that captions state; None where nothing is known."""
        return self.num_known_stated / self.num_known if self.num_known else None
