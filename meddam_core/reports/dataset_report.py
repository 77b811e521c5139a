"""The page of a dataset: what its shards hold, how balanced it is, and what was left out. One offline HTML file.

    html = dataset_report(facts, tally, cards)

Takes plain data; ray_jobs/dataset_report.py reads the shards and calls it. The page keeps the promises of the run
report: it loads nothing, escapes all that comes from data, and its figures come from the tally (rows) and from what
`meddam ingest` wrote, named as such.

Arrays: H, W rows and columns; C = 3, RGB.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from meddam_core.records import Box, Image, Label, Region
from meddam_core.reports.dataset_tally import OTHER, SIZE_BINS_PER_OCTAVE, STATES, DatasetTally, LabelCounts
from meddam_core.reports.page import NOT_FOR_DIAGNOSIS, environment, number
from meddam_core.reports.pictures import box_path, data_uri, mask_path
from meddam_core.reports.plots import binned, histogram_svg

FULL_SIDE_PX = 480
CROP_SIDE_PX = 280
NUM_STATES = 60
NUM_ATTRIBUTES = 36
NUM_VALUES = 8
MIN_BINS = 10
MAX_CARD_LABELS = 14
EGRESS_MEANING = {
    "deny": "pixels and captions stay in the cluster",
    "zero-retention": "only to endpoints that keep nothing",
    "open": "may go anywhere",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejects:
    """What became no row."""

    images: Mapping[str, int] = field(default_factory=dict)
    """Items by reason."""
    regions: Mapping[str, int] = field(default_factory=dict)
    """Regions of items that did become rows, by reason."""
    details: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """A few of the sentences that rejects carry, by reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetFacts:
    """What a dataset is, from its dataset.json and its files."""

    title: str
    where: str
    complete: bool | None
    """Whether the ingest has come to its end; None for shards that no dataset.json stands beside."""
    num_shards: int
    num_bytes: int
    num_items: int | None = None
    """Items of the source, those without a row among them."""
    rejects: Rejects = field(default_factory=Rejects)
    settings: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """A sampled region, its pictures encoded already: a page holds many."""

    image: Image
    """Without its pixels."""
    region: Region | None
    """None for an image without regions."""
    drawn_for: str
    full: str
    """Data URI of the whole picture."""
    crop: str | None
    path: str
    prompt_path: str | None


def card(
    image: Image, region: Region | None, drawn_for: str, image_HWC: NDArray[np.uint8],
    crop_HWC: NDArray[np.uint8] | None, mask_HW: NDArray[np.uint8] | None, prompt_box: Box | None,
) -> Card:  # fmt: skip
    """A region as the page shows it.

    Args:
        image, region: the row and one of its regions.
        drawn_for: the label that it is an example of.
        image_HWC: the rendered picture; `region.box` is in its pixels.
        crop_HWC: the focal crop.
        mask_HW: the region's mask, where it has one.
        prompt_box: the box with its recipe's margin, where a box is what a model is shown.
    """
    path = "" if region is None else box_path(region.box) if mask_HW is None else mask_path(mask_HW)
    margin = region is not None and prompt_box is not None and prompt_box != region.box
    return Card(
        image=image, region=region, drawn_for=drawn_for, full=data_uri(image_HWC, FULL_SIDE_PX), path=path,
        crop=None if crop_HWC is None else data_uri(crop_HWC, CROP_SIDE_PX),
        prompt_path=box_path(prompt_box) if margin and prompt_box is not None else None,
    )  # fmt: skip


def dataset_report(facts: DatasetFacts, tally: DatasetTally, cards: Sequence[Card]) -> str:
    """The whole page as a string of HTML."""
    region_labels, image_labels = tally.labels["region"], tally.labels["image"]
    states, absent = _only_absent([*_states(region_labels, "region"), *_states(image_labels, "image")])
    return environment().get_template("dataset_report.html.j2").render(
        facts=facts, tally=tally, groups=_groups(tally), splits=_splits(tally), plots=_plots(tally),
        states=states[:NUM_STATES], num_more_states=max(0, len(states) - NUM_STATES),
        only_absent=sorted(set(absent)),
        attributes=[*_attributes(region_labels, "region"), *_attributes(image_labels, "image")][:NUM_ATTRIBUTES],
        num_labels=len(region_labels) + len(image_labels), egress=_egress(tally), technical=_technical(tally),
        skipped=_skipped(facts), cards=[_shown(c) for c in cards], not_for_diagnosis=NOT_FOR_DIAGNOSIS,
        licences=tally.rows.get("licence", Counter()).most_common(),
    )  # fmt: skip


def _groups(tally: DatasetTally) -> list[dict[str, Any]]:
    """A row for each dataset, modality and split, largest first; `width` is its share of the most regions."""
    keys = {key[1:] for key in tally.groups}
    rows: list[dict[str, Any]] = [
        {"dataset": d, "modality": m, "split": s, "images": tally.groups["images", d, m, s],
         "regions": tally.groups["regions", d, m, s]}
        for d, m, s in sorted(keys)
    ]  # fmt: skip
    most = max((row["images"] for row in rows), default=1) or 1
    return sorted(({**row, "width": row["images"] / most} for row in rows), key=lambda row: -row["images"])


def _splits(tally: DatasetTally) -> list[dict[str, Any]]:
    """Images, regions and patients of each split."""
    rows: dict[str, dict[str, Any]] = {}
    for (what, _, _, split), count in tally.groups.items():
        row = rows.setdefault(split, {"name": split, "images": 0, "regions": 0})
        row[what] += count
    for name, row in rows.items():
        row["patients"] = len(tally.patients[name]) if name in tally.patients else 0
        row["share"] = row["images"] / max(1, tally.num_images)
    return sorted(rows.values(), key=lambda row: -row["images"])


def _states(labels: Mapping[str, LabelCounts], of: str) -> list[dict[str, Any]]:
    """Labels that are present, undecided or absent: the most often present first."""
    rows = [
        {"name": name.replace("_", " "), "of": of, **{s: c.values[s] for s in STATES}, "total": c.total, **_agreed(c)}
        for name, c in labels.items() if c.is_state
    ]  # fmt: skip
    return sorted(rows, key=lambda row: (-row["present"], -row["total"], row["name"]))


def _only_absent(states: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[str]]:
    """(rows that are somewhere present or undecided, names of the others)."""
    some = [row for row in states if row["present"] or row["undecided"]]
    return some, [row["name"] for row in states if row not in some]


def _attributes(labels: Mapping[str, LabelCounts], of: str) -> list[dict[str, Any]]:
    """Labels whose values are terms, grades or measures: a small table each."""
    rows = []
    for name, counts in labels.items():
        if counts.is_state:
            continue
        numbers = _numbers(counts)
        row = {"name": name.replace("_", " "), "of": of, "total": counts.total, **_agreed(counts)}
        rows.append({**row, **(_measured(numbers) if len(numbers) > NUM_VALUES else _terms(counts, bool(numbers)))})
    return sorted(rows, key=lambda row: (-row["total"], row["name"]))


def _numbers(counts: LabelCounts) -> dict[float, int]:
    """The values as numbers; {} where one of them is none."""
    found = {}
    for value, num in counts.values.items():
        if value == OTHER:
            continue
        if not value.replace(".", "", 1).removeprefix("-").isdigit():
            return {}
        found[float(value)] = num
    return found


def _measured(numbers: dict[float, int]) -> dict[str, Any]:
    """Numbers in eight equal steps."""
    low, high = min(numbers), max(numbers)
    edges = np.linspace(low, high, NUM_VALUES + 1)
    values, weights = np.array(list(numbers)), np.array(list(numbers.values()))
    counts, _ = np.histogram(values, edges, weights=weights)
    names = [f"{_short(a)} – {_short(b)}" for a, b in itertools.pairwise(edges)]
    return {"values": _bars(list(zip(names, counts.tolist(), strict=True))), "num_more": 0}


def _short(value: float) -> str:
    return number(value) if abs(value) >= 100 else f"{value:.3g}"


def _terms(counts: LabelCounts, numeric: bool) -> dict[str, Any]:
    """The commonest values; grades in their order."""
    common = counts.values.most_common(NUM_VALUES)
    if numeric:
        common.sort(key=lambda pair: float(pair[0]) if pair[0] != OTHER else np.inf)
    return {"values": _bars(common), "num_more": max(0, len(counts.values) - len(common))}


def _bars(pairs: list[tuple[str, int]]) -> list[dict[str, Any]]:
    most = max((count for _, count in pairs), default=1) or 1
    return [{"name": name, "count": count, "width": count / most} for name, count in pairs]


def _agreed(counts: LabelCounts) -> dict[str, Any]:
    trusted = counts.num_trusted
    return {
        "trust": counts.sum_trust / trusted if trusted else None,
        "unanimous": counts.num_unanimous / trusted if trusted else None,
    }


def _plots(tally: DatasetTally) -> list[dict[str, Any]]:
    plots = [
        _size_plot("Region size", tally.side_px, "longer side of the box, px", "px"),
        _size_plot("Region size in mm", tally.side_mm, "longer side of the box, mm", "mm",
                   missing=tally.num_regions - sum(tally.side_mm.values())),
        _size_plot("Share of the picture", tally.area_share, "box area / picture area", "", percent=True),
        _size_plot("Picture size", tally.image_side_px, "longer side, px", "px", of="images"),
    ]  # fmt: skip
    if tally.regions_per_image:
        edges, counts, width = binned(tally.regions_per_image, 17)
        note = f"mean {tally.num_regions / max(1, tally.num_images):.2f}"
        plots.append(
            _plot("Regions per image", note, edges, counts, "regions in the row", "images", integer=width == 1)
        )
    for source, bins in sorted(tally.confidence.items()):
        what = "the detector's confidence" if source == "detected" else "share of readers, or confidence"
        plots.append(_tenths_plot(f"Confidence, {source} regions", bins, what, "regions"))
    if tally.trust:
        plots.append(_tenths_plot("Reader agreement", tally.trust, "share of readers who agree on a label", "labels"))
    return [plot for plot in plots if plot is not None]


def _size_plot(
    title: str, bins: Counter[int], x: str, unit: str, *, of: str = "regions", missing: int = 0, percent: bool = False
) -> dict[str, Any] | None:
    if not bins:
        return None
    room = max(1, (MIN_BINS - (max(bins) - min(bins) + 1) + 1) // 2)  # a lone bar would fill the plot
    low, high = min(bins) - room, max(bins) + room
    edges = [float(2 ** (b / SIZE_BINS_PER_OCTAVE)) for b in range(low, high + 2)]
    half, seen, median = sum(bins.values()) / 2, 0, low
    for b in range(low, high + 1):
        if seen < half:
            median = b
        seen += bins[b]
    middle = 2 ** ((median + 0.5) / SIZE_BINS_PER_OCTAVE)
    note = f"median about {100 * middle:.2g} %" if percent else f"median about {_short(middle)} {unit}"
    if missing:
        note += f"; not known of {number(missing)}"
    return _plot(title, note, edges, [bins[b] for b in range(low, high + 1)], x, of, log_x=True)


def _tenths_plot(title: str, bins: Counter[int], x: str, y: str) -> dict[str, Any]:
    edges = [i / 10 for i in range(11)]
    top = bins[9] / max(1, sum(bins.values()))
    return _plot(title, f"0.9 or more: {100 * top:.0f} %", edges, [bins[i] for i in range(10)], x, y)


def _plot(
    title: str, note: str, edges: list[float], counts: list[int], x: str, y: str, *, integer: bool = False,
    log_x: bool = False,
) -> dict[str, Any]:  # fmt: skip
    alt = f"{title}: histogram of {y} by {x}; {note}."
    svg = histogram_svg(edges, counts, x_label=x, y_label=y, alt=alt, integer_bins=integer, log_x=log_x)
    return {"title": title, "note": note, "svg": Markup(svg)}


def _egress(tally: DatasetTally) -> list[dict[str, Any]]:
    found = tally.rows.get("egress", Counter())
    return [
        {"name": name, "count": found[name], "share": found[name] / max(1, tally.num_images), "meaning": meaning}
        for name, meaning in EGRESS_MEANING.items()
    ]


def _technical(tally: DatasetTally) -> list[tuple[str, list[tuple[str, int]]]]:
    """What pictures are, each as (value, images)."""
    words = {True: "yes", False: "no", None: "not said"}
    shown = [
        ("Recipe", "recipe"), ("Photometric", "photometric"), ("Bits stored", "stored_bits"), ("Decoder", "decoder"),
        ("Spacing in mm known", "spacing"), ("Orientation known", "orientation"),
        ("Annotation burned in", "burned_in_annotation"),
    ]  # fmt: skip
    rows = []
    for title, name in shown:
        values = tally.rows.get(name, Counter()).most_common(6)
        rows.append((title, [(words[v] if isinstance(v, bool | None) else str(v or "–"), n) for v, n in values]))
    return rows


def _skipped(facts: DatasetFacts) -> list[dict[str, Any]]:
    rows = [
        {"what": what, "reason": reason, "count": count, "details": list(facts.rejects.details.get(reason, ()))}
        for what, found in (("item", facts.rejects.images), ("region", facts.rejects.regions))
        for reason, count in found.items()
    ]
    return sorted(rows, key=lambda row: -row["count"])


def _shown(one: Card) -> dict[str, Any]:
    labels = list(one.region.labels) if one.region is not None else []
    labels += [label for label in one.image.labels if label not in labels]
    present = sorted(labels, key=lambda label: STATES.index(label.value) if label.value in STATES else -1)
    texts = [label_text(label) for label in present if label.value != "absent"]
    size_mm = None
    if one.region is not None and one.image.pixel_spacing_mm:
        row_mm, column_mm = one.image.pixel_spacing_mm
        x0, y0, x1, y1 = one.region.box
        size_mm = f"{_short((x1 - x0) * column_mm)} × {_short((y1 - y0) * row_mm)} mm"
    return {
        "card": one, "labels": texts[:MAX_CARD_LABELS], "num_more": max(0, len(texts) - MAX_CARD_LABELS),
        "num_absent": sum(label.value == "absent" for label in labels), "size_mm": size_mm,
        "search": " ".join([one.drawn_for, one.image.dataset, one.image.modality, *texts]).lower(),
    }  # fmt: skip


def label_text(label: Label) -> str:
    """A label as a person reads it."""
    name = label.name.replace("_", " ")
    return name if label.value == "present" else f"{name}: {label.value}"
