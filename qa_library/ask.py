"""Single questions without a labelled region: for trying a judge, for hand-checked sets, for questions in free text.

question_about(library, "vindr_cxr", "finding/pleural_effusion", polarity="negative")
question_about(library, "lidc_idri", "margin")                    # an exclusive choice
question_about(library, "vindr_cxr", "recognition:finding/edema")
question_of_text(library, "Does the description mention a spiculated nodule margin?")
"""

from __future__ import annotations

import random

from qa_library.loader import Library
from qa_library.questions import Polarity, Question, Source
from qa_library.schema import Attribute, Value
from qa_library.terms import compile_term, tokens
from qa_library.truth import MEASURE, Fact
from qa_library.wording import choice_question, measure_question, recognition_question, three_way_question


def question_about(
    library: Library,
    set_id: str,
    key: str,
    *,
    polarity: Polarity = "positive",
    expected: str | None = None,
    truth_mm: float | None = None,
    region_id: int = 0,
) -> Question:
    """The question of a template set that a key names.

    Keys: `attribute/value` (three-way), `attribute` (an exclusive choice, whose right value is `expected`; or a size,
    with `truth_mm`), `recognition`, and `recognition:attribute/value` where the set goes by findings.
    Raises ValueError for a key that names nothing.
    """
    template_set = library.sets.get(set_id)
    if template_set is None:
        raise ValueError(f"no template set {set_id!r}; there are {', '.join(sorted(library.sets))}")
    rng = random.Random(f"{set_id}:{key}")
    kind, _, named = key.partition(":")
    attribute_id, _, value_id = (named or kind).partition("/")
    try:
        attribute = template_set.attribute(attribute_id) if attribute_id != "recognition" else None
        value = (
            attribute.value(value_id or expected or attribute.values[0].id) if attribute and attribute.values else None
        )
    except KeyError as e:
        raise ValueError(str(e.args[0])) from e
    if kind == "recognition" or attribute is None:
        return recognition_question(template_set, value, region_id, set_id, rng)
    if value is None:
        if truth_mm is None:
            raise ValueError(f"{key} is a size; give its truth_mm")
        return measure_question(
            template_set, Fact(attribute, MEASURE, "present", None, truth_mm), region_id, set_id, rng
        )
    fact = Fact(attribute, value, "present", None)
    if not value_id and attribute.kind == "choice":
        return choice_question(template_set, fact, region_id, set_id, rng)
    source: Source = "truth" if polarity == "positive" else "absent"
    return three_way_question(template_set, fact, region_id, set_id, rng, polarity=polarity, source=source)


def question_of_text(
    library: Library, text: str, *, set_id: str | None = None, polarity: Polarity = "positive"
) -> Question | None:
    """The three-way question that a free text asks, by the longest word of a template in it; None if it holds none."""
    words = [t.word for t in tokens(text)]
    best: tuple[int, str, Attribute, Value] | None = None
    for template_set in library.sets.values() if set_id is None else [library.sets[set_id]]:
        for attribute in template_set.attributes:
            for value in attribute.values:
                length = max((_length(term, words) for term in (*value.terms, *value.adjectives)), default=0)
                if length and (best is None or length > best[0]):
                    best = (length, template_set.id, attribute, value)
    if best is None:
        return None
    _, found, attribute, value = best
    return question_about(library, found, f"{attribute.id}/{value.id}", polarity=polarity)


def _length(term: str, words: list[str]) -> int:
    """Words of the term that stand in the text; 0 where it does not."""
    pattern = compile_term(term)
    found = any(pattern.match(words, at) is not None for at in range(len(words)))
    return sum(place is not None for place in pattern.places) if found else 0
