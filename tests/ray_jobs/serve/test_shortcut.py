"""From the proxy to a replica's own port, over real connections: what passes, what ends, what goes Serve's way."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import httpx2
import pytest
import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from ray_jobs.serve.guards import CleanErrors
from ray_jobs.serve.shortcut import Replica, Replicas, Shortcut
from tests.ray_jobs.serve.served import free_port


class Known(Replicas):
    """Replicas at given addresses, without a cluster."""

    def __init__(self, *addresses: str) -> None:
        super().__init__()
        self._by_prefix = {"/": [Replica(address) for address in addresses]}

    async def _watch(self) -> None:
        await asyncio.Event().wait()


class Upstream:
    """A replica's app: says what it got, streams, or breaks off."""

    def __init__(self) -> None:
        self.cancelled = threading.Event()
        self.begun = threading.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body, more = b"", scope["path"] != "/early"
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        self.begun.set()
        if scope["path"] == "/waits":
            assert (await receive())["type"] == "http.disconnect"
            self.cancelled.set()
            return
        stream = scope["path"] in ("/stream", "/breaks")
        headers = [(b"content-type", b"text/event-stream" if stream else b"text/plain"), (b"x-own", b"1")]
        await send({"type": "http.response.start", "status": 418, "headers": headers})
        if stream:
            await send({"type": "http.response.body", "body": b"data: one\n\n", "more_body": True})
            if scope["path"] == "/breaks":
                raise RuntimeError("the replica dies")
        told = f"{scope['method']} {scope['raw_path'].decode()}?{scope['query_string'].decode()} {len(body)}".encode()
        await send({"type": "http.response.body", "body": told})


async def serves_way(scope: Scope, receive: Receive, send: Send) -> None:
    """Serve's proxy: counts the body, to show that nothing was taken from it."""
    size, more = 0, True
    while more:
        message = await receive()
        size, more = size + len(message.get("body", b"")), message.get("more_body", False)
    headers = [(b"content-security-policy", b"x")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b"serve's way %d" % size})


@pytest.fixture
def listen() -> Iterator[Callable[[ASGIApp], str]]:
    with ExitStack() as stack:

        def start(app: ASGIApp) -> str:
            server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_config=None, lifespan="off"))
            thread = threading.Thread(target=server.run, daemon=True)
            thread.start()
            stack.callback(thread.join, 20)
            stack.callback(setattr, server, "should_exit", True)
            while not server.started:
                thread.join(0.01)
            return f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"

        yield start


def test_requests_and_answers_pass_as_they_are(listen: Callable[[ASGIApp], str]) -> None:
    url = listen(CleanErrors(Shortcut(serves_way, Known(listen(Upstream())))))
    with httpx2.Client(base_url=url) as http:
        answer = http.post("/a%20b//c?q=%2F", content=b"x" * 300_000)
        assert (answer.status_code, answer.text) == (418, "POST /a%20b//c?q=%2F 300000")
        assert answer.headers["x-own"] == "1" and len(answer.headers.get_list("date")) == 1
        assert http.get("/x").text == "GET /x? 0"
        assert http.post("/x", content=iter([b"ab", b"c" * 70_000])).text == "POST /x? 70002", "of no told length"
        assert http.get("/stream").text == "data: one\n\nGET /stream? 0"
        assert http.get("/-/routes").text == "serve's way 0", "what is Serve's own"
        early = http.post("/early", content=b"x" * 9_000_000)
        assert (early.status_code, early.text) == (418, "POST /early? 0"), "an answer before the body was read"


def test_a_replica_that_breaks_off_ends_a_stream_with_an_error(listen: Callable[[ASGIApp], str]) -> None:
    url = listen(CleanErrors(Shortcut(serves_way, Known(listen(Upstream())))))
    text = httpx2.get(f"{url}/breaks").text
    assert text.startswith("data: one\n\ndata: ") and text.endswith("\n\n") and '"replica_lost"' in text


def test_a_replica_that_dies_before_it_answers_is_a_clean_error(listen: Callable[[ASGIApp], str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def die() -> None:
            connection, _ = listener.accept()
            connection.recv(100)
            connection.close()

        threading.Thread(target=die, daemon=True).start()
        url = listen(CleanErrors(Shortcut(serves_way, Known(f"http://127.0.0.1:{listener.getsockname()[1]}"))))
        answer = httpx2.post(url, content=b"x")
    assert answer.status_code == 503 and answer.headers["retry-after"] == "1"
    assert answer.json()["error"]["code"] == "replica_lost"


def test_replicas_that_take_no_connection_are_left_out(listen: Callable[[ASGIApp], str]) -> None:
    gone = [f"http://127.0.0.1:{free_port()}" for _ in range(2)]
    url = listen(Shortcut(serves_way, Known(*gone, listen(Upstream()))))
    assert httpx2.post(f"{url}/x", content=b"abc").text == "POST /x? 3"
    url = listen(Shortcut(serves_way, Known(*gone)))
    assert httpx2.post(url, content=b"x" * 200_000).text == "serve's way 200000"


def test_a_client_that_goes_away_ends_its_request(listen: Callable[[ASGIApp], str]) -> None:
    upstream = Upstream()
    host, port = listen(Shortcut(serves_way, Known(listen(upstream)))).removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(b"POST /waits HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\nab")
        assert upstream.begun.wait(30)
    assert upstream.cancelled.wait(30)


def test_what_the_controller_says() -> None:
    asyncio.run(_what_the_controller_says())


async def _what_the_controller_says() -> None:
    def group(prefix: str, *names: str) -> Any:
        targets = [SimpleNamespace(name=name, ip="10.0.0.7", port=30_000 + i) for i, name in enumerate(names)]
        return SimpleNamespace(protocol="HTTP", route_prefix=prefix, targets=targets)

    replicas = Known()
    both = [group("/", "SERVE_REPLICA::a", "SERVE_REPLICA::b"), group("/other", "SERVE_PROXY_ACTOR-1")]
    replicas.take(both, "0.0.0.0")
    first = replicas.freest("/v1/models")
    assert first is not None and first.address == "http://10.0.0.7:30000"
    first.in_flight = 3
    assert replicas.freest("/v1/models").address == "http://10.0.0.7:30001"  # type: ignore[union-attr]
    assert replicas.freest("/other/x") is None, "an application without replicas goes Serve's way"
    replicas.take([group("/", "SERVE_REPLICA::a")], "0.0.0.0")
    assert replicas.freest("/otherwise") is first, "what is known of a replica is kept"
    replicas.take([group("/", "SERVE_REPLICA::a")], "127.0.0.1")
    assert replicas.freest("/").address == "http://127.0.0.1:30000"  # type: ignore[union-attr]
