"""One permit actor for the cluster: who may call the judge's endpoint now, and what it has cost.

    permits = start_permits(endpoint, limits, run=..., max_usd=20.0, state_uri=...)     # on the driver; needs Ray
    grant = await permits.acquire.remote(run, tokens, usd)          # waits its turn; Grant, or Refusal for good
    outage = await permits.settle.remote([Settled(...)])

Notes:
- One actor a endpoint, by name, in the cluster: two judge jobs on one endpoint share its minute.
- Rates belong to the endpoint, dollars to the run. Both are put down about once a second, so that a job that was killed
  goes on with what it has spent, and does not take a second minute's allowance.
- First come, first served; a call whose caller died is given up for lost after a while, and counts as paid.
- An outage (nothing but failures for a while) pauses everybody and is nobody's fault; when it lasts longer than the
  patience, runs are stopped, to be resumed.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from meddam_core import storage
from meddam_core.judging.budget import Limits, Permit, PermitBook, Spent
from ray_jobs.session import beside_the_driver

Ending = Literal["answered", "limited", "failed", "refused"]
"""answered: a reply came. limited: 429. failed: an error that may pass. refused: one that will not."""

SAVE_EVERY_S = 1.0
OUTAGE_AFTER = 8
"""Failures in a row, of all calls together, that look like an outage."""
LONGEST_PAUSE_S = 20.0
LOST_AFTER_S = 60.0
"""A call that is not settled so long after its own timeout has lost its caller."""
MAX_WAITING = 4096
"""Callers that may wait in the actor at once."""


@dataclass(frozen=True, slots=True)
class Grant:
    """Leave for one call."""

    id: int


@dataclass(frozen=True, slots=True)
class Refusal:
    """No call, now or later in this job. `stops` tells whether the run must end, or this one call is out of measure."""

    why: str
    stops: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Settled:
    """How a call ended."""

    id: int
    ending: Ending
    tokens: float | None = None
    """Used; None where unknown, which keeps the estimate."""
    usd: float | None = None
    replied_ago_s: float | None = None
    retry_after_s: float | None = None
    remaining: int | None = None
    reset_s: float | None = None


@dataclass(slots=True)
class Purse:
    """What one run may spend, and has."""

    max_usd: float | None
    state_uri: str | None
    spent_usd: float = 0.0
    reserved_usd: float = 0.0
    num_calls: int = 0
    num_answered: int = 0
    num_limited: int = 0
    num_failed: int = 0
    num_tokens: int = 0
    num_lost: int = 0
    """Calls of drivers and workers that were killed: begun, never settled. They may have been paid twice."""
    earlier: dict[str, float] = field(default_factory=dict)

    def state(self) -> dict[str, Any]:
        """What a resumed run must know."""
        names = ("num_calls", "num_answered", "num_limited", "num_failed", "num_tokens", "num_lost")
        return {"spent_usd": self.spent_usd + self.reserved_usd, **{n: getattr(self, n) for n in names}}


class Permits:
    """The actor. Its methods run one at a time but for their waiting. See the module's text.

    Args:
        limits: the endpoint's; dollars are the runs' own.
        timeout_s: after which callers give a call up themselves.
        patience_s: how long nothing but failures may come before runs are stopped.
        clock, sleep: time; a test turns it.
    """

    def __init__(
        self, limits: Limits, timeout_s: float = 60.0, patience_s: float = 600.0,
        clock: Callable[[], float] = time.monotonic, sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:  # fmt: skip
        self.limits = limits
        self.book = PermitBook(limits, clock)
        self._clock = clock
        self._sleep = sleep
        self._timeout_s = timeout_s
        self._patience_s = patience_s
        self._purses: dict[str, Purse] = {}
        self._open: dict[int, tuple[str, Permit]] = {}
        self._holders: dict[str, str] = {}
        self._gone: set[str] = set()
        self._turn = asyncio.Lock()
        self._changed = asyncio.Event()
        self._failures = 0
        self._last_answer = clock()
        self._waited_since: float | None = None
        self._saved = -math.inf

    async def join(self, run: str, limits: Limits, max_usd: float | None, state_uri: str | None) -> str | None:
        """A run begins. Returns why it can't, or None."""
        if limits != self.limits and self._purses:
            return f"another job judges with this endpoint under other limits ({self.limits}); give the same"
        if not self._purses:  # nobody is at it: the new limits hold, for a book that starts empty
            self.limits, self.book = limits, PermitBook(limits, self._clock)
        purse = Purse(max_usd, state_uri)
        if state_uri is not None and storage.exists(state_uri):
            self._take_up(purse, json.loads(storage.read_bytes(state_uri)))
        self._purses[run] = purse
        self._failures, self._last_answer = 0, self._clock()
        return None

    async def acquire(self, run: str, tokens: float, usd: float, holder: str = "") -> Grant | Refusal:
        """Waits for leave to make one call of at most so many tokens and dollars.

        `holder` names the process that calls, where it is the run's only one: when another comes, the one before it has
        died, and what it held or waited for is given up.
        """
        if holder and self._holders.get(run) != holder and holder not in self._gone:
            if run in self._holders:
                self._gone.add(self._holders[run])
            self._holders[run] = holder
            self._give_up_lost(run)
            self._changed.set()
        async with self._turn:
            while True:
                if holder in self._gone:
                    return Refusal("another process has taken over")
                if (refusal := self._refusal(run, usd)) is not None:
                    return refusal
                self._give_up_lost()
                if self._beyond(run, usd):  # what running calls have reserved may be more than they will cost
                    await self._wait(self._timeout_s)
                    continue
                answer = self.book.ask(tokens)
                if isinstance(answer, Spent):
                    return Refusal(answer.reason, stops=False)
                if isinstance(answer, Permit):
                    purse = self._purses[run]
                    purse.num_calls += 1
                    purse.reserved_usd += usd
                    answer.usd = usd
                    self._open[answer.id] = (run, answer)
                    return Grant(answer.id)
                await self._wait(answer.seconds)

    async def settle(self, calls: Sequence[Settled]) -> bool:
        """Calls have ended. Returns whether the endpoint seems to be down: failures are then nobody's fault."""
        for call in calls:
            if call.id not in self._open:  # given up for lost meanwhile
                continue
            run, permit = self._open.pop(call.id)
            self._book(run, permit, call)
        self._changed.set()
        if self._clock() - self._saved >= SAVE_EVERY_S:
            self._saved = self._clock()
            await asyncio.to_thread(self._put, self._states())
        return self._failures >= OUTAGE_AFTER

    async def totals(self, run: str) -> dict[str, Any]:
        """The run's calls, tokens and dollars, and how many calls run now."""
        purse = self._purses[run]
        return {
            **purse.state(), "spent_usd": purse.spent_usd, "num_running": self.book.num_running,
            "concurrency": self.book.concurrency, "outage": self._failures >= OUTAGE_AFTER,
        }  # fmt: skip

    async def leave(self, run: str) -> bool:
        """A run has ended. Returns whether no other is left."""
        self._give_up_lost(run)
        await asyncio.to_thread(self._put, self._states())
        self._purses.pop(run, None)
        self._holders.pop(run, None)
        return not self._purses

    # -- within --------------------------------------------------------------------------------------------------------

    def _states(self) -> dict[str, bytes]:
        """What a restart must know of each run, by where it is put."""
        shared = {"saved": _moment(), "book": self.book.state()}
        return {
            purse.state_uri: json.dumps(
                {**shared, **purse.state(), "num_open": sum(name == run for name, _ in self._open.values())}
            ).encode()
            for run, purse in self._purses.items()
            if purse.state_uri is not None
        }

    @staticmethod
    def _put(states: dict[str, bytes]) -> None:
        for uri, state in states.items():
            storage.write_bytes(uri, state)

    def _beyond(self, run: str, usd: float) -> bool:
        purse = self._purses[run]
        committed = purse.spent_usd + purse.reserved_usd + usd
        return purse.max_usd is not None and purse.reserved_usd > 1e-12 and committed > purse.max_usd + 1e-9

    def _take_up(self, purse: Purse, state: dict[str, Any]) -> None:
        for name in ("num_calls", "num_answered", "num_limited", "num_failed", "num_tokens", "num_lost"):
            setattr(purse, name, int(state[name]))
        purse.spent_usd = float(state["spent_usd"])
        purse.num_lost += int(state["num_open"])
        if not self.book.num_granted:
            self.book.restore({**state["book"], "spent_usd": 0.0}, _age_s(state.get("saved")))

    def _refusal(self, run: str, usd: float) -> Refusal | None:
        purse = self._purses[run]
        if purse.max_usd is not None and purse.spent_usd + usd > purse.max_usd + 1e-9:
            return Refusal("max_usd is reached")
        silent_s = self._clock() - self._last_answer
        if self._failures >= OUTAGE_AFTER and silent_s > self._patience_s:
            return Refusal(f"the endpoint has answered no call for {silent_s:.0f} s; see that it works, then run again")
        return None

    async def _wait(self, seconds: float) -> None:
        self._changed.clear()
        waiting = asyncio.ensure_future(self._changed.wait())
        sleeping = asyncio.ensure_future(self._sleep(min(seconds, 5.0)))
        await asyncio.wait({waiting, sleeping}, return_when=asyncio.FIRST_COMPLETED)
        for task in (waiting, sleeping):
            task.cancel()

    def _book(self, run: str, permit: Permit, call: Settled) -> None:
        self.book.settle(permit, tokens=call.tokens, usd=0.0, replied_ago_s=call.replied_ago_s)
        purse = self._purses.get(run)
        if purse is not None:
            purse.reserved_usd -= permit.usd
            purse.spent_usd += permit.usd if call.usd is None else call.usd
            purse.num_tokens += int(call.tokens or 0)
            purse.num_answered += call.ending == "answered"
            purse.num_limited += call.ending == "limited"
            purse.num_failed += call.ending in ("failed", "refused")
        if call.ending == "answered":
            self._failures, self._last_answer = 0, self._clock()
            self.book.succeeded(permit.started)
            self.book.hinted(call.remaining, call.reset_s)
            return
        self._failures += call.ending != "refused"
        if call.ending == "limited":
            self.book.limited(call.retry_after_s)
        elif call.retry_after_s is not None:
            self.book.pause(min(call.retry_after_s, LONGEST_PAUSE_S))
        if self._failures >= OUTAGE_AFTER:
            silent_s = self._clock() - self._last_answer
            self.book.down(min(max(0.25, silent_s / 4), LONGEST_PAUSE_S))

    def _give_up_lost(self, run: str | None = None) -> None:
        """Calls whose caller died: they count as made and paid."""
        oldest = self._clock() - self._timeout_s - LOST_AFTER_S
        for name, permit in [p for p in self._open.values() if p[0] == run or p[1].started < oldest]:
            del self._open[permit.id]
            self.book.settle(permit, usd=0.0)
            if (purse := self._purses.get(name)) is not None:
                purse.reserved_usd -= permit.usd
                purse.spent_usd += permit.usd
                purse.num_lost += 1


def _moment() -> dict[str, Any]:
    """Now, by a clock that nobody sets: it counts from the boot of this machine, for all of its processes."""
    return {"boot": _boot(), "monotonic_s": time.monotonic()}


def _age_s(moment: dict[str, Any] | None) -> float | None:
    """Seconds since a `_moment`; None where it is another machine's: wall clocks differ, and jump."""
    if moment is None or moment["boot"] != _boot() or moment["boot"] is None:
        return None
    return max(0.0, time.monotonic() - float(moment["monotonic_s"]))


def _boot() -> str | None:
    """What names this boot of this machine; None where the kernel doesn't tell."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None


def start_permits(
    endpoint: str, limits: Limits, *, run: str, max_usd: float | None, state_uri: str, timeout_s: float,
    patience_s: float,
) -> Any:  # fmt: skip
    """The actor of an endpoint, this run having joined it: started where there is none. Needs Ray.

    Raises ValueError where another job uses the endpoint under other limits.
    """
    import ray

    name = f"permits-{hashlib.sha256(endpoint.encode()).hexdigest()[:12]}"
    place: dict[str, Any] = {"name": name, "get_if_exists": True, "lifetime": "detached"}
    actor: Any = (
        ray.remote(Permits)
        .options(**place, num_cpus=0, max_concurrency=MAX_WAITING, scheduling_strategy=beside_the_driver())
        .remote(limits, timeout_s, patience_s)
    )
    why = ray.get(actor.join.remote(run, limits, max_usd, state_uri))
    if why is not None:
        raise ValueError(why)
    return actor


def end_permits(actor: Any, run: str) -> dict[str, Any]:
    """The run leaves; its totals. The actor of an endpoint that nobody uses any more is ended."""
    import ray

    totals: dict[str, Any] = ray.get(actor.totals.remote(run))
    if ray.get(actor.leave.remote(run)):
        ray.kill(actor)
    return totals
