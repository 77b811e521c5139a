"""One permit actor for the cluster: who may call the judge's endpoint now, and what it has cost.

    permits = start_permits(endpoint, limits, run=..., max_usd=20.0, state_uri=...)     # on the driver; needs Ray
    grant = await permits.acquire.remote(run, tokens, usd)          # waits its turn; Grant, or Refusal for good
    outage = await permits.settle.remote([Settled(...)])

Notes:
- One actor a endpoint, by name, in the cluster: two judge jobs on one endpoint share its minute.
- Rates belong to the endpoint, dollars to the run. Both are put down about once a second, so that a job that was killed
  goes on with what it has spent, and does not take a second minute's allowance.
- First come, first served; a call whose caller died is given up for lost after a while, and counts as paid. What a
  killed driver held and waited for is given up when its run comes back, or any other joins.
- An outage (nothing but failures for a while) pauses everybody and is nobody's fault; when it lasts longer than the
  patience, runs are stopped, to be resumed.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import logging
import math
import time
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from meddam_core import storage
from meddam_core.judging.budget import Limits, Permit, PermitBook, Spent
from ray_jobs.purses import Purse, age_s, moment, put_down
from ray_jobs.session import beside_the_driver

logger = logging.getLogger(__name__)

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


class Permits:
    """The actor. Its methods run one at a time but for their waiting. See the module's text.

    Args:
        limits: the endpoint's; dollars are the runs' own.
        clock, sleep: time; a test turns it.
    """

    def __init__(
        self, limits: Limits, clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:  # fmt: skip
        self.limits = limits
        self.book = PermitBook(limits, clock)
        self._clock = clock
        self._sleep = sleep
        self._purses: dict[str, Purse] = {}
        self._ids = itertools.count()
        """Of grants, over all books: what is settled late must not settle another's call."""
        self._open: dict[int, tuple[str, Permit]] = {}
        self._holders: dict[str, str] = {}
        self._gone: set[str] = set()
        self._turn = asyncio.Lock()
        self._changed = asyncio.Event()
        self._failures = 0
        self._failing_since = clock()
        """When the first of the failures in a row came."""
        self._saved = -math.inf
        self._unwritten: Collection[str] = ()

    async def join(
        self, run: str, limits: Limits, max_usd: float | None, state_uri: str | None, *, timeout_s: float = 60.0,
        patience_s: float = 600.0, job: str = "", over: Collection[str] = (),
    ) -> str | None:  # fmt: skip
        """A run begins, and what it or a job that is over left behind is given up. Returns why it can't, or None.

        Args:
            timeout_s: after which the run's callers give a call up themselves.
            patience_s: how long nothing but failures may come before the run is stopped.
            job: the Ray job of the run's driver.
            over: Ray jobs whose drivers are gone.
        """
        for name in [n for n, purse in self._purses.items() if n != run and purse.job in over]:
            self._drop(name)
        earlier = self._drop(run)
        if limits != self.limits:
            if self._purses:
                used = f"used under other limits ({self.limits}) by {', '.join(sorted(self._purses))}"
                return f"this endpoint is {used}; give the same, or wait for the end of that"
            self.limits, self.book = limits, PermitBook(limits, self._clock)  # nobody is at it
        purse = Purse(max_usd, state_uri, timeout_s, patience_s, job)
        if state_uri is not None and storage.exists(state_uri):
            state = json.loads(storage.read_bytes(state_uri))
            if earlier is not None and earlier.num_calls >= state["num_calls"]:  # it knows more than was put down
                purse.take_over(earlier)
            else:
                purse.take_up(state)
            if not self.book.num_granted:
                self.book.restore({**state["book"], "spent_usd": 0.0}, age_s(state.get("saved")))
        self._purses[run] = purse
        self._failures = 0
        return None

    async def acquire(self, run: str, tokens: float, usd: float, holder: str = "") -> Grant | Refusal:
        """Waits for leave to make one call of at most so many tokens and dollars.

        `holder` names the process that calls, where it is the run's only one: when another comes, the one before it has
        died, and what it held or waited for is given up.
        """
        purse = self._purses.get(run)
        if holder and self._holders.get(run) != holder and holder not in self._gone:
            if run in self._holders:
                self._gone.add(self._holders[run])
            self._holders[run] = holder
            self._give_up_lost(run)
            self._changed.set()
        async with self._turn:
            while True:
                if purse is None or self._purses.get(run) is not purse or holder in self._gone:
                    return Refusal("another process has taken over")
                if (refusal := self._refusal(purse, usd)) is not None:
                    return refusal
                self._give_up_lost()
                if purse.is_beyond(usd):  # what running calls have reserved may be more than they will cost
                    await self._wait(purse.timeout_s)
                    continue
                answer = self.book.ask(tokens)
                if isinstance(answer, Spent):
                    return Refusal(answer.reason, stops=False)
                if isinstance(answer, Permit):
                    purse.num_calls += 1
                    purse.reserved_usd += usd
                    answer.usd = usd
                    grant = Grant(next(self._ids))
                    self._open[grant.id] = (run, answer)
                    return grant
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
            await self._save()
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
        await self._save()
        self._drop(run)
        return not self._purses

    # -- within --------------------------------------------------------------------------------------------------------

    def _drop(self, run: str) -> Purse | None:
        """A run's purse, taken away; its calls count as paid, and who waits for a permit of it gets none."""
        self._give_up_lost(run)
        self._holders.pop(run, None)
        self._changed.set()
        return self._purses.pop(run, None)

    async def _save(self) -> None:
        """Puts down what a restart must know. What cannot be written is told once, and goes with the next save."""
        unwritten = await asyncio.to_thread(put_down, self._states())
        for uri in unwritten.keys() - set(self._unwritten):
            logger.warning("%s; what the run has spent is put down later", unwritten[uri])
        self._unwritten = unwritten.keys()

    def _states(self) -> dict[str, bytes]:
        """What a restart must know of each run, by where it is put."""
        shared = {"saved": moment(), "book": self.book.state()}
        return {
            purse.state_uri: json.dumps(
                {**shared, **purse.state(), "num_open": sum(name == run for name, _ in self._open.values())}
            ).encode()
            for run, purse in self._purses.items()
            if purse.state_uri is not None
        }

    def _refusal(self, purse: Purse, usd: float) -> Refusal | None:
        if purse.max_usd is not None and purse.spent_usd + usd > purse.max_usd + 1e-9:
            return Refusal("max_usd is reached")
        silent_s = self._clock() - self._failing_since
        if self._failures >= OUTAGE_AFTER and silent_s > purse.patience_s:
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
            self._failures = 0
            self.book.succeeded(permit.started)
            self.book.hinted(call.remaining, call.reset_s)
            return
        self._failing_since = self._failing_since if self._failures else self._clock()
        self._failures += call.ending != "refused"
        if call.ending == "limited":
            self.book.limited(call.retry_after_s)
        elif call.retry_after_s is not None:
            self.book.pause(min(call.retry_after_s, LONGEST_PAUSE_S))
        if self._failures >= OUTAGE_AFTER:
            silent_s = self._clock() - self._failing_since
            self.book.down(min(max(0.25, silent_s / 4), LONGEST_PAUSE_S))

    def _give_up_lost(self, run: str | None = None) -> None:
        """Calls whose caller died, all of `run` or those of long ago: they count as made and paid."""
        now = self._clock()
        for number, (name, permit) in list(self._open.items()):
            purse = self._purses[name]
            if name == run or permit.started < now - purse.timeout_s - LOST_AFTER_S:
                del self._open[number]
                self.book.settle(permit, usd=0.0)
                purse.reserved_usd -= permit.usd
                purse.spent_usd += permit.usd
                purse.num_lost += 1


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
        .remote(limits)
    )
    job = ray.get_runtime_context().get_job_id()
    times = {"timeout_s": timeout_s, "patience_s": patience_s}
    why = ray.get(actor.join.remote(run, limits, max_usd, state_uri, **times, job=job, over=_ended_jobs()))
    if why is not None:
        raise ValueError(why)
    return actor


def _ended_jobs() -> list[str]:
    """Ray jobs whose drivers are gone. Needs Ray."""
    from ray._private.state import jobs  # asks the GCS; ray.util.state asks the dashboard, which may not be there

    return [job["JobID"] for job in jobs() if job["IsDead"]]


def end_permits(actor: Any, run: str) -> dict[str, Any]:
    """The run leaves; its totals, {} where the actor died. One that nobody uses any more is ended."""
    import ray

    try:
        totals: dict[str, Any] = ray.get(actor.totals.remote(run))
        if ray.get(actor.leave.remote(run)):
            ray.kill(actor)
    except ray.exceptions.RayActorError:
        return {}
    return totals
