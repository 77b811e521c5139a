"""Captions that a sound benchmark must put in their places: blank, shuffled, majority, and made from the truth.

Notes:
- Every report shows them: blank must score 0 in the strict variant, truth-made near 100, and shuffled captions no more
  than the majority caption. With values weighted equally, guessing by the base rates earns what the majority earns.
- Shuffling stays within dataset and finding: what is left is what a caption says about its kind, not about its region.
- The majority caption states, for each attribute, the most frequent value among regions of its dataset and finding.
"""

from __future__ import annotations

import random
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qa_library.loader import Library
from qa_library.schema import TemplateSet
from qa_library.truth import Fact, LabelRow, Truth, truth_of

BLANK = ""


@dataclass(frozen=True, slots=True)
class LabelledRegion:
    """What controls need of a region."""

    region_id: int
    dataset: str
    modality: str
    labels: Sequence[LabelRow]


def truth_captions(regions: Sequence[LabelledRegion], library: Library, min_trust: float = 0.5) -> dict[int, str]:
    """For each region a caption that states all that is known about it; "" where nothing is."""
    found = _truths(regions, library, min_trust)
    return {r: caption_of(template_set, truth) for r, (template_set, truth, _) in found.items()}


def majority_captions(regions: Sequence[LabelledRegion], library: Library, min_trust: float = 0.5) -> dict[int, str]:
    """For each region the caption of the most frequent facts among the regions of its dataset and finding."""
    found = _truths(regions, library, min_trust)
    groups: dict[tuple[str, str, str], list[int]] = defaultdict(list)
    dataset = {r.region_id: r.dataset for r in regions}
    for region_id, (template_set, _, finding) in found.items():
        groups[dataset[region_id], template_set.id, finding].append(region_id)
    captions: dict[int, str] = {}
    for members in groups.values():
        template_set = found[members[0]][0]
        text = caption_of(template_set, _majority([found[m][1] for m in members]))
        captions |= dict.fromkeys(members, text)
    return captions


def shuffled_captions(
    captions: Mapping[int, str],
    regions: Sequence[LabelledRegion],
    library: Library,
    *,
    seed: int = 0,
    min_trust: float = 0.5,
) -> dict[int, str]:
    """The captions of each dataset and finding dealt out at random among its regions.

    A region may get its own by chance: to forbid that would put guessing below the base rates.
    """
    found = _truths(regions, library, min_trust)
    groups: dict[tuple[str, str, str], list[int]] = defaultdict(list)
    for region in regions:
        if region.region_id in captions:
            known = found.get(region.region_id)
            kind, finding = (known[0].id, known[2]) if known else (region.modality, "")
            groups[region.dataset, kind, finding].append(region.region_id)
    shuffled: dict[int, str] = {}
    for name, members in sorted(groups.items()):
        dealt = random.Random(f"{seed}:{name}").sample(members, len(members))
        shuffled |= {a: captions[b] for a, b in zip(members, dealt, strict=True)}
    return shuffled


def caption_of(template_set: TemplateSet, truth: Truth) -> str:
    """Plain sentences: what is present, and what is absent of attributes without a present value."""
    sentences = []
    for attribute in template_set.attributes:
        facts = [f for f in truth.facts.values() if f.attribute.id == attribute.id and f.value.ask]
        present = [f for f in facts if f.state == "present"]
        sentences += [_statement(f) for f in present]
        absent = [_plain(f.value.name).removeprefix("a ").removeprefix("an ") for f in facts if f.state == "absent"]
        if absent and not present and attribute.kind == "presence":
            sentences.append(f"There is no {' and no '.join(absent)}.")
    if template_set.recognition.attribute is None and sentences:
        sentences.insert(0, f"There is a {_class_name(template_set)}.")
    return " ".join(sentences)


def _statement(fact: Fact) -> str:
    if fact.number is not None:
        return f"It measures {fact.number:.0f} mm."
    return fact.attribute.statement.format(value=_plain(fact.value.name))


def _plain(name: str) -> str:
    """A name without what stands in brackets."""
    return re.sub(r" \([^)]*\)", "", name)


def _class_name(template_set: TemplateSet) -> str:
    """The word by which a region of a one-class set is recognised: the first of its terms."""
    return template_set.recognition.terms[0]


def _majority(truths: Sequence[Truth]) -> Truth:
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    known: dict[tuple[str, str], Fact] = {}
    asked: Counter[tuple[str, str]] = Counter()
    for truth in truths:
        for key, fact in truth.facts.items():
            if fact.state != "undecided":
                asked[key] += 1
            if fact.state == "present" and fact.number is None:
                counts[key[0]][key[1]] += 1
                known[key] = fact
    facts: dict[tuple[str, str], Fact] = {}
    for attribute_id, values in counts.items():
        for value_id, count in values.most_common():
            fact = known[attribute_id, value_id]
            first = not any(a == attribute_id for a, _ in facts)
            if first if fact.attribute.kind == "choice" else 2 * count >= asked[attribute_id, value_id]:
                facts[attribute_id, value_id] = fact
    return Truth(facts, Counter())


def _truths(
    regions: Sequence[LabelledRegion], library: Library, min_trust: float
) -> dict[int, tuple[TemplateSet, Truth, str]]:
    """Template set, truth and main finding of each region that has a template set."""
    found = {}
    for region in regions:
        template_set = library.find(region.dataset, region.modality)
        if template_set is None:
            continue
        truth = truth_of(template_set, region.labels, min_trust)
        named = template_set.recognition.attribute
        finding = "+".join(sorted(f.value.id for f in truth.present(named))) if named else ""
        found[region.region_id] = (template_set, truth, finding)
    return found
