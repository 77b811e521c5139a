"""What captions state, in the terms of the question library; and what several captions of one region agree on.

    statements(template_set, caption)               # {"margin": {"spiculated": "stated"}, "side": {"left": "stated"}}
    consensus(template_set, captions)               # labels with trust, as if each caption were a reader

Captions of one region are treated as readers are: each votes, a label's trust is the share that agrees, and what too
few agree on stays undecided. So pseudo-labels go through the same question tables, judges and thresholds as labels.
Nothing here looks at what is known about a region.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Literal

from meddam_core.judging.lexical import how_stated, value_stated
from meddam_core.records import Label
from qa_library.questions import NOT_MENTIONED, OTHERWISE, STATED
from qa_library.schema import Attribute, TemplateSet

Stated = Literal["stated", "denied"]


def statements(template_set: TemplateSet, caption: str) -> dict[str, dict[str, Stated]]:
    """By attribute the values that a caption states or denies; of an exclusive choice the one it states. No sizes."""
    found = {a.id: _of_attribute(template_set, a, caption) for a in template_set.attributes if a.kind != "measure"}
    return {name: values for name, values in found.items() if values}


def _of_attribute(template_set: TemplateSet, attribute: Attribute, caption: str) -> dict[str, Stated]:
    if attribute.kind == "choice":
        value, _ = value_stated(template_set, attribute, caption)
        return {} if value in (OTHERWISE, NOT_MENTIONED) else {value: "stated"}
    said = {v.id: how_stated(template_set, attribute, v.id, caption)[0] for v in attribute.values}
    return {v: "stated" if how == STATED else "denied" for v, how in said.items() if how in (STATED, OTHERWISE)}


def consensus(template_set: TemplateSet, captions: Sequence[str]) -> list[Label]:
    """What several captions of one region say together, with the share of all that say it.

    Of an exclusive choice its most frequent value, of equals the first in the template; silence counts against it. Of
    other attributes each value that any caption states or denies, as the majority has it.
    """
    votes: dict[str, Counter[tuple[str, Stated]]] = defaultdict(Counter)
    for caption in captions:
        for name, values in statements(template_set, caption).items():
            votes[name].update(values.items())
    labels: list[Label] = []
    for attribute in template_set.attributes:
        counts = votes.get(attribute.id)
        if counts and attribute.kind == "choice":
            best = max(attribute.values, key=lambda v: counts[v.id, "stated"])
            labels.append(Label(name=attribute.id, value=best.id, trust=counts[best.id, "stated"] / len(captions)))
        elif counts:
            labels += _presence(attribute, counts, len(captions))
    return labels


def _presence(attribute: Attribute, counts: Mapping[tuple[str, Stated], int], num: int) -> list[Label]:
    labels = []
    for value in attribute.values:
        stated, denied = counts.get((value.id, "stated"), 0), counts.get((value.id, "denied"), 0)
        if stated or denied:
            present = stated >= denied
            labels.append(
                Label(name=value.id, value="present" if present else "absent", trust=max(stated, denied) / num)
            )
    return labels
