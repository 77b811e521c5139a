"""An S3 server that misbehaves: requests pass through to a real one, and some of them get a seeded fault.

    with faulty(endpoint, Faults(throttled=0.1, cut=0.05)) as server:
        os.environ["AWS_ENDPOINT_URL"] = server.url

Faults: 503 SlowDown, connections reset before an answer, bodies that end in the middle, bodies that come in drips,
answers of puts that get lost when they were carried out, and 403 ExpiredToken from a given request on.
"""

from __future__ import annotations

import contextlib
import http.client
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BufferedIOBase
from typing import Any
from urllib.parse import quote, urlsplit

_HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "te", "trailer", "upgrade", "proxy-connection"}


@dataclass(slots=True)
class Faults:
    """Share of the requests that get each fault."""

    throttled: float = 0.0
    reset: float = 0.0
    cut: float = 0.0
    """Of answers with a body of some size: half of it comes, then the connection ends."""
    slow: float = 0.0
    slow_s: float = 0.3
    unanswered: int = 0
    """The next so many puts that succeed: the connection ends without the answer."""
    expired_after: int | None = None
    """Requests that are answered before the credentials expire."""
    seed: int = 0


@dataclass(slots=True)
class Server:
    """Where it listens, and what it has done."""

    url: str
    faults: Faults
    given: Counter[str] = field(default_factory=Counter)
    asked: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Requests by method and path with query; one that deletes many keys counts as a DELETE of each."""
    headers: set[str] = field(default_factory=set)
    """Names of all headers that came with them, in small letters."""


@contextlib.contextmanager
def faulty(endpoint: str, faults: Faults) -> Iterator[Server]:
    """A server in front of `endpoint`, ended with the block."""
    rng, lock = random.Random(faults.seed), threading.Lock()
    server = Server(url="", faults=faults)
    upstream = urlsplit(endpoint).netloc

    def fate(requests: list[tuple[str, str]]) -> str:
        with lock:
            server.given["requests"] += 1
            server.asked.update(requests)
            if faults.expired_after is not None and server.given["requests"] > faults.expired_after:
                chosen = "expired"
            else:
                number, chosen = rng.random(), "well"
                for name in ("throttled", "reset", "cut", "slow"):
                    if number < getattr(faults, name):
                        chosen = name
                        break
                    number -= getattr(faults, name)
            server.given[chosen] += 1
            return chosen

    def unanswered() -> bool:
        with lock:
            if lost := faults.unanswered > 0:
                faults.unanswered -= 1
                server.given["unanswered"] += 1
            return lost

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def pass_on(self) -> None:
            chunked = "chunked" in self.headers.get("Transfer-Encoding", "")
            body = _chunks(self.rfile) if chunked else self.rfile.read(int(self.headers.get("Content-Length") or 0))
            server.headers.update(name.lower() for name in self.headers)
            chosen = fate(_named(self.command, self.path, body))
            if chosen == "throttled":
                return self.refuse(503, "SlowDown", "Please reduce your request rate.")
            if chosen == "expired":
                return self.refuse(403, "ExpiredToken", "The provided token has expired.")
            if chosen == "reset":
                self.close_connection = True
                return None
            connection = http.client.HTTPConnection(upstream, timeout=60)
            kept = {k: v for k, v in self.headers.items() if k.lower() not in _HOP_BY_HOP and k.lower() != "expect"}
            connection.request(self.command, self.path, body=body, headers=kept)
            answer = connection.getresponse()
            data = answer.read()
            connection.close()
            if self.command == "PUT" and answer.status == 200 and unanswered():
                self.close_connection = True
                return None
            self.send_response_only(answer.status, answer.reason)
            length = answer.getheader("Content-Length") if self.command == "HEAD" else str(len(data))
            for name, value in answer.getheaders():
                if name.lower() not in _HOP_BY_HOP and name.lower() != "content-length":
                    self.send_header(name, value)
            self.send_header("Content-Length", length or "0")
            self.end_headers()
            return self.send_body(data, chosen)

        def send_body(self, data: bytes, chosen: str) -> None:
            if chosen == "cut" and len(data) > 64 and self.command == "GET":
                self.wfile.write(data[: len(data) // 2])
                self.close_connection = True
                return
            if chosen == "slow" and len(data) > 64:
                for start in range(0, len(data), max(1, len(data) // 3)):
                    self.wfile.write(data[start : start + max(1, len(data) // 3)])
                    time.sleep(faults.slow_s)
                return
            self.wfile.write(data)

        def refuse(self, status: int, code: str, message: str) -> None:
            body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()
            self.send_response_only(status)
            self.send_header("Content-Type", "application/xml")
            self.send_header("Content-Length", str(0 if self.command == "HEAD" else len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = pass_on

        def log_message(self, *_: Any) -> None:
            return

    listener = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    listener.daemon_threads = True
    server.url = f"http://127.0.0.1:{listener.server_address[1]}"
    thread = threading.Thread(target=listener.serve_forever, name="faulty-s3", daemon=True)
    thread.start()
    try:
        yield server
    finally:
        listener.shutdown()
        listener.server_close()


def _named(method: str, path: str, body: bytes) -> list[tuple[str, str]]:
    bucket, _, query = path.partition("?")
    if method == "POST" and query.startswith("delete"):
        keys = re.findall("<Key>(.*?)</Key>", body.decode())
        return [("DELETE", f"{bucket.rstrip('/')}/{quote(key)}") for key in keys]
    return [(method, path)]


def _chunks(stream: BufferedIOBase) -> bytes:
    """A body in HTTP's chunked transfer encoding, whole."""
    parts = []
    while size := int(stream.readline().split(b";")[0], 16):
        parts.append(stream.read(size))
        stream.readline()
    while stream.readline().strip():  # trailers
        pass
    return b"".join(parts)
