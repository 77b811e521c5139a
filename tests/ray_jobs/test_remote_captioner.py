"""The calls of a remote captioner: what is tried again, what is given up, and what an outage or a dead actor means."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError

from meddam_core.engines.base import Sampling
from meddam_core.engines.remote import ChatFailed, ChatReply
from meddam_core.judging.budget import Limits
from meddam_core.judging.egress import Endpoint
from meddam_core.judging.llm import JudgeCallError, RateHeaders, make_client
from ray_jobs import judges, remote_captioner
from ray_jobs.judge_calls import RetryRules
from ray_jobs.judges import ActorPermits
from ray_jobs.permits import OUTAGE_AFTER, Grant, Permits, Refusal, Settled
from ray_jobs.remote_captioner import PermittedChat
from tests.faults.quota_server import Quota, QuotaServer

MESSAGES = [{"role": "user", "content": [{"type": "text", "text": "Describe it."}]}]
CONNECTION = JudgeCallError("connection", retryable=True)
ERROR = JudgeCallError("server error", status=500, retryable=True)
RULES = RetryRules(first_wait_s=0.0)


def completion(**choice: Any) -> Any:
    message = SimpleNamespace(content="A nodule.", refusal=None)
    chosen = SimpleNamespace(**{"message": message, "finish_reason": "stop", **choice})
    return SimpleNamespace(choices=[chosen], usage=SimpleNamespace(prompt_tokens=9, completion_tokens=3))


class Endless:
    """Permits without end, which tell an outage after so many failures in a row as the actor does, or never."""

    def __init__(self, tells: bool) -> None:
        self.tells = tells
        self.endings: list[str] = []

    async def acquire(self, tokens: float, usd: float) -> Grant | Refusal:
        return Grant(len(self.endings))

    async def settle(self, calls: Sequence[Settled]) -> bool:
        self.endings += [c.ending for c in calls]
        return self.tells and self.endings[-OUTAGE_AFTER:] == ["failed"] * OUTAGE_AFTER


def replies(
    monkeypatch: pytest.MonkeyPatch, script: list[Any], tells: bool = False, rules: RetryRules = RULES
) -> tuple[ChatReply | ChatFailed, list[str]]:
    """How a request ends whose calls bring what `script` says, and how each of its calls was settled."""
    rest = iter(script)

    async def complete(client: Any, request: dict[str, Any]) -> tuple[Any, RateHeaders]:
        if isinstance(found := next(rest), Exception):
            raise found
        return found, RateHeaders()

    monkeypatch.setattr(remote_captioner, "complete", complete)
    permits = Endless(tells)
    chat = PermittedChat(None, "m", permits, rules)
    try:
        return asyncio.run(chat.complete(MESSAGES, Sampling())), permits.endings
    except ChatFailed as failed:
        return failed, permits.endings


def test_an_endpoint_that_is_out_of_reach_for_long_fails_no_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a request gives up in an outage: the run has more patience than four calls take."""
    ended, _ = replies(monkeypatch, [CONNECTION] * 50 + [completion()], tells=True)
    assert ended == ChatReply("A nodule.", "stop", 9, 3)
    ended, _ = replies(monkeypatch, [ERROR] * 3 + [CONNECTION] * 20 + [ERROR] * 2 + [completion()], tells=True)
    assert isinstance(ended, ChatReply)


@pytest.mark.parametrize(("error", "times"), [(CONNECTION, OUTAGE_AFTER), (ERROR, 4)])
def test_a_request_that_fails_while_others_are_answered_is_given_up(
    monkeypatch: pytest.MonkeyPatch, error: JudgeCallError, times: int
) -> None:
    ended, endings = replies(monkeypatch, [error] * 20)
    assert isinstance(ended, ChatFailed) and not ended.stops
    assert endings == ["failed"] * times


def test_requests_that_break_the_server_do_not_keep_a_run_from_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    ended, _ = replies(monkeypatch, [ERROR] * 20, tells=True, rules=RetryRules(first_wait_s=0.0, outage_grace_s=0.0))
    assert str(ended) == "the endpoint failed: server error 500"


@pytest.mark.parametrize(
    "broken",
    [
        completion(message=None),
        completion(message=SimpleNamespace(content=[{"type": "text"}])),
        SimpleNamespace(choices=None),
        SimpleNamespace(choices=[None]),
        SimpleNamespace(choices="?"),
        "<html>",
    ],
)
def test_a_reply_that_is_none_is_tried_again_and_then_named(monkeypatch: pytest.MonkeyPatch, broken: Any) -> None:
    ended, endings = replies(monkeypatch, [broken] * 4)
    assert str(ended) == "the endpoint failed: malformed reply"
    assert endings == ["failed"] * 4
    ended, _ = replies(monkeypatch, [broken, completion()])
    assert isinstance(ended, ChatReply)


def test_counts_that_are_none_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    odd = completion()
    odd.usage = SimpleNamespace(prompt_tokens="many")
    assert replies(monkeypatch, [odd])[0] == ChatReply("A nodule.", "stop", 0, 0)


def test_a_server_that_sends_null_for_a_message_gets_its_permits_back() -> None:
    class Local:
        async def acquire(self, tokens: float, usd: float) -> Grant | Refusal:
            return await permits.acquire("run", tokens, usd)

        async def settle(self, calls: Sequence[Settled]) -> bool:
            return await permits.settle(calls)

    async def work(url: str) -> tuple[str, int]:
        await permits.join("run", permits.limits, None, None)
        client = make_client(Endpoint(url, "inside"), "none", timeout_s=5.0)
        with pytest.raises(ChatFailed) as failed:
            await PermittedChat(client, "m", Local(), RULES).complete(MESSAGES, Sampling())
        await client.close()
        return str(failed.value), (await permits.totals("run"))["num_running"]

    permits = Permits(Limits(max_concurrent=4))
    with QuotaServer(Quota(None, latency_s=(0.0, 0.0), shares={"null": 1.0})) as server:
        assert asyncio.run(work(server.url)) == ("the endpoint failed: malformed reply", 0)


class Remote:
    """A method of an actor that raises, or answers, one after another."""

    def __init__(self, *answers: Any) -> None:
        self._answers = iter(answers)
        self.remote: Callable[..., Any] = self._remote

    async def _remote(self, *_: Any) -> Any:
        if isinstance(answer := next(self._answers), Exception):
            raise answer
        return answer


def test_a_dead_permit_actor_stops_the_run_and_one_out_of_reach_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judges, "ASK_AGAIN_S", 0.0)
    away = ActorUnavailableError("no route", None)
    actor = SimpleNamespace(
        acquire=Remote(away, Grant(3), ActorDiedError()), settle=Remote(away, True, ActorDiedError())
    )
    port = ActorPermits(actor, "run")

    async def work() -> list[Any]:
        return [await port.acquire(1, 0.0), await port.settle([]), await port.acquire(1, 0.0), await port.settle([])]

    grant, outage, refusal, lost = asyncio.run(work())
    assert (grant, outage, lost) == (Grant(3), True, False)
    assert isinstance(refusal, Refusal) and refusal.stops and "run the same command again" in refusal.why
