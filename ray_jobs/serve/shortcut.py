"""The short way from Serve's proxy to a replica: plain HTTP to the replica's own port, past Serve's router.

Serve's router moves a request by actor calls and its answer by a generator of objects, which takes the processors some
five milliseconds a request. With RAY_SERVE_ENABLE_DIRECT_INGRESS=1 every replica has an HTTP port of its own; this
middleware of the proxy sends requests there, each to the replica that has the fewest of this proxy's. Which replicas
run is Serve's to say, every POLL_S; a replica that is to go stays reachable for longer than that.

Where no port is known or none takes the connection (all replicas are starting, or the cluster was started without the
setting) the request goes Serve's way, which waits for a replica. What a replica's death leaves half done ends here
without an end; CleanErrors around this makes an error of it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp
import ray
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from yarl import URL

_LOG = logging.getLogger(__name__)
POLL_S = 0.5
_IDLE_S = 30.0
"""Connections are kept for so long: less than a replica keeps them, so that none closes while a request enters it."""
_OURS = frozenset({
    b"connection", b"keep-alive", b"proxy-connection", b"te", b"trailer", b"upgrade", b"transfer-encoding", b"expect",
    b"date", b"server",
})  # fmt: skip
"""Headers of one connection, and those that each server sets itself."""
_REPLICA = "SERVE_REPLICA::"
_NOT_REACHED = (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError)


@dataclass(slots=True)
class Replica:
    """A replica's own address."""

    address: str
    in_flight: int = 0


class Replicas:
    """The replicas that run, as Serve's controller knows them."""

    def __init__(self) -> None:
        self._by_prefix: dict[str, list[Replica]] = {}
        """Of each application, the longest route prefix first."""
        self._watching: asyncio.Task[None] | None = None

    def freest(self, path: str) -> Replica | None:
        """The replica with the fewest requests of this proxy; None where there is none that can be reached."""
        if self._watching is None or self._watching.done():
            self._watching = asyncio.get_running_loop().create_task(self._watch())
        prefix = next((p for p in self._by_prefix if p == "/" or f"{path}/".startswith(f"{p}/")), "")
        return min(self._by_prefix.get(prefix, ()), key=lambda replica: replica.in_flight, default=None)

    def lose(self, replica: Replica) -> None:
        """Forgets a replica that takes no connection, until the controller names it again."""
        for there in self._by_prefix.values():
            there[:] = [other for other in there if other is not replica]

    async def _watch(self) -> None:
        controller = ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
        host = (await controller.get_http_config.remote()).host
        while True:
            self.take(await controller.get_target_groups.remote(), host)
            await asyncio.sleep(POLL_S)

    def take(self, groups: Sequence[Any], host: str) -> None:
        """Takes over what the controller says: ray.serve.schema.TargetGroup; `host` is where the proxy listens."""
        known = {replica.address: replica for there in self._by_prefix.values() for replica in there}
        everywhere = host in ("0.0.0.0", "::")  # else replicas listen where the proxy does
        found: dict[str, list[Replica]] = {}
        for group in groups:
            if group.protocol == "HTTP":  # where no replica runs, the targets are the proxies
                targets = [t for t in group.targets if t.name.startswith(_REPLICA)]
                addresses = [_address(t.ip if everywhere else host, t.port) for t in targets]
                found[group.route_prefix] = [known.get(address) or Replica(address) for address in addresses]
        self._by_prefix = dict(sorted(found.items(), key=lambda item: -len(item[0])))


def _address(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Shortcut:
    """An ASGI middleware around Serve's proxy. `replicas` is Replicas' own; tests give theirs."""

    def __init__(self, app: ASGIApp, replicas: Replicas | None = None) -> None:
        self._app = app
        self._replicas = replicas or Replicas()
        self._session: aiohttp.ClientSession | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("raw_path") or b""
        if scope["type"] != "http" or not path.startswith(b"/") or path.startswith(b"/-/"):
            await self._app(scope, receive, send)
            return
        first: Message | None = None
        while (replica := self._replicas.freest(scope["path"])) is not None:
            first = first or await receive()
            replica.in_flight += 1
            try:
                await _Passage(self._client(), replica.address, scope, first, receive, send).run()
                return
            except _NOT_REACHED:
                self._replicas.lose(replica)
            finally:
                replica.in_flight -= 1
        await self._app(scope, _again(first, receive), send)

    def _client(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_IDLE_S),
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=5), auto_decompress=False,
                cookie_jar=aiohttp.DummyCookieJar(), skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding",
                "Content-Type"),
            )  # fmt: skip
        return self._session


def _again(first: Message | None, receive: Receive) -> Receive:
    """`receive`, beginning with the message that was taken from it."""

    async def given() -> Message:
        nonlocal first
        if first is None:
            return await receive()
        message, first = first, None
        return message

    return given


class _Passage:
    """One request's way to a replica and its answer's way back."""

    def __init__(
        self, client: aiohttp.ClientSession, address: str, scope: Scope, first: Message, receive: Receive, send: Send
    ) -> None:
        self._client, self._scope, self._first, self._receive, self._send = client, scope, first, receive, send
        query = b"?" + scope["query_string"] if scope.get("query_string") else b""
        self._url = URL(address + (scope["raw_path"] + query).decode("latin-1"), encoded=True)
        self._sent = asyncio.Event()

    async def run(self) -> None:
        """Raises _NOT_REACHED where there was no connection; then nothing but `first` was taken in."""
        if self._first["type"] == "http.disconnect":
            return
        work = asyncio.ensure_future(self._answer())
        watch = asyncio.ensure_future(self._gone())
        try:
            await asyncio.wait({work, watch}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
        except _NOT_REACHED:
            raise
        except (aiohttp.ClientError, OSError) as error:
            _LOG.warning("a replica ended in the middle of a request (%s)", type(error).__name__)
        finally:
            work.cancel()
            watch.cancel()

    async def _answer(self) -> None:
        scope = self._scope
        headers = [(k.decode("latin-1"), v.decode("latin-1")) for k, v in scope["headers"] if k.lower() not in _OURS]
        more = self._first.get("more_body", False)
        body: Any = self._body() if more else self._first.get("body") or None
        if not more:
            self._sent.set()
        async with self._client.request(
            scope["method"], self._url, headers=headers, data=body, allow_redirects=False
        ) as answer:
            kept = [(k, v) for k, v in answer.raw_headers if k.lower() not in _OURS]
            await self._send({"type": "http.response.start", "status": answer.status, "headers": kept})
            async for part in answer.content.iter_any():
                await self._send({"type": "http.response.body", "body": part, "more_body": True})
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _body(self) -> AsyncIterator[bytes]:
        message = self._first
        while message["type"] == "http.request":
            if message.get("body"):
                yield message["body"]
            if not message.get("more_body", False):
                self._sent.set()
                return
            message = await self._receive()
        raise ConnectionAbortedError("the client went away within its body")

    async def _gone(self) -> None:
        """Ends when the client goes away after its whole body has come."""
        await self._sent.wait()
        while (await self._receive())["type"] != "http.disconnect":
            pass
