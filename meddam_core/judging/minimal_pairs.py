"""Minimal pairs: a true caption and the same with one attribute flipped. Which of the two does a model find likelier?

    for pair in minimal_pairs(template_set, truth, rng, limit=4):
        likelihoods of pair.true and pair.flipped, given the region

Needs no judge and no generation, so neither a judge's errors nor a model's style count.

Notes:
- Both captions say everything else alike; the flipped value is one that is known to be absent, a confuser first.
- A model prefers common words whatever the picture shows. So each pair is scored again on a blank picture, and the pair
  is `seen` where the real picture moves the model towards the truth. Chance is 50 % for both figures.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from meddam_core.judging.controls import caption_of
from meddam_core.judging.statistics import Floats, Interval, bootstrap
from qa_library.schema import Attribute, TemplateSet, Value
from qa_library.truth import Fact, Truth

CHANCE = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two captions that differ in one value."""

    attribute: str
    value: str
    """What is there; "" where the truth is that `flipped_to` is absent."""
    flipped_to: str
    """What the flipped caption says; "" where it denies `value`."""
    true: str
    flipped: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PairScore:
    """A pair with how much likelier the model finds the true caption, natural logarithms."""

    pair: Pair
    dataset: str
    cluster: str
    gain: float
    """Log-probability of the true caption minus that of the flipped one."""
    blank_gain: float | None = None
    """The same on a blank picture; None where that was not scored."""


def minimal_pairs(template_set: TemplateSet, truth: Truth, rng: random.Random, limit: int | None = None) -> list[Pair]:
    """One pair for each attribute whose value is known, at most `limit` of them, chosen at random."""
    whole = caption_of(template_set, truth)
    found = []
    for attribute in template_set.attributes:
        if attribute.kind == "measure":
            continue
        flipped = _flipped(attribute, truth, rng)
        if flipped is None:
            continue
        facts, value, other = flipped
        text = caption_of(template_set, Truth(facts, Counter()))
        if text != whole:
            found.append(Pair(attribute=attribute.id, value=value, flipped_to=other, true=whole, flipped=text))
    return found if limit is None or len(found) <= limit else rng.sample(found, limit)


def _flipped(
    attribute: Attribute, truth: Truth, rng: random.Random
) -> tuple[dict[tuple[str, str], Fact], str, str] | None:
    """The facts with one value of the attribute exchanged, what it was, and what it became; None where none can be."""
    present = [f for f in truth.present(attribute.id) if f.value.ask]
    facts = dict(truth.facts)
    if len(attribute.values) == 1:  # a value that is there or not: the flip is its negation
        value = attribute.values[0]
        fact = facts.get((attribute.id, value.id))
        if fact is None or fact.state == "undecided" or not value.ask:
            return None
        there = fact.state == "present"
        facts[attribute.id, value.id] = Fact(attribute, value, "absent" if there else "present", fact.trust)
        return facts, (value.id if there else ""), ("" if there else value.id)
    if not present:
        return None
    old = rng.choice(present)
    choices = _absent(attribute, old.value, truth)
    if not choices:
        return None
    new = rng.choice(choices)
    flipped = {key: fact for key, fact in facts.items() if key != (attribute.id, new.id)}
    at = list(flipped).index((attribute.id, old.value.id))
    items = list(flipped.items())
    items[at] = (
        (attribute.id, new.id),
        Fact(attribute, new, "present", old.trust),
    )  # in its place in the sentence order
    return dict(items), old.value.id, new.id


def _absent(attribute: Attribute, old: Value, truth: Truth) -> list[Value]:
    """Values that are known to be absent and could stand in the place of one that is there: its confusers, or any."""
    known = [
        v
        for v in attribute.values
        if v.ask and truth.state(attribute.id, v.id) == "absent" and v.id not in old.never_negative_with
    ]
    confusers = [v for v in known if v.id in old.confusers]
    return confusers or known


@dataclass(frozen=True, slots=True, kw_only=True)
class PairFigures:
    """How often the truth is preferred; attributes weigh equally."""

    preferred: Interval
    """Share of pairs whose true caption is likelier."""
    seen: Interval | None
    """Share of pairs that the picture moves towards the truth; None without blank pictures."""
    by_attribute: dict[str, tuple[float, float | None, int]]
    """(preferred, seen, pairs) of each "dataset/attribute"."""
    num_pairs: int


def pair_figures(scores: Sequence[PairScore], *, num: int = 2000, seed: int = 0) -> PairFigures:
    """The figures with intervals by bootstrap over patients or images. Raises ValueError for no pair."""
    if not scores:
        raise ValueError("there is no pair to score: no region has a label that the question library knows")
    preferred = [float(s.gain > 0) for s in scores]
    blind = all(s.blank_gain is not None for s in scores)
    seen = [float(s.gain > (s.blank_gain or 0.0)) for s in scores] if blind else None
    strata = sorted({f"{s.dataset}/{s.pair.attribute}" for s in scores})
    by_attribute = {}
    for name in strata:
        at = [i for i, s in enumerate(scores) if f"{s.dataset}/{s.pair.attribute}" == name]
        share = float(np.mean([seen[i] for i in at])) if seen is not None else None
        by_attribute[name] = (float(np.mean([preferred[i] for i in at])), share, len(at))
    return PairFigures(
        preferred=_interval(scores, preferred, strata, num, seed),
        seen=None if seen is None else _interval(scores, seen, strata, num, seed),
        by_attribute=by_attribute, num_pairs=len(scores),
    )  # fmt: skip


def _interval(scores: Sequence[PairScore], right: Sequence[float], strata: list[str], num: int, seed: int) -> Interval:
    clusters = sorted({(s.dataset, s.cluster) for s in scores})
    rows = {c: i for i, c in enumerate(clusters)}
    columns = {s: i for i, s in enumerate(strata)}
    sums, counts = np.zeros((len(clusters), len(strata))), np.zeros((len(clusters), len(strata)))
    for score, value in zip(scores, right, strict=True):
        at = rows[score.dataset, score.cluster], columns[f"{score.dataset}/{score.pair.attribute}"]
        sums[at] += value
        counts[at] += 1
    groups = {d: i for i, d in enumerate(sorted({d for d, _ in clusters}))}
    return bootstrap(sums, counts, _mean_of_means, [groups[d] for d, _ in clusters], num=num, seed=seed)


def _mean_of_means(sums: Floats, counts: Floats) -> Floats:
    there = counts > 0
    shares = np.where(there, sums / np.maximum(counts, 1), 0.0)
    return np.asarray(shares.sum(-1) / np.maximum(there.sum(-1), 1))
