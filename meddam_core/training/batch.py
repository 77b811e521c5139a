"""Examples -> tensors: views, the merged sequence of text and image tokens, and which of them are learnt.

    collate = Collator(dam.tokenizer, dam.config.num_image_tokens, texts, Augmentation(1.0), seed=0)
    batch = collate(examples, presentation)

Only the caption's tokens and the end of sequence are targets: the prompt is given, never learnt.

Invariant: what an example looks like in a presentation (prompt, wording, augmentation) depends on the seed, its region
and the presentation's number, not on the batch it is in, the worker, or what came before.

Axes: B examples, L positions of the merged sequence (padded), 8 channels, S pixels a side.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from meddam_core.dam.tokens import IMAGE_TOKEN_ID, Tokenizer
from meddam_core.training.augment import Augmentation, may_swap, swapped
from meddam_core.training.examples import Example
from meddam_core.training.looks import Look, seen
from meddam_core.training.texts import Texts

IGNORED = -100
"""Of a target: nothing is to be learnt here (PyTorch's convention)."""


@dataclass(frozen=True, slots=True)
class Batch:
    """What the loss takes."""

    views_B8SS: Tensor
    """uint8"""
    ids_BL: Tensor
    """Token ids; IMAGE_TOKEN_ID where an image token stands, 0 in the padding."""
    targets_BL: Tensor
    """The id that follows each position; IGNORED where none is to be learnt."""
    codes_BK: Tensor | None = None
    """Where labels are learnt instead of captions: the number of each label's value, or IGNORED."""

    @property
    def num_targets(self) -> int:
        learnt = self.targets_BL if self.codes_BK is None else self.codes_BK
        return int((learnt != IGNORED).sum())

    def to(self, device: torch.device) -> Batch:
        parts = (self.views_B8SS, self.ids_BL, self.targets_BL, self.codes_BK)
        return Batch(*(None if t is None else t.to(device, non_blocking=True) for t in parts))  # type: ignore[arg-type]


class Collator:
    """Turns examples into batches.

    Args:
        tokenizer: of the model.
        num_image_tokens: that a view takes.
        texts: prompts and captions.
        augmentation: of the views.
        seed: of every choice.
        swap: share of presentations in which the full view is another example's (see `augment.swapped`).
        look: what the model sees of the views (see `looks`).
        max_length: positions that prompt, image and caption may take; longer captions are cut.
        codes: of an example's labels, where these are learnt instead of captions (see `labels.LabelSet`).
    """

    def __init__(
        self, tokenizer: Tokenizer, num_image_tokens: int, texts: Texts, augmentation: Augmentation, seed: int,
        *, swap: float = 0.0, look: Look = "both", max_length: int = 4096,
        codes: Callable[[Mapping[str, str]], list[int]] | None = None,
    ) -> None:  # fmt: skip
        if swap and texts.source != "truth":
            raise ValueError("views can only be swapped where captions are made from the truth of phantoms")
        self._tokenizer, self._num_image_tokens, self._texts = tokenizer, num_image_tokens, texts
        self._augmentation, self._seed, self._swap, self._max_length = augmentation, seed, swap, max_length
        self._look: Look = look
        self._codes = codes
        self._prompts: dict[str, list[int]] = {}

    def __call__(self, examples: Sequence[Example], presentation: int) -> Batch:
        """`presentation` is how often the examples were shown before."""
        drawn = [self._drawn(e, examples, presentation) for e in examples]
        views_B8SS = torch.from_numpy(np.stack([views for _, views, _ in drawn]))
        if self._codes is not None:
            nothing = torch.zeros(len(drawn), 0, dtype=torch.int64)
            return Batch(views_B8SS, nothing, nothing, torch.tensor([self._codes(e.labels) for e, _, _ in drawn]))
        rows = [self._row(*self._texts.choose(e, rng)) for e, _, rng in drawn]
        length = max(len(ids) for ids, _ in rows)
        ids_BL = torch.zeros(len(rows), length, dtype=torch.int64)
        targets_BL = torch.full((len(rows), length), IGNORED)
        for i, (ids, num_given) in enumerate(rows):
            row = torch.tensor(ids)
            ids_BL[i, : len(ids)] = row
            targets_BL[i, num_given - 1 : len(ids) - 1] = row[num_given:]
        return Batch(views_B8SS, ids_BL, targets_BL)

    def _drawn(
        self, example: Example, others: Sequence[Example], presentation: int
    ) -> tuple[Example, NDArray[np.uint8], np.random.Generator]:
        """The example, or one that was made of it; its views as they are shown; the stream for its words."""
        rng = np.random.default_rng([self._seed, example.region_id, presentation])
        if self._swap and rng.random() < self._swap and may_swap(example):
            partners = [o for o in others if o.modality == example.modality and may_swap(o)]
            example = swapped(partners[int(rng.integers(len(partners)))], example)
        return example, seen(self._augmentation(example.views_8SS, rng), self._look), rng

    def _row(self, query: str, caption: str) -> tuple[list[int], int]:
        """(ids, how many of them are given)."""
        if query not in self._prompts:
            self._prompts[query] = self._tokenizer.encode_prompt(query)
        ids: list[int] = []
        for token in self._prompts[query]:
            ids += [IMAGE_TOKEN_ID] * self._num_image_tokens if token == IMAGE_TOKEN_ID else [token]
        caption_ids = self._tokenizer.encode(caption)
        caption_ids = caption_ids[caption_ids[:1] == [self._tokenizer.bos_id] :]
        room = self._max_length - len(ids) - 1
        if room < 1:
            raise ValueError(f"the prompt alone takes {len(ids)} of {self._max_length} positions")
        return [*ids, *caption_ids[:room], self._tokenizer.eos_id], len(ids)
