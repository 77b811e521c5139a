"""Several judges as one: the option that most of them choose, and how well they agree.

panel = Panel([LexicalJudge(), llm_a, llm_b])
verdict, votes = await panel.vote(question, caption, egress)
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence

from meddam_core.judging.protocol import Judge, Unscored, Verdict, decided, unscored
from meddam_core.records import Egress
from qa_library.questions import Question


class Panel:
    """A majority of the judges that gave a verdict decides; without one the question is unscored."""

    def __init__(self, judges: Sequence[Judge]) -> None:
        if len(judges) < 2:
            raise ValueError("a panel needs at least two judges")
        if len({j.id for j in judges}) != len(judges):
            raise ValueError("a panel needs different judges")
        self.judges = list(judges)

    @property
    def id(self) -> str:
        """Names every member."""
        return "panel(" + "+".join(sorted(j.id for j in self.judges)) + ")"

    async def answer(self, question: Question, caption: str, egress: Egress = "deny") -> Verdict:
        """The panel's verdict."""
        return (await self.vote(question, caption, egress))[0]

    async def vote(self, question: Question, caption: str, egress: Egress = "deny") -> tuple[Verdict, list[Verdict]]:
        """The panel's verdict and each member's, in the order of the judges."""
        votes = list(await asyncio.gather(*(j.answer(question, caption, egress) for j in self.judges)))
        return self.decide(question, votes), votes

    def decide(self, question: Question, votes: Sequence[Verdict]) -> Verdict:
        """The verdict of votes that were given before."""
        given = [v for v in votes if v.choice is not None]
        if not given:
            reasons = Counter(v.reason for v in votes if v.reason is not None)
            return unscored(question, reasons.most_common(1)[0][0] if reasons else Unscored.DISAGREEMENT, self.id)
        choice, count = Counter(v.choice for v in given).most_common(1)[0]
        if 2 * count <= len(given) or choice is None:
            return unscored(question, Unscored.DISAGREEMENT, self.id)
        return decided(question, choice, self.id, hedged=any(v.hedged for v in given if v.choice == choice))
