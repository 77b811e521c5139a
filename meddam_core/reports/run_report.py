"""The report of a caption run: one HTML file that can be mailed and opened anywhere, without network or scripts.

    html = run_report(facts, tally, gallery, failures)

Takes plain data, so it serves any job; ray_jobs/report.py reads a run directory and calls it.

Invariants:
- the page loads nothing: pictures are data URIs, styles and the script are inline, a policy forbids the rest;
- every text that comes from data is escaped;
- figures come from the tally (rows) and from run.json and summary.json, named as such.

Arrays: H, W rows and columns; C = 3, RGB.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from meddam_core.records import Box, Caption, Label, Status
from meddam_core.reports.page import NOT_FOR_DIAGNOSIS, environment
from meddam_core.reports.pictures import box_path, data_uri, mask_path
from meddam_core.reports.plots import binned, histogram_svg
from meddam_core.reports.tally import LOGPROB_BIN, CaptionTally

FULL_SIDE_PX = 560
CROP_SIDE_PX = 320

STATUS_MEANING = {
    "ok": "a caption that ended by itself",
    "truncated": "a caption cut at its token limit",
    "skipped": "nothing to do, on purpose",
    "failed": "no caption; the reason is given",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """How fast a run was, as its summary says."""

    regions_per_s: float
    tokens_per_s: float
    busy_share: float | None = None
    """Share of the wall time in which the captioners worked, 0 to 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFacts:
    """What a run was, from its run.json and summary.json."""

    title: str
    run: str
    """Where it lies."""
    state: Literal["complete", "incomplete", "stopped"]
    generation: int | None = None
    model: str
    engine: str
    kernels: str
    prompts: Mapping[str, str]
    """Prompt text by prompt id."""
    recipes: Sequence[str] = ()
    fingerprint: str
    begun_at: str | None = None
    finished_at: str | None = None
    wall_s: float | None = None
    speed: Speed | None = None
    why: str | None = None
    """Why it is not complete."""
    num_images_without_regions: int = 0
    num_expected: int | None = None
    """Captions that the input asks for: regions x prompts x samples."""
    num_missing: int | None = None
    num_duplicated: int | None = None
    settings: Mapping[str, str] = field(default_factory=dict)
    """Sampling, rendering and crop rules, as set."""
    versions: Mapping[str, str] = field(default_factory=dict)
    licences: Sequence[str] = ()
    """One sentence for each licence that rows or weights carry."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GalleryEntry:
    """A caption with what its model saw."""

    caption: Caption
    full_HWC: NDArray[np.uint8]
    """The rendered image, at its own size: `caption.box` is in its pixels."""
    crop_HWC: NDArray[np.uint8]
    """The focal crop, before it is stretched to the model's input."""
    mask_HW: NDArray[np.uint8] | None = None
    """The prompt's mask, at the image's size; None for a box prompt."""
    prompt_box: Box | None = None
    """The box with its recipe's margin, where it has one."""


def run_report(
    facts: RunFacts, tally: CaptionTally, gallery: Sequence[GalleryEntry], failures: Sequence[Caption] = ()
) -> str:
    """The whole page as a string of HTML."""
    return (
        environment()
        .get_template("run_report.html.j2")
        .render(
            facts=facts,
            tally=tally,
            statuses=_statuses(tally),
            reasons=tally.reasons.most_common(),
            groups=_groups(tally),
            plots=_plots(tally),
            cards=[_card(entry) for entry in gallery],
            failures=failures,
            not_for_diagnosis=NOT_FOR_DIAGNOSIS,
        )
    )


def _statuses(tally: CaptionTally) -> list[dict[str, Any]]:
    total = max(1, tally.num_captions)
    return [
        {
            "name": s.value,
            "count": tally.status[s.value],
            "share": tally.status[s.value] / total,
            "meaning": STATUS_MEANING[s.value],
        }
        for s in Status
    ]


def _groups(tally: CaptionTally) -> list[dict[str, Any]]:
    """A row for each dataset and modality, largest first; `width` is its share of the largest."""
    rows: list[dict[str, Any]] = []
    for dataset, modality in sorted({(d, m) for d, m, _ in tally.groups}):
        counts = {s.value: tally.groups[dataset, modality, s.value] for s in Status}
        rows.append({"dataset": dataset, "modality": modality, "counts": counts, "total": sum(counts.values())})
    most = max((row["total"] for row in rows), default=1)
    for row in rows:
        row["width"] = row["total"] / most
    return sorted(rows, key=lambda row: -row["total"])


def _plots(tally: CaptionTally) -> list[dict[str, Any]]:
    plots = []
    if tally.tokens:
        edges, counts, width = binned(tally.tokens, 40)
        median = _median(tally.tokens)
        plots.append(
            _plot("Caption length", f"median {median} tokens", edges, counts, "new tokens", "captions", width == 1)
        )
    if tally.logprob_bins:
        edges, counts, _ = binned(tally.logprob_bins, 40)
        median_nats = (_median(tally.logprob_bins) + 0.5) * LOGPROB_BIN
        edges = [e * LOGPROB_BIN for e in edges]
        plots.append(
            _plot(
                "Confidence",
                f"median {median_nats:.2f} nats a token",
                edges,
                counts,
                "mean log-probability",
                "captions",
            )
        )
    if tally.regions_per_image:
        edges, counts, width = binned(tally.regions_per_image, 16)
        mean = tally.num_regions / tally.num_images
        plots.append(
            _plot("Regions per image", f"mean {mean:.2f}", edges, counts, "regions in the image", "images", width == 1)
        )
    return plots


def _plot(
    title: str, note: str, edges: list[float], counts: list[int], x: str, y: str, integer: bool = False
) -> dict[str, Any]:
    alt = f"{title}: histogram of {y} by {x}; {note}."
    svg = histogram_svg(edges, counts, x_label=x, y_label=y, alt=alt, integer_bins=integer)
    return {"title": title, "note": note, "svg": Markup(svg)}


def _median(counts: Mapping[int, int]) -> int:
    half, seen = (sum(counts.values()) + 1) // 2, 0
    for value in sorted(counts):
        seen += counts[value]
        if seen >= half:
            return value
    raise ValueError("the median of nothing")


def _card(entry: GalleryEntry) -> dict[str, Any]:
    caption = entry.caption
    height, width = entry.full_HWC.shape[:2]
    path = box_path(caption.box) if entry.mask_HW is None else mask_path(entry.mask_HW)
    where = "{}, {}, box {}, {} to {}, {}".format(caption.modality, caption.dataset, *caption.box)
    return {
        "caption": caption,
        "full": data_uri(entry.full_HWC, FULL_SIDE_PX),
        "crop": data_uri(entry.crop_HWC, CROP_SIDE_PX),
        "width": width,
        "height": height,
        "path": path,
        "prompt_path": box_path(entry.prompt_box) if entry.prompt_box and entry.prompt_box != caption.box else None,
        "alt": f"Full view with region {caption.region_id} outlined: {where}",
        "crop_alt": f"Focal crop around region {caption.region_id}",
        "search": " ".join(
            [caption.text or "", caption.dataset, caption.modality, *(_label(b) for b in caption.labels)]
        ).lower(),
        "labels": [_label(label) for label in caption.labels],
    }


def _label(label: Label) -> str:
    name = label.name.replace("_", " ")
    return name if label.value == "present" else f"{name}: {label.value}"
