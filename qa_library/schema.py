"""What a template file may say: sets of attributes, their values, wordings and words.

A template set covers one dataset or kind of image. It holds attributes; an attribute holds values; a value holds its
words (what a caption may call it), its truth (which labels decide it) and its relations (what it is confused with).

Notes:
- `presence` attributes: each value is there or not, several may be (findings, skin concepts).
- `choice` attributes: exactly one value is true (margin, side); asked as one exclusive choice.
- `measure` attributes: a length in mm, right within a tolerance.
- Thresholds are the same for both polarities: a scale gives the range of each value, all between is undecided.
- Words follow the small language of `qa_library.terms`.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Kind = Literal["presence", "choice", "measure"]
Rendering = Literal["lung", "soft-tissue", "bone", "three-window"]
"""What a rendering of CT can show; other modalities have one rendering."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Value(_Strict):
    """One value of an attribute: a finding, a concept, a kind of margin."""

    id: str
    name: str
    """As it reads in a question."""
    labels: tuple[str, ...] = ()
    """Names under which a dataset labels it (presence), or its terms as label values (choice). `name` is always one."""
    scale: tuple[float, float] | None = None
    """Range of a numeric label, both ends inside, that means this value."""
    absent_scale: tuple[float, float] | None = None
    """For presence: range of a numeric label that means its absence."""
    terms: tuple[str, ...] = ()
    """Words that mean this value wherever they stand."""
    adjectives: tuple[str, ...] = ()
    """Words that mean this value only beside a head noun of the attribute ("smooth" of a margin, not of a surface)."""
    denials: tuple[str, ...] = ()
    """Words that state its absence without a negation ("costophrenic angles are sharp")."""
    decoys: tuple[str, ...] = ()
    """Words that hold one of its terms and mean something else ("mass effect")."""
    ask: bool = True
    """False where no question can be decided; `note` says why."""
    note: str = ""
    confusers: tuple[str, ...] = ()
    """Values that are mistaken for it: the plausible negatives."""
    never_negative_with: tuple[str, ...] = ()
    """Values beside which it is never a negative: it holds them, is held by them, or can't be told from them."""
    kin: tuple[str, ...] = ()
    """Values of the same kind: naming one of them recognises the region."""
    no_side: bool = False
    """No side or zone question: a midline structure."""
    concept: str | None = None
    """Key in concepts.yaml."""

    @model_validator(mode="after")
    def _explain(self) -> Value:
        if not self.ask and not self.note:
            raise ValueError(f"the value {self.id} is not asked; `note` must say why")
        return self


class Attribute(_Strict):
    """Something that can be asked about a region."""

    id: str
    name: str
    """As it reads in a question: "the margin"."""
    kind: Kind = "presence"
    labels: tuple[str, ...] = ()
    """Label names that hold its value (choice, measure); `id` is always one."""
    values: tuple[Value, ...] = ()
    heads: tuple[str, ...] = ()
    """Nouns that its adjectives belong to."""
    positive: str = "Does the description state {value} in the marked region?"
    negative: str = "Does the description state {value} in the marked region?"
    choice: str = "What does the description say about {attribute}?"
    statement: str = "There is {value}."
    """A sentence that states a value: what a caption made from the truth says."""
    others_address: bool = False
    """Naming another value speaks about this attribute ("a papule" when asked for a plaque)."""
    shown_in: tuple[Rendering, ...] = ()
    """Renderings of CT that can show it; empty: all."""
    needs_side: bool = False
    """Not asked for values with `no_side`."""
    binary: bool = False
    """Of two values: to deny the one is to state the other."""
    place: bool = False
    """A place: what is denied there ("no effusion on the left") says nothing about the region's own place."""
    combinations: dict[str, tuple[str, str]] = Field(default_factory=dict)
    """Values that two others make together: a solid and a ground-glass part make a part-solid nodule."""
    image_sides: bool = False
    """The side of the image is the opposite of the patient's side, as on films and axial slices."""
    needs: tuple[Literal["scale"], ...] = ()
    """What the captioner must have been given: a scale in mm for sizes."""
    tolerance: float = 0.3
    """For measure: right within this share of the truth, or within `tolerance_mm`."""
    tolerance_mm: float = 2.0
    concept: str | None = None

    def value(self, value_id: str) -> Value:
        """The value with this id. Raises KeyError."""
        for value in self.values:
            if value.id == value_id:
                return value
        raise KeyError(f"the attribute {self.id} has no value {value_id!r}")


class Recognition(_Strict):
    """How a caption shows that it is about this region at all."""

    text: str
    """The question; {value} is the region's finding where `attribute` is given."""
    held_out: str = ""
    """The same in words of its own, for tests (qa_library.held_out); needed where there is no `attribute`."""
    attribute: str | None = None
    """Presence attribute whose present value, or its kin, must be named."""
    terms: tuple[str, ...] = ()
    """Words that recognise the region where there is but one class."""
    decoys: tuple[str, ...] = ()


class Excluded(_Strict):
    """A label that gives no question, and why."""

    label: str
    why: str


class TemplateSet(_Strict):
    """All questions of a dataset or a kind of image."""

    id: str
    version: int = Field(ge=1)
    title: str
    source: str
    """Where the vocabulary comes from."""
    licence: str
    datasets: tuple[str, ...]
    modalities: tuple[str, ...] = ()
    """DICOM modality codes it is limited to; empty: any."""
    one_class: bool = False
    """Every region is of the same class, so recognising it says little: strict negatives must address the attribute."""
    recognition: Recognition
    attributes: tuple[Attribute, ...]
    normal: tuple[str, ...] = ()
    """Words that deny every finding ("no abnormality")."""
    excluded: tuple[Excluded, ...] = ()

    def attribute(self, attribute_id: str) -> Attribute:
        """The attribute with this id. Raises KeyError."""
        for attribute in self.attributes:
            if attribute.id == attribute_id:
                return attribute
        raise KeyError(f"the template set {self.id} has no attribute {attribute_id!r}")
