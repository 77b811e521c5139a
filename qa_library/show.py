"""The question library as text for people: what sets there are, what is asked, by which words it is recognised.

show(load_library())                              # every set, a line each
show(load_library(), "lidc_idri")                 # its attributes and values
show(load_library(), "lidc_idri", "margin")       # one attribute: question, options, words, codes
"""

from __future__ import annotations

from collections.abc import Iterator

from qa_library.ask import question_about
from qa_library.loader import Library
from qa_library.questions import Question
from qa_library.schema import Attribute, TemplateSet, Value


def show(library: Library, set_id: str | None = None, attribute_id: str | None = None) -> str:
    """The text. Raises ValueError for a set or attribute that is not there, naming those that are."""
    if set_id is None:
        return "\n".join([f"question library {library.version}", *(_line(s) for s in library.sets.values())])
    template_set = library.sets.get(set_id)
    if template_set is None:
        raise ValueError(f"no template set {set_id!r}; there are {', '.join(sorted(library.sets))}")
    if attribute_id is None:
        return "\n".join(_set_lines(template_set))
    try:
        attribute = template_set.attribute(attribute_id)
    except KeyError as error:
        names = ", ".join(a.id for a in template_set.attributes)
        raise ValueError(f"{error.args[0]}; there are {names}") from error
    return "\n".join(_attribute_lines(library, template_set, attribute))


def _line(s: TemplateSet) -> str:
    num = sum(len(a.values) for a in s.attributes)
    return f"  {s.id:<16} {len(s.attributes):>3} attributes, {num:>3} values  {s.title} ({', '.join(s.datasets)})"


def _set_lines(s: TemplateSet) -> Iterator[str]:
    yield f"{s.id}, version {s.version}: {s.title}"
    yield f"source: {s.source}"
    yield f"licence: {s.licence}"
    yield f"recognition: {s.recognition.text}"
    for a in s.attributes:
        values = ", ".join(v.id if v.ask else f"({v.id})" for v in a.values)
        yield f"  {a.id} ({a.kind}): {values or 'a length in mm'}"
    if any(not v.ask for a in s.attributes for v in a.values):
        yield "values in brackets are never asked; their notes say why"
    for e in s.excluded:
        yield f"  not asked: {e.label}, because {e.why}"


def _attribute_lines(library: Library, s: TemplateSet, a: Attribute) -> Iterator[str]:
    yield f"{s.id}/{a.id} ({a.kind}): {a.name}"
    if a.shown_in:
        yield f"asked only where the rendering is {' or '.join(a.shown_in)}"
    asked = next((v for v in a.values if v.ask), None)
    if a.kind == "measure":
        yield from _question_lines(question_about(library, s.id, a.id, truth_mm=10.0))
    elif asked is not None:
        key = a.id if a.kind == "choice" else f"{a.id}/{asked.id}"
        yield from _question_lines(question_about(library, s.id, key, expected=asked.id))
    for v in a.values:
        yield from _value_lines(library, v)


def _question_lines(question: Question) -> Iterator[str]:
    yield f"asked, for example: {question.text}"
    for option in question.options:
        yield f"    {'*' if option.id in question.expected else ' '} {option.text}"


def _value_lines(library: Library, v: Value) -> Iterator[str]:
    codes = library.concepts.get(v.concept or "", ())
    shown = "; ".join(f"{c.system} {c.code} {c.display}" for c in codes)
    yield f"  {v.id}: {v.name}{f' [{shown}]' if shown else ''}"
    for title, words in (("words", v.terms + v.adjectives), ("denied by", v.denials), ("confused with", v.confusers)):
        if words:
            yield f"      {title}: {', '.join(words)}"
    if not v.ask:
        yield f"      never asked: {v.note}"
