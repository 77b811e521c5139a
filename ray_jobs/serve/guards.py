"""What stands before the routes: request ids, keys, limits on bodies and their senders, headers, and the access log.

    app = Guards(app, cfg, keys, metrics)

An ASGI middleware. In this order: a full replica sends away (503), then the key (401, 429), then the size the sender
claims (413), then the body, within its size and time (413, 408); only then is anything parsed. The app runs in a task
that ends when the client goes away.

The access log is one JSON line a request: id, client's name, route, status, times and sizes. No query, no body, no
header, no address, and no path but the app's own.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
import traceback
import uuid
from collections.abc import Collection, MutableMapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ray_jobs.serve.config import Config
from ray_jobs.serve.errors import ApiError, error_body
from ray_jobs.serve.keys import ANONYMOUS, Keys
from ray_jobs.serve.metrics import Metrics

_LOG = logging.getLogger(__name__)
ACCESS_LOG = logging.getLogger("meddam.access")
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_API_PREFIX = ("/v1/", "/chat/", "/metrics")
"""Paths that need a key, whether or not there is a route."""
_CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = (
    ("content-security-policy", _CSP),
    ("x-content-type-options", "nosniff"),
    ("x-frame-options", "DENY"),
    ("referrer-policy", "no-referrer"),
    ("permissions-policy", "camera=(), microphone=(), geolocation=()"),
    ("cross-origin-opener-policy", "same-origin"),
    ("cross-origin-resource-policy", "same-origin"),
)
_RETRY_S = 1.0


@dataclass(slots=True)
class _Exchange:
    """One request and its answer, for the log."""

    request_id: str
    method: str
    route: str
    started_s: float
    client: str = ANONYMOUS
    status: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    notes: dict[str, Any] = field(default_factory=dict)
    """What the routes add: captions, tokens."""


class Guards:
    """Wraps the app of one replica.

    Args:
        app: the routes.
        cfg: the limits.
        keys: who may.
        metrics: counts requests and errors.
        routes: the app's paths; any other is logged as "other".
        behind_proxy: Serve's proxy makes the request ids and puts them into the answers.
    """

    def __init__(
        self, app: ASGIApp, cfg: Config, keys: Keys, metrics: Metrics, routes: Collection[str],
        behind_proxy: bool = False,
    ) -> None:  # fmt: skip
        self._app = app
        self._behind_proxy = behind_proxy
        self._cfg = cfg
        self._keys = keys
        self._metrics = metrics
        self._routes = frozenset(routes)
        self._max_bytes = int(cfg.max_body_mb * 1e6)
        self._in_flight = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return
        headers = {k.decode("latin-1").lower(): v.decode("latin-1") for k, v in scope["headers"]}
        given = headers.get("x-request-id", "")
        exchange = _Exchange(
            given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex, scope["method"],
            scope["path"] if scope["path"] in self._routes else "other", time.perf_counter(),
        )  # fmt: skip
        scope.setdefault("state", {})["exchange"] = exchange
        private = scope["path"].startswith(_API_PREFIX)
        answer = self._answering(send, exchange, private)
        if private:
            self._in_flight += 1
            self._metrics.in_flight.set(self._in_flight)
        try:
            body = await self._admit(headers, exchange, receive) if private else b""
            await self._run(scope, body, receive, answer)
        except ApiError as error:
            await _respond(error.response(), scope, receive, answer)
        except Exception as error:  # noqa: BLE001 - the door: whatever a route raised, the client gets a clean error
            _log_failure(exchange, error)
            if not exchange.status:
                failed = ApiError(500, "the server failed on this request", code="internal_error")
                await _respond(failed.response(), scope, receive, answer)
        finally:
            if private:
                self._in_flight -= 1
                self._metrics.in_flight.set(self._in_flight)
            self._log(exchange)

    async def _admit(self, headers: MutableMapping[str, str], exchange: _Exchange, receive: Receive) -> bytes:
        """The request's body. Raises ApiError for a request that is not let in."""
        if self._in_flight > self._cfg.max_ongoing:
            raise ApiError(503, "this replica is full; try again", code="overloaded", retry_after_s=_RETRY_S)
        name = self._keys.name_of(headers.get("authorization"))
        if name is None:
            missing = "authorization" not in headers
            raise ApiError(401, "an API key is needed: Authorization: Bearer ..." if missing else "wrong API key",
                           code="invalid_api_key")  # fmt: skip
        exchange.client = name
        await self._keys.admit(name)
        claimed = headers.get("content-length", "")
        if claimed.isdecimal() and int(claimed[:20]) > self._max_bytes:
            raise self._too_large()
        try:
            async with asyncio.timeout(self._cfg.body_timeout_s):
                return await self._body(exchange, receive)
        except TimeoutError:
            seconds = f"{self._cfg.body_timeout_s:g}"
            raise ApiError(408, f"the request's body did not arrive within {seconds} s", code="slow_sender") from None

    async def _body(self, exchange: _Exchange, receive: Receive) -> bytes:
        parts: list[bytes] = []
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ApiError(400, "the client went away", code="disconnected")
            parts.append(message.get("body", b""))
            exchange.bytes_in += len(parts[-1])
            if exchange.bytes_in > self._max_bytes:
                raise self._too_large()
            if not message.get("more_body", False):
                return b"".join(parts)

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the request is larger than {self._cfg.max_body_mb:g} MB", code="body_too_large")

    async def _run(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        """Runs the app on a body that has arrived, until it ends or the client goes away."""
        given = False
        gone = asyncio.Event()

        async def rest() -> Message:
            nonlocal given
            if not given:
                given = True
                return {"type": "http.request", "body": body, "more_body": False}
            await gone.wait()
            return {"type": "http.disconnect"}

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            gone.set()

        work = asyncio.create_task(_drive(self._app, scope, rest, send))
        watcher = asyncio.create_task(watch())
        try:
            await asyncio.wait({work, watcher}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                self._metrics.errors.inc(kind="client_gone")
                work.cancel()
            await work
        except asyncio.CancelledError:
            if not gone.is_set():
                work.cancel()
                raise
        finally:
            watcher.cancel()

    def _answering(self, send: Send, exchange: _Exchange, private: bool) -> Send:
        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                exchange.status = message["status"]
                headers = [(k, v) for k, v in message.get("headers", [])]
                headers += [(name.encode(), value.encode()) for name, value in _HEADERS]
                if not self._behind_proxy:
                    headers.append((b"x-request-id", exchange.request_id.encode()))
                if private:
                    headers.append((b"cache-control", b"no-store"))
                message = {**message, "headers": headers}
            elif message["type"] == "http.response.body":
                exchange.bytes_out += len(message.get("body", b""))
            await send(message)

        return answer

    def _log(self, exchange: _Exchange) -> None:
        seconds = time.perf_counter() - exchange.started_s
        status = exchange.status or 499
        self._metrics.requests.inc(route=exchange.route, status=str(status))
        self._metrics.request_s.observe(seconds, route=exchange.route)
        if status >= 400:
            self._metrics.errors.inc(kind=str(status))
        line = {
            "time": time.time(), "request_id": exchange.request_id, "client": exchange.client,
            "method": exchange.method if exchange.method.isalpha() else "other", "route": exchange.route,
            "status": status, "ms": round(1000 * seconds, 1), "bytes_in": exchange.bytes_in,
            "bytes_out": exchange.bytes_out, **exchange.notes,
        }  # fmt: skip
        ACCESS_LOG.info(json.dumps(line))


def _log_failure(exchange: _Exchange, error: Exception) -> None:
    """Where an unforeseen error came from. Not its message, which may hold what the client sent."""
    frames = traceback.extract_tb(error.__traceback__)[-6:]
    places = " < ".join(f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in reversed(frames))
    _LOG.error("request %s failed with %s at %s", exchange.request_id, type(error).__name__, places)


async def _drive(app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    """The app as a coroutine, which asyncio can make a task of."""
    await app(scope, receive, send)


async def _respond(response: JSONResponse, scope: Scope, receive: Receive, send: Send) -> None:
    await response(scope, receive, send)


class CleanErrors:
    """For Ray Serve's proxy: where a replica died before it answered, 503 with Retry-After in OpenAI's shape.

    Without it the proxy closes the connection, or answers 500 in plain text. A stream that breaks off ends in an error.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun = ended = ours = streams = False

        async def watched(message: Message) -> None:
            nonlocal begun, ended, ours, streams
            if message["type"] == "http.response.start":
                names = {k.lower(): v for k, v in message.get("headers", [])}
                ours = b"content-security-policy" in names or message["status"] < 500
                streams = names.get(b"content-type", b"").startswith(b"text/event-stream")
                begun = True
                if not ours:
                    return
            elif not ours:
                return
            else:
                ended = not message.get("more_body", False)
            await send(message)

        await self._app(scope, receive, watched)
        if begun and ours:
            if not ended:
                lost = b"data: " + json.dumps(_lost()).encode() + b"\n\n" if streams else b""
                await send({"type": "http.response.body", "body": lost, "more_body": False})
            return
        await _respond(JSONResponse(_lost(), 503, {"Retry-After": "1"}), scope, receive, send)


def _lost() -> dict[str, Any]:
    return error_body(503, "the replica that held this request is gone or none is free; try again", "replica_lost")
