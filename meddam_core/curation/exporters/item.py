"""What exporters take: an image with its chosen captions, and the card of the set."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PilImage

from meddam_core.records import Caption


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Item:
    """One image with its captions, in the order of their regions."""

    captions: list[Caption]
    picture_HWC: NDArray[np.uint8] | None
    """Rendered as it was shown to the model, (H, W, 3); None where pictures are left out."""

    @property
    def name(self) -> str:
        """The image's id as text: unique in its set, and nothing of a patient."""
        return f"{self.captions[0].image_id:016x}"

    def png(self) -> bytes:
        """The picture as PNG. Raises ValueError where it is left out."""
        if self.picture_HWC is None:
            raise ValueError("this export was made without pictures")
        sink = io.BytesIO()
        PilImage.fromarray(self.picture_HWC).save(sink, "PNG", compress_level=1)
        return sink.getvalue()


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """What is known about a set as a whole."""

    name: str
    licences: dict[str, list[str]]
    conditions: list[str]
    """Of use, as sentences (meddam_core.curation.licences)."""
    lineage: dict[str, Any] = field(default_factory=dict)
    """Runs, models, prompts, judge, rules."""

    @property
    def licence(self) -> str:
        """All licences in a line."""
        return ", ".join(sorted({name for names in self.licences.values() for name in names}))


def mask_field(caption: Caption) -> dict[str, Any] | None:
    """The region's mask as COCO run lengths, {size, counts}."""
    return None if caption.mask is None else {"size": list(caption.mask.size), "counts": caption.mask.counts}


def facts(caption: Caption) -> dict[str, Any]:
    """What every format carries beside the text, as JSON values; ids as text."""
    return {
        "region_id": str(caption.region_id), "image_id": str(caption.image_id), "dataset": caption.dataset,
        "split": caption.split, "modality": caption.modality, "box": list(caption.box), "mask": mask_field(caption),
        "labels": {label.name: label.value for label in caption.labels}, "prompt_id": caption.prompt_id,
        "model": caption.model, "mean_logprob": caption.mean_logprob, "licence": caption.licence,
    }  # fmt: skip


def query_of(caption: Caption) -> str:
    """The question that the caption answers: the shipped prompt's text, or its id where the prompt was a file."""
    from meddam_core.prompts import load_prompt

    try:
        return load_prompt(caption.prompt_id).text
    except ValueError:
        return f"<image>\nDescribe the masked region in detail. (prompt {caption.prompt_id})"
