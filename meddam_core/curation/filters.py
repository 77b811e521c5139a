"""Filters: each looks at one caption and says why it is dropped, or lets it pass.

    for kept in passing(candidates, filters_of(Rules(min_logprob=-0.5)), note=dropped.append): ...

Filters come in a fixed order, cheap ones first; a caption is dropped by the first that objects, and only that one is
noted. Filters that count (per patient, per value, per wording) see only what the others let through, in the order of
the table, so that the same captions give the same set.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from meddam_core.curation.candidate import Candidate, words

HEDGES = frozenset((
    "may", "might", "could", "possibly", "possible", "probable", "probably", "likely", "suspected", "suspicious",
    "seems", "perhaps", "questionable", "suggesting", "suggests", "suggestive",
))  # fmt: skip
"""Words by which a caption leaves open what it states. The MedDAM-prompt asks for none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """Which captions become training data. None switches a filter off."""

    min_logprob: float | None = None
    """Mean log-probability of the caption's tokens."""
    min_agreement: float | None = None
    """Mean likeness to the other samples of the region."""
    min_verdicts: float | None = None
    """Share of a judge's verdicts that are right."""
    min_truth: float | None = None
    """Share of questions on the region's own labels that the lexical judge finds answered rightly."""
    min_words: int = 3
    max_words: int = 120
    max_hedges: int | None = 0
    max_repetition: float = 0.3
    """Share of word triples that occur before in the same caption."""
    max_same_text: int | None = None
    """Captions with the same words."""
    max_per_patient: int | None = None
    balance: tuple[str, ...] = ()
    """Labels whose values are balanced: none is more than `balance_ratio` times as frequent as the rarest so far.
    Where a region has no such label, what the caption states counts."""
    balance_ratio: float = 3.0


Filter = Callable[[Candidate], str | None]
"""Why a caption is dropped; None lets it pass."""


@dataclass(frozen=True, slots=True)
class Drop:
    """A caption that was dropped."""

    candidate: Candidate
    filter: str
    why: str


def passing(
    candidates: Iterable[Candidate], filters: dict[str, Filter], note: Callable[[Drop], None]
) -> Iterator[Candidate]:
    """The captions that no filter objects to; `note` is told of all others."""
    for candidate in candidates:
        for name, objection in filters.items():
            why = objection(candidate)
            if why is not None:
                note(Drop(candidate, name, why))
                break
        else:
            yield candidate


def filters_of(rules: Rules) -> dict[str, Filter]:
    """The filters that the rules ask for, in their order. Each call gives fresh counters."""
    found: dict[str, Filter] = {"status": _status, "length": _length(rules), "repetition": _repetition(rules)}
    if rules.max_hedges is not None:
        found["hedging"] = _hedging(rules.max_hedges)
    thresholds: list[tuple[str, float | None, Callable[[Candidate], float | None], str]] = [
        ("confidence", rules.min_logprob, lambda c: c.caption.mean_logprob, "mean log-probability"),
        ("agreement", rules.min_agreement, lambda c: c.agreement, "agreement with the other samples"),
        ("verdicts", rules.min_verdicts, lambda c: c.verdict_share, "share of right verdicts"),
        ("truth", rules.min_truth, lambda c: c.truth_share, "share of labels that are told rightly"),
    ]
    for name, least, value, title in thresholds:
        if least is not None:
            found[name] = _at_least(least, value, title)
    if rules.max_same_text is not None:
        found["same_text"] = _same_text(rules.max_same_text)
    if rules.max_per_patient is not None:
        found["patient"] = _per_patient(rules.max_per_patient)
    if rules.balance:
        found["balance"] = _balance(rules.balance, rules.balance_ratio)
    return found


def _status(candidate: Candidate) -> str | None:
    caption = candidate.caption
    if caption.status != "ok" or not caption.text:
        return f"the caption is {caption.status}" if caption.status != "ok" else "the caption is empty"
    return None


def _length(rules: Rules) -> Filter:
    def objection(candidate: Candidate) -> str | None:
        count = len(words(candidate.caption.text or ""))
        if not rules.min_words <= count <= rules.max_words:
            return f"{count} words; wanted are {rules.min_words} to {rules.max_words}"
        return None

    return objection


def _repetition(rules: Rules) -> Filter:
    def objection(candidate: Candidate) -> str | None:
        found = words(candidate.caption.text or "")
        triples = list(zip(found, found[1:], found[2:], strict=False))
        share = 1 - len(set(triples)) / len(triples) if triples else 0.0
        return f"{share:.0%} of its word triples are repeated" if share > rules.max_repetition else None

    return objection


def _hedging(most: int) -> Filter:
    def objection(candidate: Candidate) -> str | None:
        count = sum(w in HEDGES for w in words(candidate.caption.text or ""))
        return f"{count} words leave open what is stated" if count > most else None

    return objection


def _at_least(least: float, value: Callable[[Candidate], float | None], title: str) -> Filter:
    def objection(candidate: Candidate) -> str | None:
        found = value(candidate)
        if found is None:
            return f"its {title} is not known"
        return f"its {title} is {found:.3f}, below {least:g}" if found < least else None

    return objection


def _same_text(most: int) -> Filter:
    counts: Counter[tuple[str, ...]] = Counter()

    def objection(candidate: Candidate) -> str | None:
        key = tuple(sorted(set(words(candidate.caption.text or ""))))
        counts[key] += 1
        return f"{most} captions say the same already" if counts[key] > most else None

    return objection


def _per_patient(most: int) -> Filter:
    counts: Counter[str] = Counter()

    def objection(candidate: Candidate) -> str | None:
        key = candidate.caption.patient_key or candidate.caption.image_key
        counts[key] += 1
        return f"{most} captions are of this patient already" if counts[key] > most else None

    return objection


def _balance(names: tuple[str, ...], ratio: float) -> Filter:
    counts: dict[str, Counter[str]] = {name: Counter() for name in names}

    def objection(candidate: Candidate) -> str | None:
        known = {label.name: label.value for label in candidate.caption.labels}
        values = {n: v for n, v in {**candidate.stated, **known}.items() if n in counts}
        for name, value in values.items():
            seen = counts[name]
            rarest = min((n for v, n in seen.items() if v != value), default=0)
            if seen[value] >= ratio * max(rarest, 4):
                return f"{name}={value} is more than {ratio:g} times as frequent as another value"
        for name, value in values.items():
            counts[name][value] += 1
        return None

    return objection
