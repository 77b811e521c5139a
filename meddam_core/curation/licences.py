"""Licences of images and weights, carried to what is made of them, and exports that would break one stopped.

check_export(terms_of(["CC-BY-NC-SA-4.0"]), Export(pixels=True, audience="public", purpose="commercial"))   # ValueError

A licence we do not know forbids everything that needs a permission: better to ask than to be wrong. This is a guard
against accidents, not legal advice.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Audience = Literal["internal", "public"]
Purpose = Literal["research", "commercial"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What a licence allows."""

    licence: str
    redistribute: bool
    commercial: bool
    share_alike: bool = False
    attribution: bool = True
    known: bool = True


# Summaries of the licences' own texts: Creative Commons deeds; PhysioNet Credentialed Health Data License 1.5.0 (no
# sharing with others); NVIDIA's licence of DAM's weights (non-commercial use only).
_FAMILIES: tuple[tuple[str, dict[str, bool]], ...] = (
    ("cc0", {"redistribute": True, "commercial": True, "attribution": False}),
    ("publicdomain", {"redistribute": True, "commercial": True, "attribution": False}),
    ("ccbyncsa", {"redistribute": True, "commercial": False, "share_alike": True}),
    ("ccbyncnd", {"redistribute": False, "commercial": False}),
    ("ccbync", {"redistribute": True, "commercial": False}),
    ("ccbysa", {"redistribute": True, "commercial": True, "share_alike": True}),
    ("ccbynd", {"redistribute": False, "commercial": True}),
    ("ccby", {"redistribute": True, "commercial": True}),
    ("apache", {"redistribute": True, "commercial": True}),
    ("mit", {"redistribute": True, "commercial": True}),
    ("physionet", {"redistribute": False, "commercial": False}),
    ("credentialed", {"redistribute": False, "commercial": False}),
    ("nvidianoncommercial", {"redistribute": True, "commercial": False}),
    ("noncommercial", {"redistribute": False, "commercial": False}),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    """What is to be done with a set."""

    pixels: bool
    """Whether pictures are copied, not only captions and references."""
    audience: Audience = "internal"
    purpose: Purpose = "research"


def terms_of(licence: str) -> Terms:
    """The terms of a licence by its name, whatever its spelling; forbidding ones for an unknown name."""
    name = "".join(c for c in licence.lower() if c.isalnum())
    for family, allowed in _FAMILIES:
        if name.startswith(family) or (family in name and len(family) > 8):
            return Terms(licence=licence, **allowed)
    return Terms(licence=licence, redistribute=False, commercial=False, known=False)


def check_export(images: Iterable[str], weights: Iterable[str], egress: Iterable[str], export: Export) -> list[str]:
    """The conditions under which an export is allowed, as sentences for its card.

    Args:
        images: licences of the images.
        weights: licences of the models that wrote the captions.
        egress: the images' egress policies.

    Raises ValueError that lists every licence that forbids the export, and what would be allowed.
    """
    problems: list[str] = []
    conditions: list[str] = []
    for kind, names in (("images", sorted(set(images))), ("weights", sorted(set(weights)))):
        for terms in map(terms_of, names):
            problems += _forbidden(kind, terms, export)
            if terms.attribution:
                conditions.append(f"Attribution is due for the {kind} under {terms.licence}.")
            if terms.share_alike:
                conditions.append(
                    f"What is made of the {kind} under {terms.licence} must be shared under the same licence."
                )
            if not terms.commercial:
                conditions.append(f"No commercial use: the {kind} are under {terms.licence}.")
    if export.audience == "public" and "deny" in set(egress):
        problems.append("the dataset's egress policy is deny: neither pixels nor captions may leave the cluster")
    if problems:
        raise ValueError(
            "this export would break a licence: "
            + "; ".join(problems)
            + ". Leave the pixels out (--no-pixels), keep it "
            "in the house (--audience internal), use it for research, or state the licence at ingest if it is missing"
        )
    return conditions


def _forbidden(kind: str, terms: Terms, export: Export) -> list[str]:
    name = f"the {kind} are under {terms.licence}" if terms.known else f"the licence of the {kind} is {terms.licence!r}"
    found = []
    if export.purpose == "commercial" and not terms.commercial:
        found.append(f"{name}, which {'allows no' if terms.known else 'may not allow'} commercial use")
    shares = export.pixels if kind == "images" else False
    if export.audience == "public" and shares and not terms.redistribute:
        found.append(f"{name}, which {'forbids' if terms.known else 'may forbid'} passing pictures on")
    return found


def licence_of_model(model: str) -> str:
    """The licence of the weights that a run names: the packaged model's own, NVIDIA's for DAM's, else unknown."""
    name = model.rstrip("/").rpartition("/")[2].lower()
    if name == "meddam-tiny":
        return "Apache-2.0"
    return "NVIDIA-noncommercial" if name.startswith(("dam-3b", "dam_3b", "describe-anything")) else "unknown"
