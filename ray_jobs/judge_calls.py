"""One paid verdict: known already, or called for with a permit, tried again where that helps, stored before it is used.

    store = VerdictStore(cache, ledger, permits)
    caller = Caller(judge, store, permits, run="...", prices=Prices(0.1, 0.3), rules=RetryRules())
    verdict = await caller.verdict(question, caption, egress)

Notes:
- A call holds its permit until its verdict is on the store: what a kill can make one pay twice is at most the calls in
  flight, which the permits bound.
- The same words asked twice at the same time are called for once.
- A failure that repeats is given up after a few times, and becomes a row with a reason; a failure of everything is an
  outage, in which all wait. A reply that decides nothing is put down in the run's ledger, so that a resume does not pay
  for it again; the cache that runs share never holds one.
- Nothing raised here holds any of what was sent or received.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Protocol

from meddam_core.judging.cache import VerdictCache, as_cached, key_of
from meddam_core.judging.egress import Endpoint
from meddam_core.judging.llm import NO_STRUCTURE, JudgeCallError, RateHeaders, Reply
from meddam_core.judging.protocol import Unscored, Verdict, unscored
from meddam_core.records import Egress
from qa_library.questions import Question
from ray_jobs.permits import Grant, Refusal, Settled

STORE_EVERY_S = 0.05
"""How long verdicts wait for company on their way to the store: what a kill within it makes one pay twice."""
STORE_ROWS = 256


class JudgeStopped(RuntimeError):
    """The run must end now, to be resumed: the budget is spent, or the endpoint is down or refuses everything."""


class PermitsPort(Protocol):
    """The permit actor as a caller sees it."""

    async def acquire(self, tokens: float, usd: float) -> Grant | Refusal:
        """Waits for leave."""
        ...

    async def settle(self, calls: Sequence[Settled]) -> bool:
        """Tells how calls ended; True in an outage."""
        ...


class PaidJudge(Protocol):
    """A judge each of whose answers is a call."""

    max_reply_tokens: int

    @property
    def id(self) -> str: ...
    @property
    def endpoint(self) -> Endpoint: ...
    def reserve_tokens(self, question: Question, caption: str) -> int:
        """An upper estimate of a call's tokens."""
        ...

    async def call(self, question: Question, caption: str, egress: Egress = "deny") -> Reply:
        """One call. Raises JudgeCallError when it brings no reply."""
        ...


@dataclass(frozen=True, slots=True)
class Prices:
    """Dollars a million tokens."""

    prompt_usd: float = 0.0
    reply_usd: float = 0.0

    def cost(self, prompt: float, reply: float) -> float:
        """Dollars of one call."""
        return (prompt * self.prompt_usd + reply * self.reply_usd) / 1e6


@dataclass(frozen=True, slots=True)
class RetryRules:
    """When to try again."""

    max_same_failures: int = 4
    """Equal failures of one call before it is given up."""
    first_wait_s: float = 0.5
    longest_wait_s: float = 30.0
    outage_grace_s: float = 120.0
    """In an outage, a call is given up only when it has been tried for so long."""
    timeout_s: float = 60.0


@dataclass(slots=True)
class _Group:
    """Verdicts that go to the store together."""

    verdicts: dict[bytes, Verdict] = field(default_factory=dict)
    calls: list[tuple[Settled, float]] = field(default_factory=list)
    full: asyncio.Event = field(default_factory=asyncio.Event)
    written: asyncio.Task[None] | None = None


class VerdictStore:
    """Puts verdicts down in groups, then settles their permits, then lets them be used."""

    def __init__(self, cache: VerdictCache, ledger: VerdictCache, permits: PermitsPort) -> None:
        self.cache = cache
        self.ledger = ledger
        self._permits = permits
        self._group: _Group | None = None
        self._one_at_a_time = asyncio.Lock()

    def known(self, key: bytes, question: Question, judge: str) -> Verdict | None:
        """A verdict that was paid for before, by any run, or in this one without deciding anything."""
        return self.cache.get([key], [question], judge)[0] or self.ledger.get([key], [question], judge)[0]

    async def keep(self, key: bytes, verdict: Verdict, call: Settled) -> None:
        """Returns when the verdict is on the store and its permit is settled."""
        group = self._group
        if group is None:
            group = self._group = _Group()
            group.written = asyncio.ensure_future(self._write(group))
        group.verdicts[key] = verdict
        group.calls.append((call, time.monotonic()))
        if len(group.calls) >= STORE_ROWS:
            group.full.set()
        assert group.written is not None
        await asyncio.shield(group.written)

    async def _write(self, group: _Group) -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(group.full.wait(), STORE_EVERY_S)
        async with self._one_at_a_time:
            self._group = None if self._group is group else self._group
            await asyncio.to_thread(self._put, group.verdicts)
            now = time.monotonic()
            await self._permits.settle([_since(call, now - replied) for call, replied in group.calls])

    def _put(self, verdicts: dict[bytes, Verdict]) -> None:
        self.cache.put(verdicts)
        self.ledger.put({k: v for k, v in verdicts.items() if v.choice is None})


class Caller:
    """Gets verdicts of one model judge."""

    def __init__(
        self, judge: PaidJudge, store: VerdictStore, permits: PermitsPort, *, prices: Prices, rules: RetryRules,
        max_concurrent: int, rng: random.Random | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:  # fmt: skip
        self.judge = judge
        self.store = store
        self.permits = permits
        self.prices = prices
        self.rules = rules
        self._lines = asyncio.Semaphore(max_concurrent)
        self._rng = rng or random.Random()
        self._sleep = sleep
        self._flying: dict[bytes, asyncio.Task[Verdict]] = {}

    async def verdict(self, question: Question, caption: str, egress: Egress) -> Verdict:
        """The verdict. Raises JudgeStopped when the run must end."""
        if not self.judge.endpoint.may_see(egress):
            return unscored(question, Unscored.EGRESS_DENIED, self.judge.id)
        key = key_of(self.judge.id, question, caption)
        known = self.store.known(key, question, self.judge.id)
        if known is not None:
            return known
        flying = self._flying.get(key)
        if flying is not None:
            return as_cached(await asyncio.shield(flying), question)
        flying = self._flying[key] = asyncio.ensure_future(self._paid(key, question, caption, egress))
        flying.add_done_callback(lambda _: self._flying.pop(key, None))
        return await asyncio.shield(flying)

    async def _paid(self, key: bytes, question: Question, caption: str, egress: Egress) -> Verdict:
        attempt = _Attempt()
        while True:
            async with self._lines:
                verdict = await self._call(key, question, caption, egress, attempt)
            if verdict is not None:
                return verdict
            await self._sleep(attempt.wait_s(self.rules, self._rng))

    async def _call(
        self, key: bytes, question: Question, caption: str, egress: Egress, attempt: _Attempt
    ) -> Verdict | None:
        """One call; None when it should be tried again."""
        reserve = self.judge.reserve_tokens(question, caption)
        most = self.judge.max_reply_tokens
        grant = await self.permits.acquire(reserve, self.prices.cost(reserve - most, most))
        if isinstance(grant, Refusal):
            if grant.stops:
                raise JudgeStopped(grant.why)
            return unscored(question, Unscored.BUDGET, self.judge.id)
        try:
            async with asyncio.timeout(self.rules.timeout_s + 5):  # the client's own covers each read, not the whole
                reply = await self.judge.call(question, caption, egress)
        except TimeoutError:
            error = JudgeCallError("timeout", retryable=True)
        except JudgeCallError as failed:
            error = failed
        else:
            v, headers = reply.verdict, reply.headers
            await self.store.keep(key, v, self._answered(grant, v, headers))
            return v
        return await self._failed(key, question, grant, error, attempt)

    async def _failed(
        self, key: bytes, question: Question, grant: Grant, error: JudgeCallError, attempt: _Attempt
    ) -> Verdict | None:
        limited, status = error.kind == "rate limit", error.status
        free = status is not None  # an error page costs nothing; a call that timed out may
        settled = Settled(
            id=grant.id, ending="limited" if limited else "failed" if error.retryable else "refused",
            tokens=0.0 if limited or not error.retryable else None, usd=0.0 if free else None,
            replied_ago_s=0.0 if free else None, retry_after_s=error.retry_after_s,
        )  # fmt: skip
        if error.kind == NO_STRUCTURE:
            await self.permits.settle([replace(settled, ending="answered")])  # it has answered, if not what was asked
            return None
        if status in (401, 403, 404):
            await self.permits.settle([settled])
            raise JudgeStopped(f"the endpoint refuses every call ({status}): check the key, the model and the address")
        given_up = not error.retryable or (not limited and attempt.failed(error, self.rules))
        if given_up and (not error.retryable or not attempt.in_outage or attempt.age_s > self.rules.outage_grace_s):
            verdict = unscored(question, Unscored.CALL_FAILED, self.judge.id)
            await self.store.keep(key, verdict, settled)
            return verdict
        attempt.in_outage = await self.permits.settle([settled])
        attempt.num_limited += limited
        return None

    def _answered(self, grant: Grant, verdict: Verdict, headers: RateHeaders) -> Settled:
        prompt, reply = verdict.num_prompt_tokens, verdict.num_reply_tokens
        known = prompt + reply > 0
        return Settled(
            id=grant.id, ending="answered", tokens=float(prompt + reply) if known else None, replied_ago_s=0.0,
            usd=self.prices.cost(prompt, reply) if known else None, remaining=headers.remaining,
            reset_s=headers.reset_s,
        )  # fmt: skip


@dataclass(slots=True)
class _Attempt:
    """What one call has been through."""

    failures: Counter[str] = field(default_factory=Counter)
    num_limited: int = 0
    in_outage: bool = False
    began: float = field(default_factory=time.monotonic)

    @property
    def age_s(self) -> float:
        return time.monotonic() - self.began

    def failed(self, error: JudgeCallError, rules: RetryRules) -> bool:
        """Notes a failure; True when it has come too often."""
        self.failures[error.fingerprint] += 1
        return (
            self.failures[error.fingerprint] >= rules.max_same_failures
            or self.failures.total() >= 2 * rules.max_same_failures
        )

    def wait_s(self, rules: RetryRules, rng: random.Random) -> float:
        """Longer each time, and never the same for two callers; none after a rate limit, where the permits wait."""
        tries = self.failures.total()
        return (
            rng.uniform(0.5, 1.0) * min(rules.longest_wait_s, rules.first_wait_s * 2 ** max(0, tries - 1)) * (tries > 0)
        )


def _since(call: Settled, seconds: float) -> Settled:
    """The call, with how long ago its reply came, where one did."""
    return call if call.replied_ago_s is None else replace(call, replied_ago_s=call.replied_ago_s + seconds)
