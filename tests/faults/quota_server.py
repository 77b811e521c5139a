"""An OpenAI-compatible server on loopback that enforces a quota and misbehaves on purpose.

    python -m tests.faults.quota_server --port 8765 --requests-per-min 600 --faults

What it enforces is strict: a request is over the quota if it and those accepted in the sixty seconds before it are more
requests, or more tokens, than allowed; it gets a 429 and is counted. Faults come by a seeded draw a request: error 500,
a hang, a closed socket, headers that lie, prose, a letter that is no option, an empty reply, a reply whose message is
null; and a spell in which everything is a 429. GET /record gives every request with its time, its key (a hash of what
was asked) and what became of it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import socket
import threading
import time
from collections import deque
from dataclasses import asdict, dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

WINDOW_S = 60.0
REPLY_TOKENS = 7
SHARES: dict[str, float] = {
    "error": 0.02, "hang": 0.003, "close": 0.01, "lie": 0.02, "prose": 0.01, "letter": 0.01, "empty": 0.005,
    "limited": 0.01,
}  # fmt: skip
"""How often each fault comes. limited: a 429 out of the blue, with a Retry-After of a second. (denied: a 401.)"""


@dataclass(frozen=True, slots=True)
class Quota:
    """What is allowed and how the server behaves."""

    requests_per_min: float | None = 600
    tokens_per_min: float | None = None
    latency_s: tuple[float, float] = (0.05, 0.25)
    shares: dict[str, float] = field(default_factory=dict)
    limited_spell_s: tuple[float, float] | None = None
    """(begin, end) after the first request, in which every answer is a 429."""
    hang_s: float = 3600.0
    seed: int = 0


@dataclass(slots=True)
class Seen:
    """One request."""

    at: float
    key: str
    tokens: int
    outcome: str = "open"
    """open, ok, prose, letter, empty, null (all paid), error, close, hang, limited, over (not paid)."""
    answered: float | None = None


ODD = {"prose": "Nach sorgfältiger Betrachtung: eher ja, eher nein.", "letter": '{"choice": "Z"}', "empty": ""}
PAID = ("ok", "lie", "prose", "letter", "empty", "null")


class QuotaServer(ThreadingHTTPServer):
    """See the module's text. Use `with`."""

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, quota: Quota, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.quota = quota
        self.seen: list[Seen] = []
        self._accepted: deque[Seen] = deque()
        self._lock = threading.Lock()
        self._rng = random.Random(quota.seed)

    def __enter__(self) -> QuotaServer:
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that was killed is no error here."""

    @property
    def url(self) -> str:
        """The base URL for clients."""
        return f"http://127.0.0.1:{self.server_port}/v1"

    def take(self, key: str, tokens: int) -> Seen:
        """Records a request and decides its fate."""
        with self._lock:
            now = time.monotonic()
            seen = Seen(now, key, tokens)
            self.seen.append(seen)
            while self._accepted and self._accepted[0].at <= now - WINDOW_S:
                self._accepted.popleft()
            quota = self.quota
            used = len(self._accepted) + 1, sum(s.tokens for s in self._accepted) + tokens
            limits = quota.requests_per_min, quota.tokens_per_min
            if any(limit is not None and u > limit for u, limit in zip(used, limits, strict=True)):
                seen.outcome = "over"
                return seen
            self._accepted.append(seen)
            seen.outcome = self._fate(now - self.seen[0].at)
            return seen

    def _fate(self, age_s: float) -> str:
        spell = self.quota.limited_spell_s
        if spell is not None and spell[0] <= age_s < spell[1]:
            return "limited"
        draw = self._rng.random()
        for fault, share in self.quota.shares.items():
            draw -= share
            if draw < 0:
                return fault
        return "ok"

    def text(self, asked: dict[str, Any], seen: Seen) -> str:
        """The reply to a good request: one of the letters asked for, or a caption."""
        if "response_format" not in asked:
            rates = asked["messages"][0]["role"] == "system"
            return str(int(seen.key, 16) % 101) if rates else f"A region like {seen.key}."
        letters = asked["response_format"]["json_schema"]["schema"]["properties"]["choice"]["enum"]
        return json.dumps({"choice": letters[int(seen.key, 16) % len(letters)]})

    def latency_s(self) -> float:
        """How long the next answer takes."""
        with self._lock:
            return self._rng.uniform(*self.quota.latency_s)


class _Handler(BaseHTTPRequestHandler):
    server: QuotaServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._send(200, {}, [asdict(s) for s in list(self.server.seen)])

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        asked = json.loads(body)
        key = hashlib.sha256(json.dumps(asked["messages"]).encode()).hexdigest()[:16]
        tokens = len(json.dumps(asked["messages"])) // 4 + REPLY_TOKENS
        seen = self.server.take(key, tokens)
        if seen.outcome not in ("over", "limited"):
            time.sleep(self.server.latency_s())
        self._answer(asked, seen)

    def _answer(self, asked: dict[str, Any], seen: Seen) -> None:
        if seen.outcome == "hang":
            time.sleep(self.server.quota.hang_s)
        if seen.outcome in ("hang", "close"):
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        if seen.outcome in ("over", "limited"):
            self._send(
                429, {"retry-after": "1"} if seen.outcome == "limited" else {}, {"error": {"message": "slow down"}}
            )
            return
        if seen.outcome == "denied":
            self._send(401, {}, {"error": {"message": "no such key", "echo": asked["messages"]}})
            return
        if seen.outcome == "error":
            self._send(500, {}, {"error": {"message": "out of order", "echo": asked["messages"]}})
            return
        lies = {"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "6m0s", "retry-after": "86400"}
        headers = lies if seen.outcome == "lie" else {"x-ratelimit-remaining-requests": "100"}
        seen.answered = time.monotonic()
        text = ODD[seen.outcome] if seen.outcome in ODD else self.server.text(asked, seen)
        self._send(200, headers, _completion(text, seen.tokens, bare=seen.outcome == "null"))

    def _send(self, status: int, headers: dict[str, str], content: Any) -> None:
        payload = json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"content-type": "application/json", "content-length": str(len(payload)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, *args: object) -> None:
        """Quiet."""


def _completion(text: str, tokens: int, bare: bool) -> dict[str, Any]:
    message = None if bare else {"role": "assistant", "content": text, "refusal": None}
    usage = {"prompt_tokens": tokens - REPLY_TOKENS, "completion_tokens": REPLY_TOKENS, "total_tokens": tokens}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    return {"id": "x", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice], "usage": usage}


def busiest_minute(seen: list[Seen], what: str = "requests") -> float:
    """The most that any sliding minute of arrivals holds, faults and all."""
    most = total = 0.0
    window: deque[Seen] = deque()
    for one in sorted(seen, key=lambda s: s.at):
        window.append(one)
        total += 1 if what == "requests" else one.tokens
        while window[0].at <= one.at - WINDOW_S:
            gone = window.popleft()
            total -= 1 if what == "requests" else gone.tokens
        most = max(most, total)
    return most


def paid_more_than_once(seen: list[Seen]) -> int:
    """Calls that were answered and paid beyond the first of their key."""
    paid = [s.key for s in seen if s.answered is not None and s.outcome in PAID]
    return len(paid) - len(set(paid))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=8765)
    parser.add_argument("--requests-per-min", type=float)
    parser.add_argument("--tokens-per-min", type=float)
    parser.add_argument("--faults", action="store_true")
    args = parser.parse_args(argv)
    quota = Quota(args.requests_per_min, args.tokens_per_min, shares=SHARES if args.faults else {})
    with QuotaServer(quota, args.port) as server:
        print(server.url, flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
