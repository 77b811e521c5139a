"""API keys: who is asking, and whether they may.

    key, entry = new_key()                          # show the key once, keep the entry
    keys = Keys(cfg.keys, LocalLedger())
    name = keys.name_of("Bearer sk-meddam-...")     # None for a wrong one
    await keys.admit(name)                          # raises ApiError(429) with Retry-After

A key is 256 random bits, so a plain SHA-256 of it can be kept: nothing can be guessed from it. Comparing takes the same
time for a right and a wrong key, and every entry is compared.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from ray_jobs.serve.config import ApiKey
from ray_jobs.serve.errors import ApiError

DAY_S = 86_400
ANONYMOUS = "-"
Refusal = tuple[Literal["rate", "quota"], float]
"""Why, and after how many seconds it is worth trying again."""


def new_key() -> tuple[str, str]:
    """A fresh key and its SHA-256."""
    key = f"sk-meddam-{secrets.token_urlsafe(32)}"
    return key, hashlib.sha256(key.encode()).hexdigest()


class Ledger(Protocol):
    """Counts what each key used. One for all replicas: in Ray it is an actor (deployment.py)."""

    async def request(self, name: str, per_minute: int | None) -> Refusal | None:
        """Takes one request; or says why not."""
        ...

    async def captions(self, name: str, num: int, per_day: int | None) -> Refusal | None:
        """Takes captions of the day's quota; or says why not, and takes none."""
        ...


@dataclass(slots=True)
class _Use:
    tokens: float
    at_s: float
    day: int = 0
    captions: int = 0


class LocalLedger:
    """A Ledger in this process: a bucket of requests that refills evenly, and captions by UTC day."""

    def __init__(self, now_s: Callable[[], float] = time.time) -> None:
        self._now_s = now_s
        self._uses: dict[str, _Use] = {}

    async def request(self, name: str, per_minute: int | None) -> Refusal | None:
        if per_minute is None:
            return None
        now = self._now_s()
        use = self._uses.setdefault(name, _Use(per_minute, now))
        use.tokens = min(per_minute, use.tokens + (now - use.at_s) * per_minute / 60)
        use.at_s = now
        if use.tokens < 1:
            return "rate", (1 - use.tokens) * 60 / per_minute
        use.tokens -= 1
        return None

    async def captions(self, name: str, num: int, per_day: int | None) -> Refusal | None:
        if per_day is None:
            return None
        now = self._now_s()
        use = self._uses.setdefault(name, _Use(0, now))
        day = int(now // DAY_S)
        if use.day != day:
            use.day, use.captions = day, 0
        if use.captions + num > per_day:
            return "quota", DAY_S - now % DAY_S
        use.captions += num
        return None


class Keys:
    """The configured keys and what they used. Without any, everybody may."""

    def __init__(self, keys: Mapping[str, ApiKey], ledger: Ledger) -> None:
        self._keys = dict(keys)
        self._ledger = ledger

    @property
    def required(self) -> bool:
        """Whether requests need a key."""
        return bool(self._keys)

    def name_of(self, authorization: str | None) -> str | None:
        """The client whose key stands in an Authorization header; None for none or a wrong one."""
        if not self._keys:
            return ANONYMOUS
        scheme, _, key = (authorization or "").partition(" ")
        presented = hashlib.sha256(key.strip().encode()).hexdigest()
        found: str | None = None
        for name, entry in self._keys.items():
            if hmac.compare_digest(presented, entry.sha256):
                found = name
        return found if scheme.lower() == "bearer" else None

    async def admit(self, name: str) -> None:
        """Takes a request from the client's rate. Raises ApiError(429)."""
        entry = self._keys.get(name)
        if entry is not None and entry.requests_per_minute is not None:
            _refuse(await self._ledger.request(name, entry.requests_per_minute))

    async def charge(self, name: str, num_captions: int) -> None:
        """Takes captions from the client's day. Raises ApiError(429)."""
        entry = self._keys.get(name)
        if entry is not None and entry.captions_per_day is not None:
            _refuse(await self._ledger.captions(name, num_captions, entry.captions_per_day))


def _refuse(refusal: Refusal | None) -> None:
    if refusal is None:
        return
    kind, retry_s = refusal
    if kind == "rate":
        raise ApiError(429, "too many requests a minute", code="rate_limit_exceeded", retry_after_s=retry_s)
    raise ApiError(429, "this key's captions for today are used up", code="insufficient_quota", retry_after_s=retry_s)
