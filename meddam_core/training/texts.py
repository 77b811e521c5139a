"""Which words an example is taught: a prompt it could be asked with, and a caption that answers it.

    texts = Texts.of(("meddam-v1", "meddam-v1-lung-ct+sentence"), source="truth")
    query, caption = texts.choose(example, rng)

Captions come from a table (each belongs to the prompt it was asked with, or answers any prompt of the config), or for
phantoms from their truth: then the wording is drawn anew each time, in the length that the prompt asks for.

Invariant: the choice depends on the example and the random stream only, so that a resumed run goes on as it would have.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal, get_args

import numpy as np

from meddam_core.datasets.phantoms.captions import caption_of
from meddam_core.prompts import DEFAULT_LENGTH, Length, Prompt, load_prompt
from meddam_core.training.examples import Example

CaptionSource = Literal["truth", "table"]

_MODALITIES = {
    "meddam-v1-chest-film": ("CR", "DX", "RG"), "meddam-v1-lung-ct": ("CT",), "meddam-v1-dermatology": ("XC",),
    "meddam-v1-fundus": ("OP",), "meddam-v1-histology": ("SM",),
}  # fmt: skip
"""The modalities that an expert prompt speaks of; all others fit any picture."""


@dataclass(frozen=True, slots=True)
class Texts:
    """Prompts, and where captions come from. A prompt that is named twice is drawn twice as often."""

    prompts: tuple[Prompt, ...]
    source: CaptionSource

    @staticmethod
    def of(prompts: Sequence[str], source: CaptionSource) -> Texts:
        """Raises ValueError for unknown prompts, and for prompts of videos."""
        loaded = tuple(load_prompt(p) for p in prompts)
        videos = [p.id for p in loaded if p.num_views != 1]
        if videos or not loaded:
            raise ValueError(f"training takes prompts with one <image>; {', '.join(videos) or 'none'} was given")
        if told := [p.id for p in loaded if p.tells_known]:
            raise ValueError(
                f"{', '.join(told)} tells the model what it is to learn; train with a prompt that does not"
            )
        return Texts(loaded, source)

    def choose(self, example: Example, rng: np.random.Generator) -> tuple[str, str]:
        """(query, caption) of one presentation of an example. Raises ValueError where no prompt or caption fits it."""
        if self.source == "truth":
            prompt = self._fitting(example, rng)
            return prompt.text, caption_of(example.labels, rng, length_of(prompt.id))
        if not example.captions:
            raise ValueError(f"region {example.region_id} has no caption")
        prompt_id, text = example.captions[int(rng.integers(len(example.captions)))]
        return (_prompt_text(prompt_id) or self._fitting(example, rng).text), text

    def _fitting(self, example: Example, rng: np.random.Generator) -> Prompt:
        fitting = [p for p in self.prompts if example.modality in _MODALITIES.get(p.id.split("+")[0], example.modality)]
        if not fitting:
            raise ValueError(f"none of the prompts {[p.id for p in self.prompts]} fits pictures of {example.modality}")
        return fitting[int(rng.integers(len(fitting)))]


def length_of(prompt_id: str) -> Length:
    """The length of answer that a prompt asks for."""
    for option in prompt_id.split("+")[1:]:
        if option in get_args(Length):
            return option  # type: ignore[return-value]
    return DEFAULT_LENGTH


@cache
def _prompt_text(prompt_id: str) -> str | None:
    """The text of a shipped prompt; None for one that was a file, whose text only its run knows, or told the labels."""
    try:
        prompt = load_prompt(prompt_id)
    except ValueError:
        return None
    return None if prompt.tells_known else prompt.text
