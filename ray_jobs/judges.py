"""The judges of a job, built in the process that uses them: one, or a panel, with the calls of its models."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from meddam_core.judging.cache import VerdictCache
from meddam_core.judging.egress import Endpoint
from meddam_core.judging.lexical import LexicalJudge
from meddam_core.judging.llm import LlmJudge, make_client
from meddam_core.judging.llm_score import LlmRater, RatingJudge
from meddam_core.judging.panel import Panel
from meddam_core.judging.protocol import Judge, Unscored, Verdict, unscored
from meddam_core.judging.verdict_table import Vote
from meddam_core.records import Egress
from qa_library.loader import load_library
from qa_library.questions import Question
from ray_jobs.judge_calls import Caller, Prices, RetryRules, VerdictStore
from ray_jobs.judge_config import Config
from ray_jobs.permits import Grant, Refusal, Settled

ASK_AGAIN_S = 2.0
"""A permit actor that cannot be reached is asked again so often, until Ray finds it or calls it dead."""


@dataclass(frozen=True, slots=True)
class ActorPermits:
    """The permit actor as a Caller of one run sees it."""

    actor: Any
    run: str
    holder: str = ""
    """Names this process, where it is the only one that calls for the run."""

    async def acquire(self, tokens: float, usd: float) -> Grant | Refusal:
        """Waits for leave. Where the actor has died the run must stop: its next driver starts another."""
        granted = await self._answer(lambda: self.actor.acquire.remote(self.run, tokens, usd, self.holder))
        return granted or Refusal("the actor that gives leave for calls has died; run the same command again")

    async def settle(self, calls: Sequence[Settled]) -> bool:
        """Tells how calls ended; False where the actor has died, which the next `acquire` tells."""
        return bool(await self._answer(lambda: self.actor.settle.remote(calls)))

    async def _answer(self, ask: Callable[[], Awaitable[Any]]) -> Any:
        """What the actor answers; None where it has died. A call whose answer got lost is asked again: it is one
        permit that lapses, or a call that was settled already."""
        from ray.exceptions import ActorUnavailableError, RayActorError

        while True:
            try:
                return await ask()
            except ActorUnavailableError:
                await asyncio.sleep(ASK_AGAIN_S)
            except RayActorError:
                return None


def make_judges(cfg: Config, seed: int = 0) -> tuple[list[Judge], Panel | None]:
    """The members, and the panel where there is one; `seed` is the models' own. Opens no connection."""
    members: list[Judge] = [_model(cfg, m, e, seed) for m, e in zip(cfg.models, cfg.endpoints, strict=True)]
    if cfg.judge == "lexical" or (cfg.judge == "panel" and cfg.lexical_member):
        members.append(LexicalJudge(load_library(cfg.library)))
    return members, Panel(members) if cfg.judge == "panel" else None


def judge_id(cfg: Config) -> str:
    """Names the judge and all that its verdicts depend on."""
    members, panel = make_judges(cfg)
    return panel.id if panel is not None else members[0].id


def _model(cfg: Config, model: str, endpoint: Endpoint, seed: int) -> LlmJudge | RatingJudge:
    client = make_client(endpoint, os.environ.get(cfg.api_key_env) or "none", timeout_s=cfg.timeout_s)
    if cfg.judge == "llm-score":
        return RatingJudge(LlmRater(client, model, endpoint, seed=seed))
    return LlmJudge(client, model, endpoint, seed=seed)


class Bench:
    """Judges one caption at a time, any number at once.

    Args:
        permits: the permit actor of each model's endpoint; {} for the lexical judge.
        ledger: URI of the run's ledger; `cache` that of the shared cache.
    """

    def __init__(
        self, cfg: Config, permits: dict[str, Any], run: str, cache: str, ledger: str, holder: str = "", seed: int = 0
    ) -> None:
        self._members, self._panel = make_judges(cfg, seed)
        self._callers: dict[str, Caller] = {}
        models = [m for m in self._members if isinstance(m, LlmJudge | RatingJudge)]
        for model in models:
            port = ActorPermits(permits[model.endpoint.base_url], run, holder)
            store = VerdictStore(VerdictCache(cache), VerdictCache(ledger, keep_unscored=True), port)
            self._callers[model.id] = Caller(
                model, store, port, max_concurrent=cfg.max_concurrent,
                prices=Prices(cfg.price_prompt, cfg.price_reply), rules=RetryRules(timeout_s=cfg.timeout_s),
            )  # fmt: skip

    async def verdicts(
        self, questions: Sequence[Question], caption: str | None, egress: Egress
    ) -> tuple[list[Verdict], list[list[Vote]]]:
        """A verdict a question, and a panel's votes on each; a caption that is not there is unscored.

        Raises JudgeStopped when the run must end.
        """
        if caption is None:
            name = self._panel.id if self._panel is not None else self._members[0].id
            return [unscored(q, Unscored.NO_CAPTION, name) for q in questions], []
        asked = [self._member(m, q, caption, egress) for q in questions for m in self._members]
        found = await asyncio.gather(*asked, return_exceptions=True)  # calls in flight are waited for, whatever else
        for failed in found:
            if isinstance(failed, BaseException):
                raise failed
        answers = [v for v in found if isinstance(v, Verdict)]
        if self._panel is None:
            return answers, []
        width = len(self._members)
        groups = [answers[i * width : (i + 1) * width] for i in range(len(questions))]
        decided = [self._panel.decide(q, group) for q, group in zip(questions, groups, strict=True)]
        return decided, [[Vote(judge=v.judge, choice=v.choice, reason=v.reason) for v in group] for group in groups]

    async def _member(self, member: Judge, question: Question, caption: str, egress: Egress) -> Verdict:
        caller = self._callers.get(member.id)
        if caller is not None:
            return await caller.verdict(question, caption, egress)
        return await member.answer(question, caption, egress)
