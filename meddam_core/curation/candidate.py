"""A caption that may become training data, with everything a filter looks at.

Notes:
- `right` and `asked` count a judge's verdicts on the caption; `truth_right` and `truth_asked` those of the lexical
  judge against the region's own labels, where it has any. Both are None where nobody judged.
- `agreement` is the caption's mean likeness to the other samples of its region and prompt: 1 where all say the same.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from meddam_core.records import Caption

_WORD = re.compile(r"[a-z0-9]+(?:-[a-z0-9]+)*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A caption on its way through the filters."""

    caption: Caption
    run: str
    """The run directory it comes from."""
    right: int | None = None
    asked: int | None = None
    truth_right: int | None = None
    truth_asked: int | None = None
    agreement: float | None = None
    stated: Mapping[str, str] = field(default_factory=dict)
    """What the caption itself says, by attribute, where balance has no label to go by."""

    @property
    def key(self) -> tuple[int, str, int]:
        """The caption's identity within its run."""
        return self.caption.region_id, self.caption.prompt_id, self.caption.sample

    @property
    def verdict_share(self) -> float | None:
        """Share of a judge's verdicts that are right; None where nobody judged."""
        return self.right / self.asked if self.asked and self.right is not None else None

    @property
    def truth_share(self) -> float | None:
        """Share of the questions on the region's own labels that the caption answers rightly."""
        return self.truth_right / self.truth_asked if self.truth_asked and self.truth_right is not None else None


def words(text: str) -> list[str]:
    """The words of a caption, lower case, without punctuation."""
    return _WORD.findall(text.lower())


def agreements(texts: Sequence[str]) -> list[float | None]:
    """For each of several captions of one region its mean likeness to the others; None where there are no others.

    The likeness of two captions is the F1 of their words, counted once: it asks for the same statements in any order.
    """
    if len(texts) < 2:
        return [None] * len(texts)
    bags = [set(words(t)) for t in texts]
    return [
        sum(_likeness(bag, other) for j, other in enumerate(bags) if j != i) / (len(bags) - 1)
        for i, bag in enumerate(bags)
    ]


def _likeness(first: set[str], second: set[str]) -> float:
    return 2 * len(first & second) / (len(first) + len(second)) if first or second else 1.0
