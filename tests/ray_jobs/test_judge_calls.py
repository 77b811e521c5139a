"""Permits, retries and the store of paid verdicts, against a real server with a quota that misbehaves. No Ray."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

from meddam_core.judging.budget import Limits
from meddam_core.judging.cache import VerdictCache
from meddam_core.judging.egress import Endpoint
from meddam_core.judging.llm import LlmJudge, make_client
from meddam_core.judging.protocol import Unscored, Verdict
from qa_library import Question, load_library, question_about
from ray_jobs.judge_calls import Caller, JudgeStopped, Prices, RetryRules, VerdictStore
from ray_jobs.permits import Grant, Permits, Refusal, Settled
from tests.faults.quota_server import PAID, SHARES, Quota, QuotaServer, busiest_minute, paid_more_than_once

LIBRARY = load_library()
QUESTION = question_about(LIBRARY, "lidc_idri", "margin", expected="sharp")
SECRET = "Mustermann"
RUN = "run"


class Local:
    """The permit book in this process."""

    def __init__(self, permits: Permits) -> None:
        self.permits = permits

    async def acquire(self, tokens: float, usd: float) -> Grant | Refusal:
        return await self.permits.acquire(RUN, tokens, usd)

    async def settle(self, calls: Sequence[Settled]) -> bool:
        return await self.permits.settle(calls)


def ask(
    server: QuotaServer, folder: Path, captions: Sequence[str], *, limits: Limits | None = None,
    max_usd: float | None = None, rules: RetryRules | None = None, patience_s: float = 60.0,
    state: str | None = None, prices: Prices | None = None, question: Question = QUESTION,
) -> tuple[list[Verdict | BaseException], dict[str, float]]:  # fmt: skip
    """Verdicts on the captions, asked for all at once, and the permits' totals."""

    async def work() -> tuple[list[Verdict | BaseException], dict[str, float]]:
        permits = Permits(limits or Limits(max_concurrent=16))
        joined = permits.join(RUN, permits.limits, max_usd, state, timeout_s=2.0, patience_s=patience_s)
        assert await joined is None
        port = Local(permits)
        endpoint = Endpoint(server.url, "inside")
        client = make_client(endpoint, "sk-secret", timeout_s=1.0)
        store = VerdictStore(
            VerdictCache(str(folder / "cache")), VerdictCache(str(folder / "ledger"), keep_unscored=True), port
        )
        caller = Caller(
            LlmJudge(client, "m", endpoint), store, port, prices=prices or Prices(), max_concurrent=16,
            rules=rules or RetryRules(first_wait_s=0.01, timeout_s=1.0), rng=random.Random(0),
        )  # fmt: skip
        found = await asyncio.gather(*(caller.verdict(question, c, "deny") for c in captions), return_exceptions=True)
        totals = await permits.totals(RUN)
        await permits.leave(RUN)
        await client.close()
        return found, totals

    return asyncio.run(work())


def verdicts(found: Sequence[Verdict | BaseException]) -> list[Verdict]:
    assert not [f for f in found if isinstance(f, BaseException)], found
    return [f for f in found if isinstance(f, Verdict)]


CAPTIONS = [f"Caption {i} of {SECRET}." for i in range(60)]


def test_every_fault_at_once_and_each_question_one_verdict(tmp_path: Path) -> None:
    shares = {**SHARES, "error": 0.15, "close": 0.08, "hang": 0.02, "prose": 0.05, "letter": 0.05, "limited": 0.03}
    with QuotaServer(Quota(None, latency_s=(0.0, 0.02), shares=shares, seed=3, hang_s=5)) as server:
        found, totals = ask(server, tmp_path, CAPTIONS)
        outcomes = Counter(s.outcome for s in server.seen)
        assert {"error", "close", "prose", "letter"} <= set(outcomes), "the faults must have come"
        decided = [v for v in verdicts(found) if v.choice is not None]
        assert len(found) == 60
        assert {v.reason for v in verdicts(found) if v.choice is None} <= {Unscored.UNPARSABLE, Unscored.CALL_FAILED}
        assert len(decided) >= 40
        assert paid_more_than_once(server.seen) == 0
        assert totals["num_calls"] >= len(server.seen)  # a call may end before its connection is taken up
        assert totals["num_answered"] == sum(s.outcome in PAID for s in server.seen)
        asked_before = len(server.seen)
        again, _ = ask(server, tmp_path, CAPTIONS)  # as after a kill: cache and ledger know it all
        assert len(server.seen) == asked_before
    assert [v.choice for v in verdicts(again)] == [v.choice for v in verdicts(found)]
    assert [v.reason for v in verdicts(again)] == [v.reason for v in verdicts(found)]
    stored = b"".join(f.read_bytes() for f in tmp_path.rglob("*.*"))
    assert SECRET.encode() not in stored


def test_the_same_words_asked_twice_at_once_are_paid_for_once(tmp_path: Path) -> None:
    with QuotaServer(Quota(None, latency_s=(0.05, 0.05))) as server:
        found, _ = ask(server, tmp_path, ["the same caption"] * 30)
        assert len(server.seen) == 1
    assert len({v.choice for v in verdicts(found)}) == 1
    assert sum(v.cached for v in verdicts(found)) == 29


def test_a_quota_is_never_broken_and_a_burst_waits(tmp_path: Path) -> None:
    """Fails if calls are made without permits, or if a new job takes a minute's allowance at once."""
    with QuotaServer(Quota(1200, latency_s=(0.0, 0.02))) as server:
        found, _ = ask(server, tmp_path, CAPTIONS[:40], limits=Limits(requests_per_min=1200, max_concurrent=16))
        spread = server.seen[-1].at - server.seen[0].at
        assert busiest_minute(server.seen) <= 1200
        assert not [s for s in server.seen if s.outcome == "over"]
    assert len(verdicts(found)) == 40
    assert spread >= 39 * 60 / 1200 * 0.9, "40 calls at 20 a second cannot take less than two seconds"


def test_a_failure_that_repeats_is_given_up_and_named(tmp_path: Path) -> None:
    with QuotaServer(Quota(None, latency_s=(0.0, 0.0), shares={"error": 1.0})) as server:
        rules = RetryRules(first_wait_s=0.01, timeout_s=1.0, outage_grace_s=0.2)
        found, totals = ask(server, tmp_path, CAPTIONS[:2], rules=rules)
        assert 8 <= len(server.seen) <= 40
    assert [v.reason for v in verdicts(found)] == [Unscored.CALL_FAILED] * 2
    assert totals["num_answered"] == 0


def test_an_endpoint_that_is_down_for_long_stops_the_run(tmp_path: Path) -> None:
    with QuotaServer(Quota(None, latency_s=(0.0, 0.0), limited_spell_s=(0.0, 1e9))) as server:
        found, _ = ask(server, tmp_path, CAPTIONS[:20], patience_s=0.5)
        assert len(server.seen) < 60, "in an outage one call at a time looks whether it is over"
    stopped = [f for f in found if isinstance(f, JudgeStopped)]
    assert len(stopped) == 20
    assert "has answered no call" in str(stopped[0])
    assert SECRET not in str(stopped)


def test_an_endpoint_that_refuses_the_key_stops_the_run_at_once(tmp_path: Path) -> None:
    with QuotaServer(Quota(None, latency_s=(0.0, 0.0), shares={"denied": 1.0})) as server:
        found, _ = ask(server, tmp_path, CAPTIONS[:30])
        assert len(server.seen) <= 30, "none is tried again"
    assert {type(f) for f in found} == {JudgeStopped}
    assert "refuses every call (401)" in str(found[0])
    assert SECRET not in str(found)
    assert not list(tmp_path.rglob("*.parquet"))


def test_dollars_stop_the_run_and_what_was_paid_is_kept(tmp_path: Path) -> None:
    state = str(tmp_path / "budget.json")
    prices = Prices(prompt_usd=100.0, reply_usd=0.0)
    with QuotaServer(Quota(None, latency_s=(0.0, 0.01))) as server:
        found, totals = ask(server, tmp_path, CAPTIONS, max_usd=0.5, state=state, prices=prices)
        paid_first = len(server.seen)
        assert next(str(f) for f in found if isinstance(f, JudgeStopped)) == "max_usd is reached"
        assert 0 < totals["spent_usd"] <= 0.5
        assert json.loads(Path(state).read_text())["spent_usd"] == pytest.approx(totals["spent_usd"])
        found, totals = ask(server, tmp_path, CAPTIONS, max_usd=100.0, state=state, prices=prices)
        assert len(server.seen) == 60
    assert 0 < paid_first < 60
    assert len(verdicts(found)) == 60
    assert totals["num_calls"] == 60


def test_calls_of_a_killed_driver_are_counted(tmp_path: Path) -> None:
    state = str(tmp_path / "budget.json")

    async def die() -> None:
        permits = Permits(Limits(max_concurrent=8))
        await permits.join(RUN, permits.limits, None, state)
        first = await permits.acquire(RUN, 100, 0.25)
        for _ in range(3):
            await permits.acquire(RUN, 100, 0.25)
        assert isinstance(first, Grant)
        await permits.settle([Settled(id=first.id, ending="answered", tokens=90, usd=0.2)])  # saves; then a kill -9

    async def resume() -> dict[str, float]:
        permits = Permits(Limits(max_concurrent=8))
        await permits.join(RUN, permits.limits, None, state)
        return await permits.totals(RUN)

    asyncio.run(die())
    totals = asyncio.run(resume())
    assert (totals["num_lost"], totals["num_calls"]) == (3, 4)
    assert totals["spent_usd"] == pytest.approx(0.2 + 3 * 0.25)


def test_what_a_dead_process_held_and_waited_for_is_given_up(tmp_path: Path) -> None:
    async def work() -> tuple[object, ...]:
        permits = Permits(Limits(max_concurrent=2))
        await permits.join(RUN, permits.limits, None, None)
        for _ in range(2):
            assert isinstance(await permits.acquire(RUN, 10, 0.0, "dead"), Grant)
        waiting = asyncio.ensure_future(permits.acquire(RUN, 10, 0.0, "dead"))
        await asyncio.sleep(0.01)
        assert not waiting.done()
        new = await asyncio.wait_for(permits.acquire(RUN, 10, 0.0, "new"), 10)
        late = await permits.acquire(RUN, 10, 0.0, "dead")
        return new, await waiting, late, (await permits.totals(RUN))["num_lost"]

    new, waited, late, lost = asyncio.run(work())
    assert isinstance(new, Grant)
    assert isinstance(waited, Refusal) and isinstance(late, Refusal)
    assert lost == 2


def test_a_second_run_shares_the_minute_and_must_agree_on_it(tmp_path: Path) -> None:
    async def join() -> tuple[str | None, str | None]:
        permits = Permits(Limits(requests_per_min=60))
        await permits.join("one", permits.limits, None, None)
        return (
            await permits.join("two", Limits(requests_per_min=600), None, None),
            await permits.join("two", Limits(requests_per_min=60), None, None),
        )

    refused, agreed = asyncio.run(join())
    assert refused is not None and "other limits" in refused
    assert agreed is None
