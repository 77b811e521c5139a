"""What a caption says, as coded findings: attribute, value, stated or denied, and the codes of public vocabularies.

    found = findings("A spiculated solid nodule, no calcification.", library.sets["lidc_idri"], library)
    [(f.attribute, f.value, f.present) for f in found]      # margin: spiculated, texture: solid, calcification: not

The words and rules are the lexical judge's. What a caption does not speak of is not in the list.
"""

from __future__ import annotations

from dataclasses import dataclass

from meddam_core.judging.lexical import lengths_mm, mentions, value_stated
from qa_library.loader import Code, Library
from qa_library.schema import Attribute, TemplateSet, Value

_BY_RECIPE = {
    "phantom-chest": "phantom_chest", "phantom-ct": "phantom_ct", "phantom-skin": "phantom_skin",
    "idrid": "ophthalmology", "nuclei": "pathology", "slide-tile": "pathology",
}  # fmt: skip
_BY_MODALITY = {
    "CR": "vindr_cxr", "DX": "vindr_cxr", "RG": "vindr_cxr", "CT": "lidc_idri", "XC": "skincon", "OP": "ophthalmology",
    "SM": "pathology",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that a caption states or denies."""

    attribute: str
    name: str
    """As it reads: "spiculated margin"."""
    value: str | None = None
    """The value's id in the template set; None for a length."""
    present: bool = True
    """Stated; False where the caption denies it."""
    hedged: bool = False
    """Stated as possible only."""
    length_mm: float | None = None
    codes: tuple[Code, ...] = ()


def template_set_of(library: Library, recipe: str, modality: str) -> TemplateSet | None:
    """The vocabulary for an image, by its recipe, else by its modality; None where no set is about such images."""
    named = next((s for name, s in _BY_RECIPE.items() if recipe == name or recipe.startswith(name + "-")), None)
    return library.sets.get(named or _BY_MODALITY.get(modality, ""))


def findings(caption: str, template_set: TemplateSet, library: Library) -> list[Finding]:
    """Everything that a caption states or denies of a set's attributes, in the order of the set."""
    found: list[Finding] = []
    for attribute in template_set.attributes:
        if attribute.kind == "measure":
            found += [
                Finding(attribute=attribute.id, name=attribute.name, length_mm=length, codes=_codes(attribute, library))
                for length in sorted(set(lengths_mm(caption)), reverse=True)
            ]
        elif attribute.kind == "choice":
            found += _choice(attribute, caption, template_set, library)
        else:
            found += _presence(attribute, caption, template_set, library)
    return found


def _choice(attribute: Attribute, caption: str, template_set: TemplateSet, library: Library) -> list[Finding]:
    chosen, hedged = value_stated(template_set, attribute, caption)
    value = next((v for v in attribute.values if v.id == chosen), None)
    return [] if value is None else [_finding(attribute, value, library, True, hedged)]


def _presence(attribute: Attribute, caption: str, template_set: TemplateSet, library: Library) -> list[Finding]:
    spoken = [m for m in mentions(attribute, caption, template_set) if m.status != "ignored"]
    found = []
    for value in attribute.values:
        own = [m for m in spoken if m.value == value.id]
        stated = [m for m in own if m.status == "stated"]
        if own:
            hedged = bool(stated) and all(m.hedged for m in stated)
            found.append(_finding(attribute, value, library, bool(stated), hedged))
    return found


def _finding(attribute: Attribute, value: Value, library: Library, present: bool, hedged: bool) -> Finding:
    return Finding(
        attribute=attribute.id, name=value.name, value=value.id, present=present, hedged=hedged,
        codes=_codes(value, library),
    )  # fmt: skip


def _codes(term: Attribute | Value, library: Library) -> tuple[Code, ...]:
    return library.concepts.get(term.concept, ()) if term.concept else ()
