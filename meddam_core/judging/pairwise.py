"""The best of several captions of a region by asking a judge about two at a time, each pair in both orders.

    champion, tally = await best_by_pairs(texts, prefer)         # prefer(first, second) -> FIRST | SECOND | NEITHER
    agreement_preference(template_set, texts)                     # the offline judge: who agrees with the others

Models like what stands first, or last. So a caption wins only if it is preferred in both places; all else is a tie,
after which the caption that was ahead stays ahead. Answers that follow the place and not the caption are counted: they
say how far the judge can be trusted with this.

The judge sees words only, and nothing that is known about the region.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from meddam_core.curation.candidate import agreements
from meddam_core.judging.llm import quotable
from meddam_core.judging.statements import consensus, statements
from qa_library.questions import Option, Question
from qa_library.schema import TemplateSet

FIRST, SECOND, NEITHER = "first", "second", "neither"
Preference = Callable[[str, str], Awaitable[str | None]]
"""The id of an option for two captions in this order; None where the judge did not decide."""

WORDING = (
    "The text holds two descriptions, A and B, that one system wrote of the same region. A good one is specific, "
    "contradicts neither itself nor what both have in common, repeats nothing, and leaves open nothing that it states. "
    "Length alone is no merit. Which of the two is the better description?"
)


@dataclass(frozen=True, slots=True)
class Tally:
    """How the pairs of one region ended."""

    num_pairs: int = 0
    num_ties: int = 0
    """Pairs without a winner, whatever the reason."""
    num_flipped: int = 0
    """Ties because the judge chose the same place in both orders."""
    num_unscored: int = 0
    """Ties because the judge did not decide in one order at least."""

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            self.num_pairs + other.num_pairs, self.num_ties + other.num_ties, self.num_flipped + other.num_flipped,
            self.num_unscored + other.num_unscored,
        )  # fmt: skip


def pair_question(region_id: int, dataset: str) -> Question:
    """What a judge is asked about `both` captions. Nothing is expected: there is no truth in it."""
    options = (
        Option(id=FIRST, text="Description A."), Option(id=SECOND, text="Description B."),
        Option(id=NEITHER, text="Neither is better than the other."),
    )  # fmt: skip
    return Question(
        question_id=f"{region_id}/preference", region_id=region_id, dataset=dataset,
        template_id="pairwise/preference@1",
        attribute="preference", value="", kind="choice", polarity="positive", source="truth", text=WORDING,
        options=options, expected=(FIRST, SECOND, NEITHER), strict_expected=(FIRST, SECOND, NEITHER),
        why="no answer is expected",
    )  # fmt: skip


def both(first: str, second: str) -> str:
    """Two captions as one text."""
    return f"Description A:\n{quotable(first)}\n\nDescription B:\n{quotable(second)}"


async def best_by_pairs(texts: Sequence[str], prefer: Preference) -> tuple[int, Tally]:
    """The place of the winner of a knock-out over at least one text, and how its pairs ended.

    The order matters where pairs are tied: the earlier text stays ahead. Equal texts are not asked about.
    """
    champion, tally = 0, Tally()
    for challenger in range(1, len(texts)):
        if texts[challenger] == texts[champion]:
            continue
        here, there = await asyncio.gather(
            prefer(texts[champion], texts[challenger]), prefer(texts[challenger], texts[champion])
        )
        won, lost = (here, there) == (SECOND, FIRST), (here, there) == (FIRST, SECOND)
        tally += Tally(
            num_pairs=1, num_ties=not (won or lost), num_flipped=here == there and here in (FIRST, SECOND),
            num_unscored=None in (here, there),
        )  # fmt: skip
        champion = challenger if won else champion
    return champion, tally


def agreement_preference(template_set: TemplateSet | None, texts: Sequence[str]) -> Preference:
    """Prefers the caption that states more of what most of `texts` state, less what contradicts it.

    Without a template set that fits, the one whose words are more like the others'.
    """
    if template_set is None:
        found = agreements(texts)
        merits = {t: float(a or 0.0) for t, a in zip(texts, found, strict=True)}
    else:
        agreed = {(v.name, v.value) for v in consensus(template_set, texts) if (v.trust or 0.0) > 0.5}
        merits = {t: _merit(template_set, t, agreed) for t in texts}

    async def prefer(first: str, second: str) -> str:
        difference = merits[first] - merits[second]
        return NEITHER if abs(difference) < 1e-9 else FIRST if difference > 0 else SECOND

    return prefer


def _merit(template_set: TemplateSet, text: str, agreed: set[tuple[str, str]]) -> float:
    """Statements that the majority shares, less those on which it says something else."""
    score, names = 0.0, {name for name, _ in agreed}
    for attribute, values in statements(template_set, text).items():
        for value, how in values.items():
            kind = template_set.attribute(attribute).kind
            said = (attribute, value) if kind == "choice" else (value, "present" if how == "stated" else "absent")
            if said in agreed:
                score += 1
            elif said[0] in names:
                score -= 1
    return score
