"""The question table: for each labelled region one recognition question, up to four positives and as many negatives.

    table = build_questions(images, seed=7)         # images: rows with regions and labels; pixels are not looked at
    table.questions, table.dropped                  # what is asked; what was not, counted by (reason, attribute)

Notes:
- The same rows and seed give the same questions, whatever the order of the rows: each region has its own random stream.
- A negative is absent for certain and plausible: a confuser of what is there, something that is truly elsewhere in the
  image, another value of a graded attribute, the opposite side. It is never held by what is there (a consolidation is
  an opacity) nor undecided.
- A question is asked only if the rendering can show it.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from qa_library.held_out import held_out_question
from qa_library.loader import Library, load_library
from qa_library.questions import Polarity, Question, Source
from qa_library.schema import Attribute, Rendering, TemplateSet, Value
from qa_library.truth import Fact, LabelRow, Truth, truth_of
from qa_library.wording import choice_question, measure_question, recognition_question, three_way_question

MARGIN = 0.15
"""Boxes are enlarged by the largest margin of any recipe before two regions count as apart."""

_RENDERINGS: dict[str, Rendering] = {
    "lidc-idri-three-window": "three-window",
    "lidc-idri-soft": "soft-tissue",
    "lidc-idri": "lung",
    "phantom-ct": "lung",
}
"""What recipes render whatever the header's window says, by the beginning of their name; longer names first."""


class WindowRow(Protocol):
    """A window as rows carry it (meddam_core.records.Window)."""

    @property
    def center(self) -> float: ...
    @property
    def width(self) -> float: ...


class RegionRow(Protocol):
    """A region as rows carry it (meddam_core.records.Region)."""

    @property
    def region_id(self) -> int: ...
    @property
    def box(self) -> tuple[int, int, int, int]: ...
    @property
    def labels(self) -> Sequence[LabelRow]: ...


class ImageRow(Protocol):
    """An image as rows carry it (meddam_core.records.Image)."""

    @property
    def dataset(self) -> str: ...
    @property
    def modality(self) -> str: ...
    @property
    def recipe(self) -> str: ...
    @property
    def window(self) -> WindowRow | None: ...
    @property
    def regions(self) -> Sequence[RegionRow]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How questions are chosen."""

    seed: int = 0
    max_positives: int = 4
    min_trust: float = 0.5
    """Labels that fewer of the readers agree on are undecided, in both polarities."""
    scale_given: bool = False
    """The captioner was told the size of a pixel, so sizes can be asked."""
    template_sets: Mapping[str, str] = field(default_factory=dict)
    """Template set by dataset, where the name alone does not tell."""
    renderings: Mapping[str, Rendering] = field(default_factory=dict)
    """What a recipe renders, where its name and the stored window do not tell."""
    held_out: bool = False
    """Ask in the held-out wording (qa_library.held_out)."""

    def __post_init__(self) -> None:
        if self.max_positives < 1:
            raise ValueError(f"max_positives is {self.max_positives}; it must be at least 1")
        if not 0 <= self.min_trust <= 1:
            raise ValueError(f"min_trust is {self.min_trust}; it must be between 0 and 1")


@dataclass(slots=True)
class QuestionTable:
    """Questions, and what was not asked."""

    questions: list[Question] = field(default_factory=list)
    dropped: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Counts by (reason, attribute or label)."""
    num_regions: int = 0

    def add(self, other: QuestionTable) -> None:
        """Appends another table."""
        self.questions += other.questions
        self.dropped += other.dropped
        self.num_regions += other.num_regions


@dataclass(frozen=True, slots=True)
class _Candidate:
    fact: Fact
    """What is asked about."""
    source: Source
    beside: str = ""
    """For a negative: the true value that it could be mistaken for."""


def build_questions(
    images: Iterable[ImageRow], *, seed: int = 0, library: Library | None = None, settings: Settings | None = None
) -> QuestionTable:
    """Questions for every labelled region of the images; `settings` carries its own seed."""
    table = QuestionTable()
    for image in images:
        table.add(questions_of_image(image, library or load_library(), settings or Settings(seed=seed)))
    return table


def questions_of_image(image: ImageRow, library: Library, settings: Settings) -> QuestionTable:
    """The questions of one image's regions. Needs no other image, so that a job can map it over rows."""
    table = QuestionTable(num_regions=len(image.regions))
    named = settings.template_sets.get(image.dataset)
    if named is not None and named not in library.sets:
        raise ValueError(f"no template set {named!r}; there are {', '.join(sorted(library.sets))}")
    template_set = library.sets[named] if named else library.find(image.dataset, image.modality)
    if template_set is None:
        table.dropped["no_template_set", image.dataset] += len(image.regions)
        return table
    truths = [truth_of(template_set, region.labels, settings.min_trust) for region in image.regions]
    rendering = _rendering(image, settings)
    for i, (region, truth) in enumerate(zip(image.regions, truths, strict=True)):
        table.dropped += truth.dropped
        elsewhere = [
            fact
            for j, other in enumerate(truths)
            if j != i and _apart(region.box, image.regions[j].box)
            for fact in other.present()
            if fact.attribute.kind == "presence"
        ]
        maker = _RegionQuestions(template_set, truth, elsewhere, rendering, settings, region.region_id, image.dataset)
        made = maker.make(table.dropped)
        table.questions += [held_out_question(q, template_set) for q in made] if settings.held_out else made
    return table


@dataclass(slots=True)
class _RegionQuestions:
    """Makes the questions of one region."""

    template_set: TemplateSet
    truth: Truth
    elsewhere: list[Fact]
    rendering: Rendering | None
    settings: Settings
    region_id: int
    dataset: str

    def make(self, dropped: Counter[tuple[str, str]]) -> list[Question]:
        main = self._main_fact()
        if main is None and self.template_set.recognition.attribute:
            dropped["no_finding", self.template_set.recognition.attribute] += 1
            return []
        rng = random.Random(f"{self.settings.seed}:{self.region_id}")
        askable = [a for a in self.template_set.attributes if self._askable(a, dropped)]
        positives = [
            _Candidate(f, "truth")
            for a in askable
            for f in self.truth.present(a.id)
            if _ask(f.attribute, f.value, dropped)
        ]
        negatives = self._negatives(askable, dropped)
        if not positives and not negatives:
            return []
        chosen = _spread(positives, self.settings.max_positives, rng, first=main)
        matched = _match(negatives, max(1, len(chosen)), rng)
        dropped["limit", "positive"] += len(positives) - len(chosen)
        dropped["limit", "negative"] += len(negatives) - len(matched)
        questions = [
            recognition_question(self.template_set, main.value if main else None, self.region_id, self.dataset, rng)
        ]
        questions += [self._question(c, "positive", rng) for c in chosen]
        return questions + [self._question(c, "negative", rng) for c in matched]

    def _main_fact(self) -> Fact | None:
        """The finding that the region is recognised by: the most trusted one."""
        attribute = self.template_set.recognition.attribute
        present = [f for f in self.truth.present(attribute) if f.value.ask] if attribute else []
        return max(present, key=lambda f: 1.0 if f.trust is None else f.trust, default=None)

    def _askable(self, attribute: Attribute, dropped: Counter[tuple[str, str]]) -> bool:
        if not any(key[0] == attribute.id for key in self.truth.facts):
            return False
        if attribute.shown_in and self.rendering not in attribute.shown_in:
            dropped["not_shown", attribute.id] += 1
            return False
        if "scale" in attribute.needs and not self.settings.scale_given:
            dropped["no_scale", attribute.id] += 1
            return False
        present = self.truth.present(self.template_set.recognition.attribute)
        if attribute.needs_side and all(f.value.no_side for f in present):
            dropped["no_side", attribute.id] += 1
            return False
        return True

    def _negatives(self, askable: list[Attribute], dropped: Counter[tuple[str, str]]) -> list[_Candidate]:
        found: dict[tuple[str, str], _Candidate] = {}
        ids = {a.id for a in askable}
        present = [f for f in self.truth.present() if f.attribute.id in ids]
        for fact in present:
            for attribute in askable:
                for value in attribute.values:
                    if value.id in fact.value.confusers and _related(fact, attribute):
                        self._offer(found, attribute, value, _source(attribute), fact.value.name, dropped)
        for fact in self.elsewhere:
            if fact.attribute.id in ids and self.truth.state(fact.attribute.id, fact.value.id) in (None, "absent"):
                self._offer(found, fact.attribute, fact.value, "elsewhere", "", dropped, known_absent=True)
        for attribute in askable:
            if attribute.kind == "presence" and len(attribute.values) == 1:
                self._offer(found, attribute, attribute.values[0], "absent", "", dropped)
        return list(found.values())

    def _offer(
        self,
        found: dict[tuple[str, str], _Candidate],
        attribute: Attribute,
        value: Value,
        source: Source,
        beside: str,
        dropped: Counter[tuple[str, str]],
        known_absent: bool = False,
    ) -> None:
        key = (attribute.id, value.id)
        if key in found or not value.ask or not (known_absent or self.truth.state(*key) == "absent"):
            return
        for fact in self.truth.facts.values():  # what is undecided may be there, and hold the value
            if fact.state == "absent" or (fact.attribute.id != attribute.id and attribute.kind == "choice"):
                continue
            if value.id in fact.value.never_negative_with or fact.value.id in value.never_negative_with:
                dropped["hierarchy", attribute.id] += 1
                return
        found[key] = _Candidate(Fact(attribute, value, "absent", None), source, beside)

    def _question(self, candidate: _Candidate, polarity: Polarity, rng: random.Random) -> Question:
        fact = candidate.fact
        args = (self.template_set, fact, self.region_id, self.dataset, rng)
        if fact.attribute.kind == "measure":
            return measure_question(*args)
        if polarity == "positive" and fact.attribute.kind == "choice":
            return choice_question(*args)
        return three_way_question(*args, polarity=polarity, source=candidate.source, beside=candidate.beside)


def _ask(attribute: Attribute, value: Value, dropped: Counter[tuple[str, str]]) -> bool:
    if not value.ask:
        dropped["not_asked", attribute.id] += 1
    return value.ask


def _source(attribute: Attribute) -> Source:
    if attribute.kind == "presence":
        return "confuser"
    return "opposite_side" if attribute.id == "side" else "wrong_value"


def _related(fact: Fact, attribute: Attribute) -> bool:
    """Confusers may be of another presence attribute (a wart and a scale), never of another choice."""
    return fact.attribute.id == attribute.id or fact.attribute.kind == attribute.kind == "presence"


def _spread(candidates: list[_Candidate], limit: int, rng: random.Random, first: Fact | None) -> list[_Candidate]:
    """At most `limit` candidates, attribute by attribute in turn, the region's main finding first."""
    pools: dict[str, list[_Candidate]] = {}
    for candidate in rng.sample(candidates, len(candidates)):
        pools.setdefault(candidate.fact.attribute.id, []).append(candidate)
    for pool in pools.values():
        pool.sort(key=lambda c: c.fact is first)
    order = sorted(pools.values(), key=lambda pool: pool[-1].fact is not first)
    chosen: list[_Candidate] = []
    while len(chosen) < limit and any(order):
        for pool in order:
            if pool and len(chosen) < limit:
                chosen.append(pool.pop())
    return chosen


def _match(negatives: list[_Candidate], limit: int, rng: random.Random) -> list[_Candidate]:
    """At most `limit` negatives, kind by kind in turn: what is truly elsewhere first, then the others at random."""
    pools: dict[str, list[_Candidate]] = {}
    for candidate in rng.sample(negatives, len(negatives)):
        pools.setdefault(candidate.source, []).append(candidate)
    order = sorted(pools, key=lambda source: source != "elsewhere")
    chosen: list[_Candidate] = []
    while len(chosen) < limit and any(pools.values()):
        chosen += [pools[source].pop() for source in order if pools[source]]
    return chosen[:limit]


def _apart(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> bool:
    """Whether two boxes have nothing in common even when both are enlarged."""
    ax, ay = MARGIN * (a[2] - a[0]), MARGIN * (a[3] - a[1])
    bx, by = MARGIN * (b[2] - b[0]), MARGIN * (b[3] - b[1])
    across = a[0] - ax < b[2] + bx and b[0] - bx < a[2] + ax
    down = a[1] - ay < b[3] + by and b[1] - by < a[3] + ay
    return not (across and down)


def _rendering(image: ImageRow, settings: Settings) -> Rendering | None:
    """What the rendering of a CT slice shows; None where that cannot be told or does not matter."""
    if image.recipe in settings.renderings:
        return settings.renderings[image.recipe]
    for prefix, rendering in _RENDERINGS.items():
        if image.recipe.startswith(prefix):
            return rendering
    if image.window is None:
        return None
    if image.window.center <= -250:
        return "lung"
    if image.window.center >= 250 or image.window.width >= 1200:
        return "bone"
    return "soft-tissue"
