"""The wording of questions: from a fact and its template to text, options and the ones that are right."""

from __future__ import annotations

import random

from qa_library.questions import NO, NOT_MENTIONED, OTHERWISE, STATED, YES, Option, Polarity, Question, Source
from qa_library.schema import Attribute, TemplateSet, Value
from qa_library.truth import Fact


def template_id(template_set: TemplateSet, attribute: str) -> str:
    """Names the wording that made a question."""
    return f"{template_set.id}/{attribute}@{template_set.version}"


def recognition_question(
    template_set: TemplateSet, value: Value | None, region_id: int, dataset: str, rng: random.Random
) -> Question:
    """Is the caption about this region at all?"""
    recognition = template_set.recognition
    options = [Option(id=YES, text="Yes."), Option(id=NO, text="No.")]
    return Question(
        question_id=f"{region_id}/recognition",
        region_id=region_id,
        dataset=dataset,
        template_id=template_id(template_set, "recognition"),
        attribute=recognition.attribute or "recognition",
        value=value.id if value else template_set.id,
        kind="recognition",
        polarity="recognition",
        source="recognition",
        text=recognition.text.format(value=value.name if value else ""),
        options=tuple(rng.sample(options, 2)),
        expected=(YES,),
        strict_expected=(YES,),
        why=f"the region is labelled with {value.name}" if value else "every region of the dataset is of this kind",
    )


def choice_question(
    template_set: TemplateSet, fact: Fact, region_id: int, dataset: str, rng: random.Random
) -> Question:
    """Which value of an exclusive attribute does the caption give?"""
    attribute = fact.attribute
    return Question(
        question_id=f"{region_id}/{attribute.id}/{fact.value.id}/positive",
        region_id=region_id,
        dataset=dataset,
        template_id=template_id(template_set, attribute.id),
        attribute=attribute.id,
        value=fact.value.id,
        kind="choice",
        polarity="positive",
        source="truth",
        text=attribute.choice.format(attribute=attribute.name),
        options=tuple(rng.sample(choice_options(attribute), len(attribute.values) + 2)),
        expected=(fact.value.id,),
        strict_expected=(fact.value.id,),
        why=f"{attribute.name}: {fact.value.name}{_trust(fact)}",
    )


def choice_options(attribute: Attribute) -> list[Option]:
    """Every value, another answer, or none."""
    options = [Option(id=v.id, text=f"{v.name[:1].upper()}{v.name[1:]}.") for v in attribute.values]
    options.append(Option(id=OTHERWISE, text=f"Another answer about {attribute.name}, or only what it is not."))
    return [*options, Option(id=NOT_MENTIONED, text=f"Nothing about {attribute.name}.")]


def three_way_question(
    template_set: TemplateSet,
    fact: Fact,
    region_id: int,
    dataset: str,
    rng: random.Random,
    *,
    polarity: Polarity,
    source: Source,
    beside: str = "",
) -> Question:
    """Does the caption state this value, say otherwise, or not mention it?"""
    attribute, value = fact.attribute, fact.value
    wording = attribute.positive if polarity == "positive" else attribute.negative
    right: tuple[str, ...] = (STATED,)
    strict = right
    if polarity == "negative":
        right = (OTHERWISE, NOT_MENTIONED)
        strict = (OTHERWISE,) if template_set.one_class or attribute.kind == "choice" else right
    options = three_way_options(attribute, value)
    return Question(
        question_id=f"{region_id}/{attribute.id}/{value.id}/{polarity}",
        region_id=region_id,
        dataset=dataset,
        template_id=template_id(template_set, attribute.id),
        attribute=attribute.id,
        value=value.id,
        kind="presence",
        polarity=polarity,
        source=source,
        text=wording.format(value=value.name, attribute=attribute.name),
        options=tuple(rng.sample(options, len(options))),
        expected=right,
        strict_expected=strict,
        why=_why(fact, polarity, source, beside),
    )


def three_way_options(attribute: Attribute, value: Value) -> list[Option]:
    """Stated, otherwise, not mentioned."""
    otherwise = f"No: it denies {value.name}."
    if attribute.others_address or attribute.kind == "choice":
        otherwise = f"No: it denies this, or says something else about {attribute.name}."
    return [
        Option(id=STATED, text=f"Yes: it states {value.name}."),
        Option(id=OTHERWISE, text=otherwise),
        Option(id=NOT_MENTIONED, text="It says nothing about this."),
    ]


def measure_question(
    template_set: TemplateSet, fact: Fact, region_id: int, dataset: str, rng: random.Random
) -> Question:
    """Does the caption give the right size?"""
    attribute, number = fact.attribute, fact.number
    assert number is not None
    options = [
        Option(id=STATED, text="Yes: it gives a size in this range."),
        Option(id=OTHERWISE, text="No: it gives another size."),
        Option(id=NOT_MENTIONED, text="It gives no size in millimetres or centimetres."),
    ]
    low, high = tolerance_range(attribute, number)
    return Question(
        question_id=f"{region_id}/{attribute.id}/positive",
        region_id=region_id,
        dataset=dataset,
        template_id=template_id(template_set, attribute.id),
        attribute=attribute.id,
        value=fact.value.id,
        kind="measure",
        polarity="positive",
        source="truth",
        text=attribute.positive.format(value=f"{number:.0f} mm ({low:.0f} to {high:.0f} mm)"),
        options=tuple(rng.sample(options, 3)),
        expected=(STATED,),
        strict_expected=(STATED,),
        why=f"the measured length is {number:.1f} mm{_trust(fact)}",
        truth=number,
    )


def tolerance_range(attribute: Attribute, number: float) -> tuple[float, float]:
    """Lengths in mm that count as right."""
    slack = max(attribute.tolerance * number, attribute.tolerance_mm)
    return max(0.0, number - slack), number + slack


def _why(fact: Fact, polarity: Polarity, source: Source, beside: str) -> str:
    name = fact.value.name
    if polarity == "positive":
        return f"{name} is present{_trust(fact)}"
    if source == "elsewhere":
        return f"{name} is elsewhere in the image and not in this region"
    if source == "confuser":
        return f"{name} is absent, and mistaken for {beside}, which is present"
    if source == "absent":
        return f"{name} is absent"
    return f"{fact.attribute.name} is {beside}, not {name}"


def _trust(fact: Fact) -> str:
    return "" if fact.trust is None else f" (trust {fact.trust:.2f})"
