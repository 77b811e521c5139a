"""How many judge calls may start now: requests and tokens a minute, calls at once, dollars. Arithmetic only.

    book = PermitBook(Limits(requests_per_min=600, tokens_per_min=200_000, max_concurrent=64, max_usd=20), clock)
    answer = book.ask(tokens=900, usd=0.0004)      # Permit, Wait(seconds) or Spent
    book.settle(answer, tokens=712, usd=0.0003)    # when the call is over

Notes:
- In no window of sixty seconds do calls of more requests or tokens than allowed reach the server: a call counts for a
  minute from when it reached the server at the latest, which is `slack_s` after the permit, or its reply.
- A book starts empty: as though the last minute had been used to the full, evenly. So a job that is killed and
  restarted does not get a second minute's allowance. `state` and `restore` carry the true past, and the dollars.
- Tokens and dollars are reserved by estimate before a call, and corrected by what was used after it.
- Concurrency adapts: a rate-limit answer halves it, at most once in a while, and each full round of successes adds one.
- A server is believed when it asks for a pause of up to a minute. For longer ones, and where it only hints that nothing
  is left, one call at a time is let through: when that succeeds it was not so.
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
LONGEST_PAUSE_S = 60.0
"""A minute's quota cannot need more; what asks for more is probed by single calls."""
HINTS_BELIEVED = 3
"""Headers that said "nothing left" and were wrong this often are not read any more."""
FADE_SLACK_S = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What is allowed; None is no limit. Raises ValueError for limits that allow nothing."""

    requests_per_min: float | None = None
    tokens_per_min: float | None = None
    max_concurrent: int = 32
    max_usd: float | None = None
    slack_s: float = 1.5
    """How long a call may take to reach the server, where no reply shows that it was there sooner."""

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
        self._in_order = True
        self._open: dict[int, Permit] = {}
        self._requests = 0.0
        self._tokens = 0.0
        self._not_before = -math.inf
        self._probing_since = self._probing_until = -math.inf
        """While it lasts one call runs at a time; the success of one that began within it ends it."""
        self._hinted = False
        self.num_wrong_hints = 0
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
        if self.num_running and now < self._probing_until:
            return Wait(min(self._probing_until - now, HALVE_EVERY_S), "one call at a time, until the server takes one")
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

    def settle(
        self,
        permit: Permit,
        *,
        tokens: float | None = None,
        usd: float | None = None,
        replied_ago_s: float | None = None,
    ) -> None:
        """A call has ended; what it really used replaces the estimate.

        `replied_ago_s` is how long ago the server's reply came: by then the call had reached it.
        Raises ValueError for a permit that was settled before.
        """
        if self._open.pop(permit.id, None) is None:
            raise ValueError("this permit was settled before")
        now = self.clock()
        self.spent_usd += permit.usd if usd is None else usd
        if replied_ago_s is not None and now - replied_ago_s + WINDOW_S < permit.leaves:
            permit.leaves = max(now - replied_ago_s, permit.started) + WINDOW_S
            self._in_order = False
        if tokens is not None:
            self._tokens += tokens - permit.tokens if permit.leaves > now else 0.0
            permit.tokens = tokens

    def cancel(self, permit: Permit) -> None:
        """A call that was never sent: it counts for nothing."""
        self.settle(permit, tokens=0, usd=0)
        if permit in self._past:
            self._past.remove(permit)
            self._requests -= 1

    def succeeded(self, started: float | None = None) -> None:
        """The server answered: after a full round of answers one more call may run at once.

        `started` is when the call began, by this book's clock: one that began while nothing was said to be left shows
        that it was not so.
        """
        if started is not None and self.clock() < self._probing_until and started > self._probing_since:
            self._probing_until = -math.inf
            self.num_wrong_hints += self._hinted
        self._successes += 1
        if self._successes >= self.concurrency:
            self._successes = 0
            self.concurrency = min(self.concurrency + 1, float(self.limits.max_concurrent))

    def limited(self, retry_after_s: float | None = None) -> None:
        """The server said that it is too much: run half as many at once, and nothing before the time it asks for."""
        now = self.clock()
        if retry_after_s is not None:
            self._not_before = max(self._not_before, now + min(retry_after_s, LONGEST_PAUSE_S))
            if retry_after_s > LONGEST_PAUSE_S:
                self._probe(now, now + retry_after_s)
        if now - self._halved >= HALVE_EVERY_S:
            self.concurrency = max(1.0, self.concurrency / 2)
            self._halved, self._successes = now, 0

    def hinted(self, remaining: int | None, reset_s: float | None) -> None:
        """What a reply's headers say is left, and when all is back. 0 is probed before it is believed."""
        if remaining == 0 and self.num_wrong_hints < HINTS_BELIEVED:
            now = self.clock()
            self._probe(now, now + min(1.0 if reset_s is None else reset_s, LONGEST_PAUSE_S), hint=True)

    def pause(self, seconds: float) -> None:
        """No call begins for so long."""
        self._not_before = max(self._not_before, self.clock() + seconds)

    def down(self, seconds: float) -> None:
        """The server seems to be down: a pause, then one call at a time until one succeeds."""
        self.pause(seconds)
        self._probe(self.clock(), math.inf)

    def _probe(self, now: float, until: float, hint: bool = False) -> None:
        if now >= self._probing_until:
            self._probing_since = now
            self._hinted = hint
        self._probing_until = max(self._probing_until, until)

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

    def restore(self, state: Mapping[str, Any], age_s: float | None) -> None:
        """Takes up a state saved `age_s` ago. What may have been granted since then is assumed to have been.

        Where the age is not known (None) the last minute counts as used to the full, and its calls as made just now.
        Raises ValueError when calls were granted already.
        """
        if self.num_granted:
            raise ValueError("a book that has granted permits cannot be restored")
        now, unknown = self.clock(), 1.0
        if age_s is not None:
            age_s = max(0.0, age_s)
            unknown = min(1.0, age_s / self._fade)  # at most what a paced job grants in that time
        age_s = age_s or 0.0
        self.spent_usd = float(state["spent_usd"])
        self._past.clear()
        self._requests = self._tokens = 0.0
        for left, tokens in sorted(state["calls"]):
            if left - age_s > 0:
                self._count(Permit(-1, now, float(tokens), 0.0, now + left - age_s))
        faded = max(0.0, float(state["assumed"]) - age_s / self._fade)
        pairs = ((self._requests, self.limits.requests_per_min), (self._tokens, self.limits.tokens_per_min))
        used = max(used / limit if limit else 0.0 for used, limit in pairs)
        self._started, self._phantom_share = now, min(1.0, max(0.0, min(faded + unknown, 1.0 - used)))

    # -- the window ----------------------------------------------------------------------------------------------------

    @property
    def _window(self) -> float:
        return WINDOW_S + self.limits.slack_s

    @property
    def _fade(self) -> float:
        """What is assumed of the time before the start was even, so that a late call is one of many."""
        return WINDOW_S + min(self.limits.slack_s, FADE_SLACK_S)

    def _assumed(self, at: float) -> float:
        """Share of the allowance still taken by the time before the start."""
        return max(0.0, self._phantom_share - (at - self._started) / self._fade)

    def _until(self, now: float, limit: float, used: float, need: float, size: Callable[[Permit], float]) -> float:
        """Seconds until a call fits in."""
        at = now
        for permit in (*self._past, None):  # between two calls leaving the window only the assumed past fades
            room = (limit - used - need) / limit + 1e-12
            if room >= 0:
                fits = max(at, self._started + (self._phantom_share - room) * self._fade)
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
        if not self._in_order:
            self._past = deque(sorted(self._past, key=lambda p: p.leaves))
            self._in_order = True
        while self._past and self._past[0].leaves <= now:
            permit = self._past.popleft()
            self._requests -= 1
            self._tokens -= permit.tokens
        if not self._past:
            self._requests = self._tokens = 0.0  # no rounding error survives an empty window
