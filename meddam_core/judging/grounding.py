"""A grounding suite for any model: does a description follow the mask, and does it need the picture?

Three variants of labelled images are made, captioned by any model as usual, and compared with its captions of the
originals:

- moved: each region's mask is put on another region of the same image. A grounded model now describes that one.
- blanked: the picture is one even grey. There is nothing to describe; what is still claimed comes from the prompt.
- normal: the mask is put where no region is, while the prompt goes on to presume an abnormality.

Notes:
- Needs no judge: captions are cut into claims (meddam_core.judging.claims), with that module's limits.
- A region keeps its id in every variant, so that captions are compared region by region.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from meddam_core.judging.claims import audit
from meddam_core.judging.lexical import recognises
from meddam_core.judging.statistics import Interval, bootstrap
from meddam_core.records import Box, Label, Region, Rle
from meddam_core.regions.masks import mask_of, rle_of
from qa_library.schema import TemplateSet
from qa_library.truth import Truth, truth_of

Variant = Literal["moved", "blanked", "normal"]
VARIANTS: tuple[Variant, ...] = ("moved", "blanked", "normal")
NUM_TRIES = 200
SEPARATION = 0.15
"""Regions are enlarged by this share on each side before two places count as apart."""
NORMAL = Label(name="kind", value="normal", trust=1.0)
NORMAL_VALUES = frozenset({"normal_tissue", "vessel"})
"""Values of findings that are no abnormality."""


def moved_regions(regions: Sequence[Region], rng: random.Random) -> list[Region]:
    """Each region with the place of another one, and what is known of that place; [] where there is only one place."""
    distinct = [r for r in regions if sum(_apart(r.box, o.box) for o in regions) > 0]
    moved = []
    for region in distinct:
        others = [o for o in regions if _apart(region.box, o.box)]
        other = rng.choice(others)
        moved.append(replace(region, box=other.box, mask=other.mask, labels=other.labels, frame_masks=None))
    return moved


def normal_regions(regions: Sequence[Region], size: tuple[int, int], rng: random.Random) -> list[Region]:
    """Each region's shape at a place that no region touches; regions for which there is none are left out."""
    placed = []
    for region in regions:
        shift = _free_shift(region.box, [r.box for r in regions], size, rng)
        if shift is not None:
            dx, dy = shift
            x0, y0, x1, y1 = region.box
            box = (x0 + dx, y0 + dy, x1 + dx, y1 + dy)
            mask = None if region.mask is None else _shifted(region.mask, dx, dy)
            placed.append(replace(region, box=box, mask=mask, labels=[NORMAL], frame_masks=None))
    return placed


def _free_shift(box: Box, taken: Sequence[Box], size: tuple[int, int], rng: random.Random) -> tuple[int, int] | None:
    """(dx, dy) to a random place in the image, apart from every region; the middle of the picture is tried first."""
    width, height = box[2] - box[0], box[3] - box[1]
    room_x, room_y = size[0] - width, size[1] - height
    for attempt in range(NUM_TRIES):
        inset = 0.2 if attempt < NUM_TRIES // 2 else 0.0  # borders are often empty
        x = round(room_x * rng.uniform(inset, 1 - inset))
        y = round(room_y * rng.uniform(inset, 1 - inset))
        if all(_apart((x, y, x + width, y + height), other) for other in taken):
            return x - box[0], y - box[1]
    return None


def _shifted(mask: Rle, dx: int, dy: int) -> Rle:
    mask_HW = mask_of(mask)
    moved_HW = np.zeros_like(mask_HW)
    rows, columns = np.nonzero(mask_HW)
    moved_HW[rows + dy, columns + dx] = 1
    return rle_of(moved_HW)


def _apart(a: Box, b: Box) -> bool:
    ax, ay = SEPARATION * (a[2] - a[0]), SEPARATION * (a[3] - a[1])
    bx, by = SEPARATION * (b[2] - b[0]), SEPARATION * (b[3] - b[1])
    across = a[0] - ax < b[2] + bx and b[0] - bx < a[2] + ax
    down = a[1] - ay < b[3] + by and b[1] - by < a[3] + ay
    return not (across and down)


# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Described:
    """A caption of a region, with what is known of the place that was described."""

    region_id: int
    dataset: str
    modality: str
    cluster: str
    text: str
    labels: Sequence[Label]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rate:
    """A share with its interval and what it is a share of."""

    share: Interval
    num: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Grounding:
    """What the variants show; None where a variant was not captioned or nothing could be told."""

    follows: Rate | None
    """Of the claims that tell the two places apart: how many are about the place the mask was moved to."""
    same_when_moved: Rate | None
    """Captions that did not change by a letter when the mask moved."""
    claims_when_blank: Rate | None
    """Blank pictures of which the caption still claims a finding or attribute."""
    same_when_blank: Rate | None
    presumed: Rate | None
    """Normal places of which the caption claims an abnormality."""


def follows(before: Truth, after: Truth, caption: str, template_set: TemplateSet) -> tuple[int, int]:
    """(claims about the new place, claims about the old one), among attributes in which the two places differ."""
    new = old = 0
    now = {(c.attribute, c.value, c.status): c.verdict for c in audit(caption, template_set, after)}
    then = {(c.attribute, c.value, c.status): c.verdict for c in audit(caption, template_set, before)}
    for key, verdict in now.items():
        pair = (verdict, then.get(key))
        new += pair == ("supported", "contradicted")
        old += pair == ("contradicted", "supported")
    return new, old


def claims_a_finding(caption: str, template_set: TemplateSet) -> bool:
    """Whether a caption claims that something abnormal is there, or how it looks."""
    named = template_set.recognition.attribute
    if named is None:
        return recognises(template_set, "", caption)
    nothing = truth_of(template_set, [])
    return any(
        c.attribute == named and c.status == "stated" and c.value not in NORMAL_VALUES
        for c in audit(caption, template_set, nothing)
    )


def grounding_figures(
    original: Mapping[int, Described], variants: Mapping[Variant, Mapping[int, Described]],
    sets: Mapping[int, TemplateSet], *, seed: int = 0,
) -> Grounding:  # fmt: skip
    """Compares captions of the variants with those of the originals; `sets` holds each region's template set."""
    moved = [(original[r], d) for r, d in variants.get("moved", {}).items() if r in original]
    blank = [(original[r], d) for r, d in variants.get("blanked", {}).items() if r in original]
    counts = []
    for before, after in moved:
        template_set = sets[before.region_id]
        new, old = follows(
            truth_of(template_set, before.labels), truth_of(template_set, after.labels), after.text, template_set
        )
        counts.append((after, new, new + old))
    return Grounding(
        follows=_rate(counts, seed),
        same_when_moved=_rate([(b, int(a.text == b.text), 1) for a, b in moved], seed),
        claims_when_blank=_rate([(b, int(claims_a_finding(b.text, sets[b.region_id])), 1) for _, b in blank], seed),
        same_when_blank=_rate([(b, int(a.text == b.text), 1) for a, b in blank], seed),
        presumed=_rate(
            [(d, int(claims_a_finding(d.text, sets[r])), 1) for r, d in variants.get("normal", {}).items()], seed
        ),
    )


def _rate(rows: Sequence[tuple[Described, int, int]], seed: int) -> Rate | None:
    """Hits over trials, with an interval by bootstrap over patients or images."""
    total = sum(n for _, _, n in rows)
    if not total:
        return None
    clusters = sorted({(d.dataset, d.cluster) for d, _, _ in rows})
    at = {c: i for i, c in enumerate(clusters)}
    sums, counts = np.zeros((len(clusters), 1)), np.zeros((len(clusters), 1))
    for described, hits, trials in rows:
        sums[at[described.dataset, described.cluster], 0] += hits
        counts[at[described.dataset, described.cluster], 0] += trials
    groups = {d: i for i, d in enumerate(sorted({d for d, _ in clusters}))}
    share = bootstrap(
        sums, counts, lambda s, n: np.asarray(s[..., 0] / np.maximum(n[..., 0], 1)), [groups[d] for d, _ in clusters],
        seed=seed,
    )  # fmt: skip
    return Rate(share=share, num=total)
