"""A first stage for a model that cannot see yet: it learns to name the labels of regions, before it learns to speak.

    facts = LabelSet.of(labels_of_shards(uris, None, 2000), ("side", "margin"))
    learn_labels(dam, facts)                       # the language model rests; one head a label is added
    labels_loss(dam, batch)                        # summed over labels

DAM's vision comes from years of pictures. A small model from scratch has none, and captions alone teach it slowly:
where to look is one word of forty, and the language model must learn to read at the same time. A head for each label,
on the mean of the projected tokens, says it directly. The heads are left out of the checkpoint; what was seen stays in
the tower, the adapters and the projector.

Axes: B examples, T image tokens, D hidden size, K labels.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meddam_core.dam.model import Dam
from meddam_core.training.batch import IGNORED, Batch
from meddam_core.training.encode import encoded

MAX_VALUES = 32
"""Of a label that can be learnt: sizes in mm and the like are no classes."""


@dataclass(frozen=True, slots=True)
class LabelSet:
    """Labels that are learnt, each with its values."""

    values: Mapping[str, tuple[str, ...]]

    @staticmethod
    def of(labels: Iterable[Mapping[str, str]], names: Sequence[str] = ()) -> LabelSet:
        """The labels of some regions; by default all with 2 to MAX_VALUES values.

        Raises ValueError where a name is unknown or has too few or too many values, or where nothing is left.
        """
        found: dict[str, set[str]] = defaultdict(set)
        for region in labels:
            for name, value in region.items():
                found[name].add(value)
        classes = {n: tuple(sorted(v)) for n, v in sorted(found.items()) if 2 <= len(v) <= MAX_VALUES}
        unfit = [n for n in names if n not in classes]
        if unfit or not classes:
            raise ValueError(
                f"labels to learn need 2 to {MAX_VALUES} values; {', '.join(unfit) or 'none'} cannot be learnt from "
                f"these shards. Choose some of: {', '.join(classes) or 'there are none'}"
            )
        return LabelSet({n: classes[n] for n in names or classes})

    def codes(self, labels: Mapping[str, str]) -> list[int]:
        """(K,) the number of each label's value; IGNORED where it is absent or was never seen."""
        return [v.index(labels[n]) if labels.get(n) in v else IGNORED for n, v in self.values.items()]


def learn_labels(dam: Dam, facts: LabelSet) -> None:
    """Adds a head a label to `dam` and lets the language model rest. Everything else is trained as before."""
    size = dam.config.llm.hidden_size
    heads = nn.ModuleList(nn.Linear(size, len(values)) for values in facts.values.values())
    dam.label_heads = heads.to(dam.device)  # a part of the model, so that optimizer, checkpoints and workers have it
    dam.llm.requires_grad_(False)


def labels_loss(dam: Dam, batch: Batch, *, in_step: bool = False) -> Tensor:
    """Summed cross-entropy of the labels of a batch, float32 scalar."""
    assert batch.codes_BK is not None
    seen_BD = encoded(dam, batch.views_B8SS, in_step=in_step).mean(dim=1)
    heads = dam.label_heads
    assert isinstance(heads, nn.ModuleList)
    losses = [
        F.cross_entropy(head(seen_BD).float(), batch.codes_BK[:, k], reduction="sum", ignore_index=IGNORED)
        for k, head in enumerate(heads)
    ]
    return torch.stack(losses).sum()
