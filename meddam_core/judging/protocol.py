"""What a judge is: a caption and a question in, one of the question's options out, or none with a reason.

Notes:
- Whatever a judge cannot decide is `unscored`: a reply that names no option, a refusal, a call that failed. It is
  never right and never wrong, and counted.
- Judges get text: the caption, the question, its options. Nothing tells them what is expected.
- `Judge.id` names everything a verdict depends on (model, prompt version, library version): it is part of cache keys
  and of a run's fingerprint.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal, Protocol, runtime_checkable

from meddam_core.records import Egress
from qa_library.questions import Question

Outcome = Literal["correct", "wrong", "unscored"]


class Unscored(StrEnum):
    """Why there is no verdict. Codes are stable: reports count by them."""

    NO_CAPTION = "no_caption"
    """There is no caption for the region: it failed, or was never made."""
    UNPARSABLE = "unparsable"
    """The judge's reply names no option, or several."""
    REFUSED = "refused"
    TRUNCATED = "truncated"
    """The reply reached its token limit before it named an option."""
    EGRESS_DENIED = "egress_denied"
    """The dataset's policy does not let its captions go to this endpoint."""
    CALL_FAILED = "call_failed"
    """The endpoint could not be reached or answered with an error, as often as is worth trying."""
    BUDGET = "budget"
    """The budget was spent before this call."""
    NO_QUESTION = "no_question"
    """The caption's region has no question in the table."""
    CANNOT_JUDGE = "cannot_judge"
    """The judge does not know this kind of question."""
    DISAGREEMENT = "disagreement"
    """The judges of a panel gave no majority."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What a judge found."""

    question_id: str
    judge: str
    outcome: Outcome
    """By the paper's rule; the strict variant is computed from `choice` and the region's recognition question."""
    choice: str | None = None
    """The option chosen; None when unscored."""
    reason: Unscored | None = None
    hedged: bool = False
    """The caption states it, but as possible only."""
    num_prompt_tokens: int = 0
    num_reply_tokens: int = 0
    cached: bool = False


@runtime_checkable
class Judge(Protocol):
    """Decides which option of a question a caption bears out."""

    @property
    def id(self) -> str:
        """Names the judge and everything its verdicts depend on."""
        ...

    async def answer(self, question: Question, caption: str, egress: Egress = "deny") -> Verdict:
        """The verdict on one caption and question. Never raises for what a caption or reply holds.

        `egress` is the policy of the caption's dataset: a judge outside the cluster does not see what may not leave it.
        """
        ...


def decided(question: Question, choice: str, judge: str, *, hedged: bool = False) -> Verdict:
    """A verdict from a chosen option. Raises ValueError for an option that the question does not have."""
    if choice not in question.option_ids:
        raise ValueError(f"the question {question.question_id} has no option {choice!r}")
    outcome: Outcome = "correct" if choice in question.expected else "wrong"
    return Verdict(question_id=question.question_id, judge=judge, outcome=outcome, choice=choice, hedged=hedged)


def unscored(question: Question, reason: Unscored, judge: str) -> Verdict:
    """A verdict that says why there is none."""
    return Verdict(question_id=question.question_id, judge=judge, outcome="unscored", reason=reason)
