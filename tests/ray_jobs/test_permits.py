"""The permit actor's account of its runs: what a killed driver leaves, whose patience counts, what is put down."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from meddam_core.judging.budget import Limits
from ray_jobs.permits import OUTAGE_AFTER, Grant, Permits, Refusal, Settled, end_permits, start_permits

SLOW, FAST = Limits(requests_per_min=60, max_concurrent=4), Limits(requests_per_min=6000, max_concurrent=4)
FREE = Limits(max_concurrent=4)
RUN, OTHER = "run", "other"


class Clock:
    """Time that only the test turns."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


async def granted(permits: Permits, run: str = RUN, usd: float = 0.0) -> Grant:
    grant = await asyncio.wait_for(permits.acquire(run, 10, usd), 60)
    assert isinstance(grant, Grant), grant
    return grant


async def fail(permits: Permits, clock: Clock, times: int, run: str = RUN) -> None:
    for _ in range(times):
        clock.now += 30.0  # longer than an outage's longest pause
        await permits.settle([Settled(id=(await granted(permits, run)).id, ending="failed")])


def test_the_run_of_a_killed_driver_comes_back_under_other_limits() -> None:
    async def work() -> tuple[str | None, Limits]:
        permits = Permits(SLOW)
        assert await permits.join(RUN, SLOW, None, None) is None  # then a kill -9: nobody leaves
        return await permits.join(RUN, FAST, None, None), permits.limits

    assert asyncio.run(work()) == (None, FAST)


@pytest.mark.parametrize(("over", "refused"), [(["01"], False), (["02"], True), ([], True)])
def test_only_a_living_driver_holds_another_run_to_its_limits(over: list[str], refused: bool) -> None:
    async def work() -> str | None:
        permits = Permits(SLOW)
        await permits.join(OTHER, SLOW, None, None, job="01")
        return await permits.join(RUN, FAST, None, None, job="03", over=over)

    why = asyncio.run(work())
    assert (why is not None) is refused
    assert why is None or (OTHER in why and "60" in why), "it must say who, and which limits"


def test_open_calls_of_a_killed_driver_are_paid_for_once_when_it_comes_back(tmp_path: Path) -> None:
    state = str(tmp_path / "budget.json")

    async def work() -> list[dict[str, Any]]:
        permits = Permits(FREE)
        await permits.join(RUN, FREE, 10.0, state)
        first, *others = [await granted(permits, usd=0.25) for _ in range(3)]
        await permits.settle([Settled(id=first.id, ending="answered", usd=0.2)])  # put down, with two open
        await permits.join(RUN, FREE, 10.0, state)
        found = [await permits.totals(RUN)]
        await permits.settle([Settled(id=c.id, ending="answered", usd=0.2) for c in others])  # by dead callers
        again = await granted(permits, usd=0.25)
        await permits.settle([Settled(id=again.id, ending="answered", usd=0.1)])
        await permits.leave(RUN)
        return [*found, json.loads(Path(state).read_text())]

    back, ended = asyncio.run(work())
    assert back["spent_usd"] == pytest.approx(0.2 + 2 * 0.25)
    assert (back["num_calls"], back["num_lost"], back["num_running"]) == (3, 2, 0)
    assert ended["spent_usd"] == pytest.approx(0.2 + 2 * 0.25 + 0.1)
    assert (ended["num_calls"], ended["num_lost"], ended["num_open"]) == (4, 2, 0)


def test_what_was_spent_elsewhere_meanwhile_is_not_forgotten(tmp_path: Path) -> None:
    """Fails if what the actor remembers of a killed driver hides what the run has put down from another cluster."""
    state = str(tmp_path / "budget.json")

    async def work() -> dict[str, Any]:
        permits, elsewhere = Permits(FREE), Permits(FREE)
        for book, times in ((permits, 1), (elsewhere, 3)):
            await book.join(RUN, FREE, 10.0, state)
            for _ in range(times):
                await book.settle([Settled(id=(await granted(book, usd=1.0)).id, ending="answered", usd=1.0)])
        await elsewhere.leave(RUN)
        await permits.join(RUN, FREE, 10.0, state)
        return await permits.totals(RUN)

    assert asyncio.run(work())["spent_usd"] == pytest.approx(4.0)


def test_a_run_begun_afresh_at_the_same_place_owes_nothing(tmp_path: Path) -> None:
    state = tmp_path / "budget.json"

    async def work() -> dict[str, Any]:
        permits = Permits(FREE)
        await permits.join(RUN, FREE, 10.0, str(state))
        await permits.settle([Settled(id=(await granted(permits, usd=1.0)).id, ending="answered", usd=1.0)])
        state.unlink()
        await permits.join(RUN, FREE, 10.0, str(state))
        return await permits.totals(RUN)

    assert asyncio.run(work())["spent_usd"] == 0


def test_callers_of_a_killed_driver_take_no_permit_from_those_that_come_back() -> None:
    async def work() -> tuple[list[Grant | Refusal], Grant | Refusal]:
        permits = Permits(Limits(max_concurrent=1))
        await permits.join(RUN, permits.limits, None, None)
        await granted(permits)
        waiting = [asyncio.ensure_future(permits.acquire(RUN, 10, 0.0)) for _ in range(3)]
        await asyncio.sleep(0)
        await permits.join(RUN, permits.limits, None, None)
        return await asyncio.wait_for(asyncio.gather(*waiting), 10), await permits.acquire(RUN, 10, 0.0)

    waited, new = asyncio.run(work())
    assert {type(w) for w in waited} == {Refusal}
    assert isinstance(new, Grant)


def test_a_call_settled_late_settles_no_other_under_new_limits() -> None:
    async def work() -> int:
        permits = Permits(FREE)
        await permits.join(RUN, FREE, None, None)
        old = await granted(permits)
        await permits.join(RUN, Limits(max_concurrent=8), None, None)
        await granted(permits)
        await permits.settle([Settled(id=old.id, ending="answered")])
        return int((await permits.totals(RUN))["num_running"])

    assert asyncio.run(work()) == 1


def test_each_run_has_its_own_patience_and_a_resumed_one_the_new() -> None:
    async def work() -> list[type]:
        clock = Clock()
        permits = Permits(FREE, clock)
        await permits.join(RUN, FREE, None, None, patience_s=100.0)
        await permits.join(OTHER, FREE, None, None, patience_s=1e6)
        await fail(permits, clock, OUTAGE_AFTER, OTHER)
        clock.now += 30.0
        refused = await permits.acquire(RUN, 10, 0.0)
        await fail(permits, clock, 1, OTHER)
        await permits.join(RUN, FREE, None, None, patience_s=1e6)
        await fail(permits, clock, OUTAGE_AFTER)
        clock.now += 30.0
        return [type(refused), type(await permits.acquire(RUN, 10, 0.0))]

    assert asyncio.run(work()) == [Refusal, Grant]


def test_each_run_has_its_own_timeout() -> None:
    async def work() -> tuple[int, int]:
        clock = Clock()
        permits = Permits(FREE, clock)
        await permits.join(RUN, FREE, None, None, timeout_s=10.0)
        await permits.join(OTHER, FREE, None, None, timeout_s=1000.0)
        for run in (RUN, OTHER):
            await granted(permits, run)
        clock.now += 100.0
        await granted(permits)
        return (await permits.totals(RUN))["num_lost"], (await permits.totals(OTHER))["num_lost"]

    assert asyncio.run(work()) == (1, 0)


def test_an_outage_begins_with_its_first_failure_not_with_the_last_answer() -> None:
    """Fails if a run that called nothing for an hour is stopped by a few failures within a second."""

    async def work() -> tuple[Grant | Refusal, Grant | Refusal]:
        clock = Clock()
        permits = Permits(Limits(max_concurrent=OUTAGE_AFTER), clock)
        await permits.join(RUN, permits.limits, None, None, patience_s=600.0)
        clock.now += 3600.0
        calls = [await granted(permits) for _ in range(OUTAGE_AFTER)]
        assert await permits.settle([Settled(id=c.id, ending="failed") for c in calls])
        clock.now += 30.0
        probe = await permits.acquire(RUN, 10, 0.0)
        assert isinstance(probe, Grant)
        await permits.settle([Settled(id=probe.id, ending="failed")])
        clock.now += 600.0
        return probe, await permits.acquire(RUN, 10, 0.0)

    probe, late = asyncio.run(work())
    assert isinstance(probe, Grant)
    assert isinstance(late, Refusal) and late.stops and "answered no call for 630 s" in late.why


def test_a_budget_that_cannot_be_written_fails_no_call_and_is_written_later(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, clock = tmp_path / "run", Clock()

    async def work() -> None:
        permits = Permits(FREE, clock)
        await permits.join(RUN, FREE, 10.0, str(folder / "budget.json"))

        async def pay() -> None:
            clock.now += 5.0
            await permits.settle([Settled(id=(await granted(permits, usd=1.0)).id, ending="answered", usd=1.0)])

        folder.write_text("a file where the folder should be")
        await pay()
        await pay()
        folder.unlink()
        await pay()

    with caplog.at_level(logging.WARNING, logger="ray_jobs.permits"):
        asyncio.run(work())
    assert json.loads((folder / "budget.json").read_text())["spent_usd"] == pytest.approx(3.0)
    (said,) = [r.getMessage() for r in caplog.records]
    assert "budget.json" in said


def test_a_run_whose_budget_cannot_be_written_still_leaves(tmp_path: Path) -> None:
    async def work() -> bool:
        permits = Permits(FREE)
        await permits.join(RUN, FREE, None, str(tmp_path / "run" / "budget.json"))
        (tmp_path / "run").write_text("a file where the folder should be")
        return await permits.leave(RUN)

    assert asyncio.run(work()), "nobody is left"


DRIVER = """
import asyncio, sys
import ray
from meddam_core.judging.budget import Limits
from ray_jobs.permits import start_permits
ray.init(address=sys.argv[1], namespace="meddam", log_to_driver=False)
limits = Limits(requests_per_min=60, max_concurrent=4)
for run in ("run", "other"):
    actor = start_permits(sys.argv[2], limits, run=run, max_usd=None, state_uri=f"{sys.argv[3]}/{run}.json",
                          timeout_s=60.0, patience_s=60.0)
print("joined", flush=True)
sys.stdin.read()
"""


def test_a_standing_cluster_forgets_a_driver_that_was_killed(ray_session: None, tmp_path: Path) -> None:
    import ray

    endpoint = "http://127.0.0.1:9/v1"
    address = ray.get_runtime_context().gcs_address
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, address, endpoint, str(tmp_path)], stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip

    def join(limits: Limits) -> Any:
        return start_permits(
            endpoint, limits, run="run", max_usd=None, state_uri=str(tmp_path / "run.json"), timeout_s=60.0,
            patience_s=60.0,
        )  # fmt: skip

    assert driver.stdout is not None
    while driver.stdout.readline().strip() != "joined":
        assert driver.poll() is None
    with pytest.raises(ValueError, match="other limits"):
        join(FAST)
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    deadline = time.monotonic() + 60
    while True:  # until Ray has noticed
        try:
            actor = join(FAST)
        except ValueError:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        else:
            break
    assert end_permits(actor, "run")["num_calls"] == 0
