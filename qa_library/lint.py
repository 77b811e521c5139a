"""Finds faults in a question library: what a schema cannot see, and what would make questions unfair or unanswerable.

lint(load_library())         # [] when all is well; one sentence a problem
"""

from __future__ import annotations

from collections.abc import Iterator

from qa_library.loader import Library
from qa_library.schema import Attribute, TemplateSet, Value
from qa_library.terms import compile_term

_ARTICLES = frozenset({"a", "an", "the", "of", "in", "and", "or", "with"})


def lint(library: Library) -> list[str]:
    """Every problem of every template set, as sentences that name the place."""
    return [problem for s in library.sets.values() for problem in lint_set(s, set(library.concepts))]


def lint_set(template_set: TemplateSet, concepts: set[str]) -> list[str]:
    """The problems of one template set."""
    return [f"{template_set.id}: {problem}" for problem in _problems(template_set, concepts)]


def _problems(template_set: TemplateSet, concepts: set[str]) -> Iterator[str]:
    attribute_ids = [a.id for a in template_set.attributes]
    yield from (f"the attribute {i} is there twice" for i in _twice(attribute_ids))
    named = template_set.recognition.attribute
    if named is not None and named not in attribute_ids:
        yield f"recognition names the attribute {named}, which is not there"
    if (named is None) == (not template_set.recognition.terms):
        yield "recognition needs an attribute or terms, and not both"
    if (named is not None) != ("{value}" in template_set.recognition.text):
        yield "recognition's text must hold {value} if, and only if, it goes by an attribute"
    if named is None and not template_set.recognition.held_out:
        yield "recognition has no held_out wording, so that no test can be worded apart from training"
    for term in (*template_set.normal, *template_set.recognition.terms, *template_set.recognition.decoys):
        yield from _term(term, "normal or recognition")
    values = {v.id: v for a in template_set.attributes for v in a.values}
    for attribute in template_set.attributes:
        for problem in _attribute(attribute, values, concepts):
            yield f"{attribute.id}: {problem}"


def _attribute(attribute: Attribute, values: dict[str, Value], concepts: set[str]) -> Iterator[str]:
    ids = [v.id for v in attribute.values]
    yield from (f"the value {i} is there twice" for i in _twice(ids))
    if attribute.kind == "choice" and sum(v.ask for v in attribute.values) < 2:
        yield "a choice needs at least two values that are asked"
    if attribute.binary and len(attribute.values) != 2:
        yield "a binary attribute has two values"
    if attribute.kind == "measure" and attribute.values:
        yield "a measure has no values"
    if attribute.kind == "presence" and not attribute.values:
        yield "there are no values"
    if attribute.kind != "measure" and not any(v.confusers for v in attribute.values) and len(attribute.values) > 1:
        yield "no value has confusers, so there are no plausible negatives"
    for whole, parts in attribute.combinations.items():
        yield from (f"combinations name {i}, which is not there" for i in (whole, *parts) if i not in ids)
    for name in ("positive", "negative"):
        text = getattr(attribute, name)
        if "{value}" not in text and len(attribute.values) != 1:
            yield f"the {name} wording does not hold {{value}}"
        if any(word in text.lower() for word in ("wrongly", "incorrectly", "falsely", "correctly")):
            yield f"the {name} wording tells the judge what is expected"
    if "{value}" not in attribute.statement:
        yield "the statement does not hold {value}"
    yield from _shared(attribute)
    for value in attribute.values:
        for problem in _value(value, attribute, values, concepts):
            yield f"{value.id}: {problem}"


def _value(value: Value, attribute: Attribute, values: dict[str, Value], concepts: set[str]) -> Iterator[str]:
    if value.ask and not value.terms and not value.adjectives:
        yield "it has no words, so no caption can state it"
    if value.adjectives and not attribute.heads:
        yield "it has adjectives, but the attribute has no heads for them"
    for relation in ("confusers", "never_negative_with", "kin"):
        for other in getattr(value, relation):
            if other not in values:
                yield f"{relation} names {other}, which is not there"
            elif other == value.id:
                yield f"{relation} names the value itself"
    for other in value.confusers:
        if other in values and not values[other].ask:
            yield f"its confuser {other} is never asked"
        blocked = other in value.never_negative_with or (
            other in values and value.id in values[other].never_negative_with
        )
        if blocked and all(
            o in value.never_negative_with or value.id in values[o].never_negative_with
            for o in value.confusers
            if o in values
        ):
            yield "all its confusers are barred from being negatives beside it"
            break
    if value.concept is not None and value.concept not in concepts:
        yield f"the concept {value.concept!r} is not in concepts.yaml"
    for bounds in (value.scale, value.absent_scale):
        if bounds is not None and bounds[0] > bounds[1]:
            yield f"the scale {bounds} runs backwards"
    if (
        value.scale
        and value.absent_scale
        and value.scale[0] <= value.absent_scale[1]
        and value.absent_scale[0] <= value.scale[1]
    ):
        yield "a grade would mean both present and absent"
    for term in (*value.terms, *value.adjectives, *value.denials, *value.decoys):
        yield from _term(term, "a term")
    denied = set(value.denials) & set(value.terms)
    if denied:
        yield f"{sorted(denied)} both state and deny it"


def _shared(attribute: Attribute) -> Iterator[str]:
    """The same word for two values of an exclusive attribute cannot be decided."""
    seen: dict[str, str] = {}
    for value in attribute.values if attribute.kind == "choice" else ():
        for term in {*value.terms, *value.adjectives}:
            if seen.setdefault(term, value.id) != value.id:
                yield f"the word {term!r} belongs to both {seen[term]} and {value.id}"
    ranges = [(v.scale, v.id) for v in attribute.values if v.scale is not None]
    for (low, first), (high, second) in zip(sorted(ranges), sorted(ranges)[1:], strict=False):
        if low[1] >= high[0] and attribute.kind == "choice":
            yield f"the grades of {first} and {second} overlap"


def _term(term: str, what: str) -> Iterator[str]:
    try:
        pattern = compile_term(term)
    except ValueError as e:
        yield f"{what}: {e}"
        return
    if all(place is not None and set(place) <= _ARTICLES for place in pattern.places):
        yield f"{what}: the term {term!r} holds no word of its own"


def _twice(ids: list[str]) -> list[str]:
    return sorted({i for i in ids if ids.count(i) > 1})
