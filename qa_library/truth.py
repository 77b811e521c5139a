"""From a region's labels to what is known about it: present, absent or undecided, attribute by attribute.

Notes:
- Undecided truth stays undecided here and is never asked; so does a label trusted less than the threshold, which is
  the same for both polarities.
- What a label of a dataset means is said by the template set: by name, by term, or by the range of a numeric grade.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from qa_library.schema import Attribute, TemplateSet, Value

State = Literal["present", "absent", "undecided"]
_STATES: dict[str, State] = {
    "present": "present", "yes": "present", "true": "present", "absent": "absent", "no": "absent", "none": "absent",
    "false": "absent", "undecided": "undecided", "unknown": "undecided",
}  # fmt: skip


class LabelRow(Protocol):
    """A label as rows carry it (meddam_core.records.Label)."""

    @property
    def name(self) -> str: ...
    @property
    def value(self) -> str: ...
    @property
    def trust(self) -> float | None: ...


@dataclass(frozen=True, slots=True)
class Fact:
    """What is known about one value of one attribute."""

    attribute: Attribute
    value: Value
    state: State
    trust: float | None
    number: float | None = None
    """For a measure: the length in mm."""


@dataclass(frozen=True, slots=True)
class Truth:
    """All facts of a region, by attribute and value, and the labels that gave none, counted by (reason, label)."""

    facts: dict[tuple[str, str], Fact]
    dropped: Counter[tuple[str, str]]

    def present(self, attribute: str | None = None) -> list[Fact]:
        """Facts that are present, of one attribute or of all."""
        return [f for f in self.facts.values() if f.state == "present" and attribute in (None, f.attribute.id)]

    def state(self, attribute: str, value: str) -> State | None:
        """What is known of a value; None where nothing is."""
        fact = self.facts.get((attribute, value))
        return fact.state if fact else None


MEASURE = Value(id="mm", name="length in mm")
"""The one value of a measure attribute."""


def truth_of(template_set: TemplateSet, labels: Sequence[LabelRow], min_trust: float = 0.5) -> Truth:
    """What a region's labels say in the terms of a template set."""
    facts: dict[tuple[str, str], Fact] = {}
    dropped: Counter[tuple[str, str]] = Counter()
    excluded = {normal(e.label) for e in template_set.excluded}
    for label in labels:
        if normal(label.name) in excluded:
            dropped["excluded", label.name] += 1
            continue
        found = _facts_of(template_set, label)
        if not found:
            known = any(normal(label.name) in _names(a.id, a.name, *a.labels) for a in template_set.attributes)
            dropped["unknown_value" if known else "no_template", label.name] += 1
        for fact in found:
            _add(facts, fact, min_trust, dropped)
    return Truth(facts, dropped)


def normal(name: str) -> str:
    """A label name or term without case, punctuation and spaces, so that "Nodule/Mass" and "nodule_mass" are equal."""
    return "".join(c for c in name.lower() if c.isalnum())


def _names(*names: str) -> set[str]:
    return {normal(name) for name in names}


def _add(facts: dict[tuple[str, str], Fact], fact: Fact, min_trust: float, dropped: Counter[tuple[str, str]]) -> None:
    key = (fact.attribute.id, fact.value.id)
    if fact.state != "undecided" and fact.trust is not None and fact.trust < min_trust:
        dropped["low_trust", fact.attribute.id] += 1
        fact = Fact(fact.attribute, fact.value, "undecided", fact.trust)
    elif fact.state == "undecided":
        dropped["undecided", fact.attribute.id] += 1
    known = facts.get(key)
    if known is not None and known.state != fact.state:
        dropped["contradiction", fact.attribute.id] += 1
        fact = Fact(fact.attribute, fact.value, "undecided", None)
    facts[key] = fact


def _facts_of(template_set: TemplateSet, label: LabelRow) -> list[Fact]:
    name = normal(label.name)
    for attribute in template_set.attributes:
        if name in _names(attribute.id, *attribute.labels):
            found = _by_attribute(attribute, label)
            if found:
                return found
        if attribute.kind == "presence":
            for value in attribute.values:
                if name in _names(value.id, value.name, *value.labels):
                    return [Fact(attribute, value, _state(value, label.value), label.trust)]
    return []


def _by_attribute(attribute: Attribute, label: LabelRow) -> list[Fact]:
    number, term = _number(label.value), normal(label.value)
    if attribute.kind == "measure":
        return [] if number is None else [Fact(attribute, MEASURE, "present", label.trust, number)]
    if attribute.kind == "presence" and len(attribute.values) == 1:
        return [Fact(attribute, attribute.values[0], _state(attribute.values[0], label.value), label.trust)]
    if attribute.kind == "presence":  # the label names the attribute, its value the finding
        return [
            Fact(attribute, v, "present", label.trust)
            for v in attribute.values
            if term in _names(v.id, v.name, *v.labels)
        ]
    if number is None and _STATES.get(term) == "undecided":
        return [Fact(attribute, v, "undecided", label.trust) for v in attribute.values]
    for value in attribute.values:
        named = number is None and term in _names(value.id, value.name, *value.labels)
        graded = number is not None and value.scale is not None and value.scale[0] <= number <= value.scale[1]
        if named or graded:
            return [Fact(attribute, v, "present" if v is value else "absent", label.trust) for v in attribute.values]
    return [Fact(attribute, v, "undecided", label.trust) for v in attribute.values] if number is not None else []


def _state(value: Value, label_value: str) -> State:
    number, term = _number(label_value), normal(label_value)
    if number is not None:
        if value.scale is not None and value.scale[0] <= number <= value.scale[1]:
            return "present"
        if value.absent_scale is not None and value.absent_scale[0] <= number <= value.absent_scale[1]:
            return "absent"
        if value.scale is None and number in (0, 1):
            return "present" if number else "absent"
        return "undecided"
    if term in _STATES:
        return _STATES[term]
    return "present" if term in _names(value.id, value.name, *value.labels) else "undecided"


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
