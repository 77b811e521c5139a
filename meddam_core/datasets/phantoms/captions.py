"""Captions of phantoms made from their truth: what a careful reader would write of a region, in many wordings.

    caption_of(truth, rng)                                     # any trained grammar that answers "paragraph"
    caption_of(truth, rng, length="sentence", held_out=True)   # wordings that training never sees

`truth` is the mapping of a region's labels (meddam_core.datasets.phantoms.truth). Every grammar of length paragraph or
sentence states every fact that a question may ask, but for sizes in mm, which need a scale.

Invariant: the wording knows nothing of the judge's lexicon, nor that of it; a test holds the caption against the judge.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
import yaml

from meddam_core.prompts import DEFAULT_LENGTH, Length

GLOBAL_FACTS = ("side", "zone", "column", "size")
"""Labels of a region that only the full view shows."""
MASK_FACTS = ("part",)
CROP_FACTS = ("margin", "texture", "surface", "shape", "elevation", "density", "colour", "finding")

_VIEWS = {"chest": "chest radiograph", "ct": "CT slice", "skin": "photograph"}
_LOOKS = {"hazy": "faint", "part-solid": "part-solid", "ground-glass": "ground-glass"}
_SIZES = {"small": "small", "medium": "medium-sized", "large": "large"}
_PARTS = {"core": "inner part", "halo": "outer part", "twin": "half"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Grammar:
    """One way to word a caption."""

    id: str
    subject: str
    """lesion, distractor or normal: the label `kind`."""
    length: Length
    text: str
    held_out: bool = False


@cache
def grammars() -> tuple[Grammar, ...]:
    """All grammars, in the order of the file."""
    document = yaml.safe_load((Path(__file__).parent / "grammars.yaml").read_text(encoding="utf-8"))
    return tuple(Grammar(subject=subject, **entry) for subject, entries in document.items() for entry in entries)


@cache
def _choice(subject: str, length: str, held_out: bool) -> tuple[Grammar, ...]:
    found = tuple(g for g in grammars() if (g.subject, g.length, g.held_out) == (subject, length, held_out))
    if not found:
        raise ValueError(f"there is no {'held-out ' if held_out else ''}grammar of length {length} for {subject}")
    return found


def caption_of(
    truth: Mapping[str, str], rng: np.random.Generator, length: Length = DEFAULT_LENGTH, *, held_out: bool = False
) -> str:
    """A caption that says what is true of a region of a phantom. Raises ValueError for labels that are no phantom's."""
    if "kind" not in truth or "finding" not in truth:
        raise ValueError("captions from the truth need the labels of a phantom: kind, finding, ...")
    choice = _choice(truth["kind"], length, held_out)
    return worded(truth, choice[int(rng.integers(len(choice)))])


def worded(truth: Mapping[str, str], grammar: Grammar) -> str:
    """A caption in one grammar."""
    phrases = _lesion(truth) if truth["kind"] == "lesion" else _thing(truth)
    return grammar.text.format(**phrases, **{_capital(name): _capital(text) for name, text in phrases.items()})


def picture_of(truth: Mapping[str, str]) -> Literal["chest", "ct", "skin"]:
    """The kind of picture that a region's labels belong to."""
    if "column" in truth:
        return "skin"
    return (
        "ct"
        if truth["zone"] in ("anterior", "posterior") or truth.get("finding") == "vessel" or _is_ct(truth)
        else "chest"
    )


def _is_ct(truth: Mapping[str, str]) -> bool:
    return truth.get("density") in ("solid", "part-solid", "ground-glass", "cavitary")


def _lesion(truth: Mapping[str, str]) -> dict[str, str]:
    skin = "column" in truth
    size, look = _SIZES[truth["size"]], _look(truth)
    shape = {"irregular": "irregularly shaped"}.get(truth["shape"], truth["shape"])
    finding, part = truth["finding"], _PARTS.get(truth["part"])
    if part:
        np_, short = f"{look} {part} of a {size} {shape} {finding}", f"{look} {part} of a {finding}"
    else:
        np_, short = f"{size} {look} {shape} {finding}", f"{look} {finding}"
    margin_noun, texture_noun = ("border", "surface") if skin else ("margin", "texture")
    margin, texture = truth["margin"], truth["surface" if skin else "texture"]
    return {
        "np": _with_article(np_), "short": _with_article(short), "size": size, "look": look, "finding": finding,
        "shape": {"irregular": "irregular in shape"}.get(truth["shape"], truth["shape"]),
        "margin": margin, "margin_noun": margin_noun, "texture": texture, "texture_noun": texture_noun,
        "a_margin": _with_article(f"{margin} {margin_noun}"), "a_texture": _with_article(f"{texture} {texture_noun}"),
        **_places(truth),
    }  # fmt: skip


def _look(truth: Mapping[str, str]) -> str:
    """Density or colour, with elevation on skin; nothing that the finding's own name says."""
    if "colour" in truth:
        return f"{truth['elevation']} {truth['colour']}"
    density = truth["density"]
    return "hazy" if truth["finding"] == "hazy opacity" else _LOOKS.get(density, density)


def _thing(truth: Mapping[str, str]) -> dict[str, str]:
    finding = truth["finding"]
    if truth["kind"] == "normal":
        finding = "normal skin" if "column" in truth else "normal lung tissue"
        return {"np": finding, "finding": finding, **_places(truth)}
    return {"np": _with_article(finding), "finding": finding, **_places(truth)}


def _places(truth: Mapping[str, str]) -> dict[str, str]:
    zone = truth["zone"]
    if "column" in truth:
        column = {"left": "on the left", "right": "on the right", "centre": "at the center"}[truth["column"]]
        return {"place": f"in the {zone} part of the picture {column}", "spot": f"{zone} part {column}",
                "view": _VIEWS["skin"]}  # fmt: skip
    picture, side = picture_of(truth), truth["side"]
    part = "part" if picture == "ct" else "zone"
    return {"place": f"in the {zone} {part} of the {side} lung", "spot": f"{side} {zone} lung {part}",
            "view": _VIEWS[picture]}  # fmt: skip


def _with_article(noun_phrase: str) -> str:
    if noun_phrase.startswith("normal "):
        return noun_phrase
    return f"{'an' if noun_phrase[0] in 'aeiou' else 'a'} {noun_phrase}"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
