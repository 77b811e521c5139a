"""How many judge calls may start now: requests and tokens a minute, calls at once, dollars. Arithmetic only.

    book = PermitBook(Limits(requests_per_min=600, tokens_per_min=200_000, max_concurrent=64, max_usd=20), clock)
    answer = book.ask(tokens=900, usd=0.0004)      # Permit, Wait(seconds) or Spent
    book.settle(answer, tokens=712, usd=0.0003)    # when the call is over

Notes:
- In no window of sixty seconds do calls of more requests or tokens than allowed reach the server: a call counts for a
  minute and `slack_s`, by which two calls' ways to the server may differ.
- A book starts empty: as though the last minute had been used to the full, evenly. So a job that is killed and
  restarted does not get a second minute's allowance. `state` and `restore` carry the true past, and the dollars.
- Tokens and dollars are reserved by estimate before a call, and corrected by what was used after it.
- Concurrency adapts: a rate-limit answer halves it, at most once in a while, and each full round of successes adds one.
- The clock must not jump backwards (monotonic); ages, not times, are saved.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

WINDOW_S = 60.0
HALVE_EVERY_S = 5.0
"""A burst of rate-limit answers is one reason to slow down, not many."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What is allowed; None is no limit. Raises ValueError for limits that allow nothing."""

    requests_per_min: float | None = None
    tokens_per_min: float | None = None
    max_concurrent: int = 32
    max_usd: float | None = None
    slack_s: float = 0.5
    """How much longer one call may take to reach the server than another. Costs its share of a minute."""

    def __post_init__(self) -> None:
        for name in ("requests_per_min", "tokens_per_min"):
            value = getattr(self, name)
            if value is not None and not value >= 1:
                raise ValueError(f"{name} is {value}; it must be at least 1, or absent for no limit")
        if self.max_concurrent < 1:
            raise ValueError(f"max_concurrent is {self.max_concurrent}; it must be at least 1")
        if self.max_usd is not None and not self.max_usd >= 0:
            raise ValueError(f"max_usd is {self.max_usd}; it must not be negative")
        if not 0 <= self.slack_s < WINDOW_S:
            raise ValueError(f"slack_s is {self.slack_s}; it must be at least 0 and below {WINDOW_S:.0f}")


@dataclass(slots=True, eq=False)
class Permit:
    """Leave to make one call now. Must be settled or cancelled."""

    id: int
    started: float
    tokens: float
    usd: float
    leaves: float
    """When it stops to count."""


@dataclass(frozen=True, slots=True)
class Wait:
    """Not now: ask again after this time, or when a call has ended."""

    seconds: float
    reason: str


@dataclass(frozen=True, slots=True)
class Spent:
    """Never: the dollars are spent, or the call is larger than a whole minute's tokens."""

    reason: str


class PermitBook:
    """Keeps the account. Not thread-safe: one owner."""

    def __init__(self, limits: Limits, clock: Callable[[], float]) -> None:
        self.limits = limits
        self.clock = clock
        self.concurrency = float(limits.max_concurrent)
        self.spent_usd = 0.0
        self.num_granted = 0
        self._started = clock()
        self._phantom_share = 1.0
        """Share of a full minute that is assumed used before the start; fades evenly over the window."""
        self._past: deque[Permit] = deque()
        self._open: dict[int, Permit] = {}
        self._requests = 0.0
        self._tokens = 0.0
        self._not_before = -math.inf
        self._halved = -math.inf
        self._successes = 0

    @property
    def num_running(self) -> int:
        """Calls that were granted and have not ended."""
        return len(self._open)

    def ask(self, tokens: float, usd: float = 0.0) -> Permit | Wait | Spent:
        """Leave for one call of at most so many tokens and dollars, or how long to wait."""
        now = self.clock()
        limits = self.limits
        if limits.max_usd is not None and self.committed_usd + usd > limits.max_usd + 1e-9:
            return Spent("max_usd is reached")
        if limits.tokens_per_min is not None and tokens > limits.tokens_per_min:
            return Spent("one call needs more tokens than a minute allows")
        if now < self._not_before:
            return Wait(self._not_before - now, "the server asked for a pause")
        if self.num_running >= max(1, int(self.concurrency)):
            return Wait(HALVE_EVERY_S, "as many calls as allowed are running")
        self._expire(now)
        waits = [
            self._until(now, limit, used, need, size)
            for limit, used, need, size in (
                (limits.requests_per_min, self._requests, 1.0, lambda p: 1.0),
                (limits.tokens_per_min, self._tokens, float(tokens), lambda p: p.tokens),
            )
            if limit is not None
        ]
        seconds = max(waits, default=0.0)
        if seconds > 0:
            return Wait(seconds, "the minute's allowance is used")
        return self._grant(now, tokens, usd)

    def settle(self, permit: Permit, *, tokens: float | None = None, usd: float | None = None) -> None:
        """A call has ended; what it really used replaces the estimate.

        Raises ValueError for a permit that was settled before.
        """
        if self._open.pop(permit.id, None) is None:
            raise ValueError("this permit was settled before")
        now = self.clock()
        self.spent_usd += permit.usd if usd is None else usd
        if tokens is not None:
            self._tokens += tokens - permit.tokens if permit.leaves > now else 0.0
            permit.tokens = tokens

    def cancel(self, permit: Permit) -> None:
        """A call that was never sent: it counts for nothing."""
        self.settle(permit, tokens=0, usd=0)
        if permit in self._past:
            self._past.remove(permit)
            self._requests -= 1

    def succeeded(self) -> None:
        """The server answered: after a full round of answers one more call may run at once."""
        self._successes += 1
        if self._successes >= self.concurrency:
            self._successes = 0
            self.concurrency = min(self.concurrency + 1, float(self.limits.max_concurrent))

    def limited(self, retry_after_s: float | None = None) -> None:
        """The server said that it is too much: run half as many at once, and nothing before the time it asks for."""
        now = self.clock()
        if retry_after_s is not None:
            self._not_before = max(self._not_before, now + retry_after_s)
        if now - self._halved >= HALVE_EVERY_S:
            self.concurrency = max(1.0, self.concurrency / 2)
            self._halved, self._successes = now, 0

    @property
    def committed_usd(self) -> float:
        """Spent, and reserved by calls that are running."""
        return self.spent_usd + sum(p.usd for p in self._open.values())

    # -- what outlives a restart ---------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """What a restarted book must know: the last minute by age, and the dollars. Plain values.

        Dollars of running calls count as spent: they may have been paid.
        """
        now = self.clock()
        self._expire(now)
        calls = [[p.leaves - now, p.tokens] for p in self._past]
        return {"calls": calls, "assumed": self._assumed(now), "spent_usd": self.committed_usd}

    def restore(self, state: Mapping[str, Any], age_s: float) -> None:
        """Takes up a state saved `age_s` ago. What may have been granted since then is assumed to have been.

        Raises ValueError when calls were granted already.
        """
        if self.num_granted:
            raise ValueError("a book that has granted permits cannot be restored")
        now, age_s = self.clock(), max(0.0, age_s)
        self.spent_usd = float(state["spent_usd"])
        self._past.clear()
        self._requests = self._tokens = 0.0
        for left, tokens in sorted(state["calls"]):
            if left - age_s > 0:
                self._count(Permit(-1, now, float(tokens), 0.0, now + left - age_s))
        faded = max(0.0, float(state["assumed"]) - age_s / self._window)
        pairs = ((self._requests, self.limits.requests_per_min), (self._tokens, self.limits.tokens_per_min))
        used = max(used / limit if limit else 0.0 for used, limit in pairs)
        unknown = min(1.0, age_s / self._window)  # at most what a paced job grants in that time
        self._started, self._phantom_share = now, min(1.0, max(0.0, min(faded + unknown, 1.0 - used)))

    # -- the window ----------------------------------------------------------------------------------------------------

    @property
    def _window(self) -> float:
        return WINDOW_S + self.limits.slack_s

    def _assumed(self, at: float) -> float:
        """Share of the allowance still taken by the time before the start."""
        return max(0.0, self._phantom_share - (at - self._started) / self._window)

    def _until(self, now: float, limit: float, used: float, need: float, size: Callable[[Permit], float]) -> float:
        """Seconds until a call fits in."""
        at = now
        for permit in (*self._past, None):  # between two calls leaving the window only the assumed past fades
            room = (limit - used - need) / limit + 1e-12
            if room >= 0:
                fits = max(at, self._started + (self._phantom_share - room) * self._window)
                if permit is None or fits < permit.leaves:
                    return max(0.0, fits - now)
            if permit is not None:
                at = permit.leaves
                used -= size(permit)
        return self._window

    def _grant(self, now: float, tokens: float, usd: float) -> Permit:
        permit = Permit(self.num_granted, now, float(tokens), usd, now + self._window)
        self.num_granted += 1
        self._open[permit.id] = permit
        self._count(permit)
        return permit

    def _count(self, permit: Permit) -> None:
        self._past.append(permit)
        self._requests += 1
        self._tokens += permit.tokens

    def _expire(self, now: float) -> None:
        while self._past and self._past[0].leaves <= now:
            permit = self._past.popleft()
            self._requests -= 1
            self._tokens -= permit.tokens
        if not self._past:
            self._requests = self._tokens = 0.0  # no rounding error survives an empty window
