"""A grounded report of an image: a paragraph a region, each phrase tied to its box or mask, as JSON and as an overlay.

    report = grounded_report(captions, phrases_of)                   # plain data, for programs
    html = grounded_page("Film 17", [(report, entries), ...])

It is assembled from descriptions of single regions. A system that writes a whole report first and grounds its phrases
after (as VividMed does) can say what lies between regions, and what is absent; this one cannot, and says so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from meddam_core.judging.phrases import Phrase
from meddam_core.records import Caption
from meddam_core.reports.page import NOT_FOR_DIAGNOSIS, environment
from meddam_core.reports.pictures import box_path, data_uri, mask_path
from meddam_core.reports.run_report import GalleryEntry

PhrasesOf = Callable[[Caption], Sequence[Phrase]]
"""The phrases of a caption's text that state or deny something."""
ASSEMBLED = (
    "Assembled from descriptions of single regions, each made on its own. (Systems such as VividMed write a whole "
    "report first and ground its phrases after.) Nothing here was written about the image as a whole: what lies "
    "outside the regions was not looked at, and its absence from this report says nothing."
)
SIDE_PX = 900
VERSION = 1


def grounded_report(captions: Sequence[Caption], phrases_of: PhrasesOf) -> dict[str, Any]:
    """The report of one image as JSON: regions from top to bottom, each with its text and phrases.

    `start` and `end` of a phrase are places in the region's text; ids are strings. Raises ValueError for captions of
    several images, or none.
    """
    if len({c.image_id for c in captions}) != 1:
        raise ValueError("a grounded report is about one image")
    first = captions[0]
    regions = [
        _region(number, caption, phrases_of(caption))
        for number, caption in enumerate(sorted(captions, key=_place), start=1)
    ]
    return {
        "version": VERSION, "image_id": str(first.image_id), "image_key": first.image_key, "dataset": first.dataset,
        "modality": first.modality, "width": first.width, "height": first.height, "model": first.model,
        "text": "\n\n".join(f"Region {r['number']}. {r['text']}" for r in regions), "regions": regions,
        "assembled": ASSEMBLED, "not_for_diagnosis": NOT_FOR_DIAGNOSIS,
    }  # fmt: skip


def _place(caption: Caption) -> tuple[int, int]:
    return caption.box[1], caption.box[0]


def _region(number: int, caption: Caption, found: Sequence[Phrase]) -> dict[str, Any]:
    text = caption.text or ""
    return {
        "number": number, "region_id": str(caption.region_id), "prompt_id": caption.prompt_id,
        "box": list(caption.box),
        "mask": None if caption.mask is None else {"size": list(caption.mask.size), "counts": caption.mask.counts},
        "text": text,
        "phrases": [
            {
                "text": text[p.start : p.end], "start": p.start, "end": p.end, "attribute": p.attribute,
                "value": p.value, "status": p.status, "hedged": p.hedged,
            }
            for p in found
        ],
    }  # fmt: skip


def grounded_page(title: str, reports: Sequence[tuple[dict[str, Any], Sequence[GalleryEntry]]]) -> str:
    """Reports of several images as one HTML page; `entries` show the same captions, in any order."""
    return environment().get_template("grounded.html.j2").render(
        title=title, images=[_image(report, entries) for report, entries in reports], assembled=ASSEMBLED,
        not_for_diagnosis=NOT_FOR_DIAGNOSIS,
    )  # fmt: skip


def _image(report: dict[str, Any], entries: Sequence[GalleryEntry]) -> dict[str, Any]:
    shown = {str(e.caption.region_id): e for e in entries}
    regions = []
    for region in report["regions"]:
        entry = shown[region["region_id"]]
        path = box_path(entry.caption.box) if entry.mask_HW is None else mask_path(entry.mask_HW)
        regions.append(
            {**region, "path": path, "pieces": _pieces(region), "x": region["box"][0], "y": region["box"][1]}
        )
    return {
        **report, "regions": regions, "picture": data_uri(entries[0].full_HWC, SIDE_PX),
        "radius": max(report["width"], report["height"]) / 42,
    }  # fmt: skip


def _pieces(region: dict[str, Any]) -> list[dict[str, Any]]:
    """The text cut into phrases and what stands between them."""
    pieces: list[dict[str, Any]] = []
    at = 0
    for phrase in region["phrases"]:
        pieces += [{"text": region["text"][at : phrase["start"]], "about": ""}]
        about = f"{phrase['attribute']}: {phrase['value']}".replace("_", " ")
        notes = ["denied"] * (phrase["status"] == "denied") + ["hedged"] * phrase["hedged"]
        pieces += [{"text": phrase["text"], "about": ", ".join([about, *notes])}]
        at = phrase["end"]
    return [p for p in [*pieces, {"text": region["text"][at:], "about": ""}] if p["text"]]
