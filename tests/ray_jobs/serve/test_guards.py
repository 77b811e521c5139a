"""What stands before the routes: keys, limits, slow and vanishing clients, headers, and a log without payload."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from starlette.testclient import TestClient

from meddam_core.engines.loop import EngineLoop
from ray_jobs.serve.app import make_app
from ray_jobs.serve.config import Config
from ray_jobs.serve.guards import ACCESS_LOG, CleanErrors
from ray_jobs.serve.keys import LocalLedger, new_key
from ray_jobs.serve.service import Service
from tests.ray_jobs.serve.conftest import MODEL, SIDE, Made, chat, picture, png, url, with_alpha

RGBA = url(png(with_alpha(picture())))
PATH = "/v1/chat/completions"


def keyed(**limits: Any) -> tuple[str, dict[str, Any]]:
    key, digest = new_key()
    return key, {"ward": {"sha256": digest, **limits}}


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def test_only_who_has_a_key_is_served(make_client: Made) -> None:
    key, keys = keyed()
    client = make_client(keys=keys)
    for headers in ({}, bearer("wrong"), bearer(""), {"Authorization": key}, {"Authorization": f"Basic {key}"}):
        for answer in (client.post(PATH, json=chat(RGBA), headers=headers), client.get("/v1/models", headers=headers)):
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
    assert client.get("/metrics").status_code == 401
    assert client.get("/v1/nowhere").status_code == 401
    assert client.post(PATH, json=chat(RGBA), headers=bearer(key)).status_code == 200
    assert client.get("/health").status_code == 200


def test_keys_are_kept_as_hashes_only() -> None:
    key, digest = new_key()
    assert hashlib.sha256(key.encode()).hexdigest() == digest
    assert len(key) > 40 and new_key()[0] != key


def test_rate_and_quota_of_a_key(make_client: Made) -> None:
    now = [1_000_000.0]
    key, keys = keyed(requests_per_minute=2, captions_per_day=3)
    client = make_client(ledger=LocalLedger(lambda: now[0]), keys=keys)
    post = lambda **more: client.post(PATH, json=chat(RGBA, max_tokens=1, **more), headers=bearer(key))  # noqa: E731
    assert [post().status_code for _ in range(3)] == [200, 200, 429]
    refused = post()
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    now[0] += int(refused.headers["Retry-After"])
    too_many = post(n=2)
    assert (too_many.status_code, too_many.json()["error"]["code"]) == (429, "insufficient_quota")
    now[0] += 30
    assert post().status_code == 200
    now[0] += 86_400
    assert post(n=2).status_code == 200


def test_an_address_that_others_reach_needs_keys() -> None:
    with pytest.raises(ValueError, match="--open"):
        Config(model=MODEL, host="0.0.0.0")
    Config(model=MODEL, host="0.0.0.0", keys=keyed()[1])
    Config(model=MODEL, host="0.0.0.0", open=True)


@pytest.mark.parametrize("told", [True, False])
def test_a_body_beyond_the_limit_is_refused(make_client: Made, told: bool) -> None:
    client = make_client(max_body_mb=0.01)
    content = b"x" * 20_000 if told else iter([b"x" * 6_000] * 4)
    answer = client.post(PATH, content=content, headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")


def test_a_full_replica_says_when_to_come_back(make_client: Made) -> None:
    client = make_client(max_ongoing=1)
    client.app._in_flight = 1  # type: ignore[attr-defined]
    answer = client.post(PATH, json=chat(RGBA))
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "overloaded")
    assert int(answer.headers["Retry-After"]) >= 1
    client.app._in_flight = 0  # type: ignore[attr-defined]
    assert client.post(PATH, json=chat(RGBA)).status_code == 200


def test_headers_and_request_ids(client: TestClient) -> None:
    answer = client.get("/health", headers={"X-Request-Id": "mine-1"})
    assert answer.headers["x-request-id"] == "mine-1"
    assert len(client.get("/health", headers={"X-Request-Id": "a b\tc"}).headers["x-request-id"]) == 32
    assert "script-src 'self'" in answer.headers["content-security-policy"]
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert client.get("/v1/models").headers["cache-control"] == "no-store"


def test_the_log_tells_who_and_how_much_and_nothing_else(client: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        client.post(PATH, json=chat(RGBA, text="Mrs Example, room 7?"))
        client.get("/v1/models?patient=Example")
        client.get("/Example/room7")
        client.post(PATH, json=chat(RGBA, text="Example", recipe="Example"))
    lines = [json.loads(r.message) for r in caplog.records if r.name == ACCESS_LOG.name]
    assert [(line["route"], line["status"]) for line in lines] == [
        (PATH, 200), ("/v1/models", 200), ("other", 404), (PATH, 400),
    ]  # fmt: skip
    assert lines[0]["captions"] == 1 and lines[0]["new_tokens"] > 0 and lines[0]["bytes_in"] > 500
    assert "Example" not in "".join(r.getMessage() for r in caplog.records if r.name.startswith(("meddam", "ray_jobs")))


# -- clients that a well-behaved library cannot be: the app is called as a server would call it -----------------------


Receive = Callable[[], Awaitable[dict[str, Any]]]


def call(cfg: Config, loop: EngineLoop, receive: Callable[[], Receive]) -> tuple[list[dict[str, Any]], Service]:
    """The messages that the app sends to a client whose messages `receive()` gives."""
    sent: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    async def main() -> Service:
        service = Service(cfg, loop, SIDE, "dam_tiny")
        scope = {"type": "http", "method": "POST", "path": PATH, "raw_path": PATH.encode(), "query_string": b"",
                 "headers": [(b"content-type", b"application/json")], "http_version": "1.1", "scheme": "http",
                 "root_path": "", "client": ("192.0.2.1", 1), "server": ("127.0.0.1", 80)}  # fmt: skip
        await asyncio.wait_for(make_app(service)(scope, receive(), send), 60)  # type: ignore[arg-type]
        return service

    return sent, asyncio.run(main())


def test_a_slow_sender_is_given_up(loop: EngineLoop) -> None:
    def drips() -> Receive:
        async def receive() -> dict[str, Any]:
            await asyncio.sleep(0.02)
            return {"type": "http.request", "body": b" ", "more_body": True}

        return receive

    sent, _ = call(Config(model=MODEL, body_timeout_s=0.3), loop, drips)
    assert sent[0]["status"] == 408


def test_when_the_client_goes_away_the_engine_stops(loop: EngineLoop) -> None:
    body = json.dumps(chat(RGBA, max_tokens=1000, temperature=2.0)).encode()

    def leaves() -> Receive:
        given = False

        async def receive() -> dict[str, Any]:
            nonlocal given
            if not given:
                given = True
                return {"type": "http.request", "body": body, "more_body": False}
            while loop.num_unfinished == 0:
                await asyncio.sleep(0.001)
            return {"type": "http.disconnect"}

        return receive

    sent, service = call(Config(model=MODEL), loop, leaves)
    assert [m for m in sent if m["type"] == "http.response.start"] == []
    assert 'meddam_serve_errors_total{kind="client_gone"} 1.0' in service.metrics.text().decode()
    assert loop.generate([]) == []
    deadline = asyncio.run(_empty(loop))
    assert deadline, "the engine still works on what nobody waits for"


async def _empty(loop: EngineLoop) -> bool:
    for _ in range(500):
        if loop.num_unfinished == 0:
            return True
        await asyncio.sleep(0.01)
    return False


def test_the_time_limit_of_a_request(make_client: Made, loop: EngineLoop) -> None:
    client = make_client(request_timeout_s=0.15)
    long = chat(RGBA, max_tokens=1000, n=8, temperature=2.0)
    answer = client.post(PATH, json=long)
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "timeout")
    with client.stream("POST", PATH, json={**long, "stream": True}) as stream:
        lines = [line for line in stream.iter_lines() if line]
    assert json.loads(lines[-2].removeprefix("data: "))["error"]["code"] == "timeout"
    assert lines[-1] == "data: [DONE]"
    assert asyncio.run(_empty(loop))


@pytest.mark.parametrize("begun", [None, b"application/json", b"text/event-stream"])
def test_a_replica_that_dies_leaves_a_clean_error(begun: bytes | None) -> None:
    """What Serve's proxy does then: it sends nothing at all, or ends in the middle."""
    sent: list[Any] = []

    async def proxy(scope: Any, receive: Any, send: Any) -> None:
        if begun is not None:
            headers = [(b"content-type", begun), (b"content-security-policy", b"1")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": b"data: {}\n\n", "more_body": True})

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(CleanErrors(proxy)({"type": "http"}, None, send))  # type: ignore[arg-type]
    if begun is None:
        assert sent[0]["status"] == 503 and (b"retry-after", b"1") in sent[0]["headers"]
        assert json.loads(sent[1]["body"])["error"]["code"] == "replica_lost"
    else:
        assert sent[-1]["more_body"] is False
        assert (b"replica_lost" in sent[-1]["body"]) == (begun == b"text/event-stream")
