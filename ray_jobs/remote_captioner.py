"""The captioner of `meddam caption --engine remote`: calls with permits and retries, and what of them goes into a run.

The permit actor of the endpoint is the judge's (ray_jobs.permits): captions and verdicts share the endpoint's minute.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from meddam_core.captioner import Captioner
from meddam_core.engines.base import Sampling
from meddam_core.engines.loop import EngineLoop
from meddam_core.engines.remote import ChatFailed, ChatReply, RemoteEngine, Showing
from meddam_core.judging.egress import Endpoint
from meddam_core.judging.llm import JudgeCallError, complete, make_client
from meddam_core.prompts import Prompt
from meddam_core.records import Egress
from ray_jobs.caption_config import Config
from ray_jobs.judge_calls import Prices, RetryRules
from ray_jobs.judges import ActorPermits
from ray_jobs.permits import OUTAGE_AFTER, Grant, Settled

TOKENS_A_PICTURE = 1500
"""Reserved for a picture before the server says what it counted."""
UNREACHABLE = {"connection", "server error 502", "server error 503", "server error 504"}
"""Failures that say nothing about what was sent. So many of them in a row are an outage, whoever meets them."""
POLICIES: tuple[Egress, ...] = ("deny", "zero-retention", "open")


@dataclass(slots=True)
class PermittedChat:
    """Calls one endpoint, each with a permit."""

    client: Any
    model: str
    permits: ActorPermits
    rules: RetryRules = field(default_factory=RetryRules)
    prices: Prices = field(default_factory=Prices)

    async def complete(self, messages: list[dict[str, Any]], sampling: Sampling) -> ChatReply:
        """One reply. Raises ChatFailed; it holds nothing of what was sent."""
        request = {
            "model": self.model, "messages": messages, "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature, "top_p": sampling.top_p, "seed": sampling.seed % (1 << 31),
        }  # fmt: skip
        pictures = sum(p["type"] == "image_url" for p in messages[0]["content"])
        asked = TOKENS_A_PICTURE * pictures + 400
        reserve = asked + sampling.max_new_tokens
        failures: Counter[str] = Counter()
        began = time.monotonic()
        while True:
            grant = await self.permits.acquire(reserve, self.prices.cost(asked, sampling.max_new_tokens))
            if not isinstance(grant, Grant):
                raise ChatFailed(grant.why, stops=grant.stops)
            try:
                async with asyncio.timeout(self.rules.timeout_s + 5):
                    completion, headers = await complete(self.client, request)
                reply = _reply(completion)
            except TimeoutError:
                error = JudgeCallError("timeout", retryable=True)
            except JudgeCallError as failed:
                error = failed
            else:
                used = float(reply.num_prompt_tokens + reply.num_reply_tokens) or None
                usd = self.prices.cost(reply.num_prompt_tokens, reply.num_reply_tokens) if used else None
                await self.permits.settle([
                    Settled(id=grant.id, ending="answered", tokens=used, usd=usd, replied_ago_s=0.0,
                            remaining=headers.remaining, reset_s=headers.reset_s)
                ])  # fmt: skip
                return reply
            limited = error.kind == "rate limit"
            in_outage = await self.permits.settle([
                Settled(id=grant.id, ending="limited" if limited else "failed" if error.retryable else "refused",
                        replied_ago_s=0.0 if error.status else None, retry_after_s=error.retry_after_s)
            ])  # fmt: skip
            failures[error.fingerprint] += not limited
            if self._gives_up(error, failures[error.fingerprint], in_outage, time.monotonic() - began):
                raise ChatFailed(f"the endpoint failed: {error.fingerprint}")
            await asyncio.sleep(self._wait_s(failures.total()))

    def _gives_up(self, error: JudgeCallError, times: int, in_outage: bool, age_s: float) -> bool:
        """Whether this call is not tried again. An outage is nobody's fault: the permits end it, or the run."""
        if not error.retryable:
            return True
        if error.fingerprint in UNREACHABLE:
            return times >= OUTAGE_AFTER and not in_outage
        return times >= self.rules.max_same_failures and (not in_outage or age_s > self.rules.outage_grace_s)

    def _wait_s(self, num_failures: int) -> float:
        if not num_failures:  # only limited: the permits wait
            return 0.0
        return min(self.rules.longest_wait_s, self.rules.first_wait_s * 2 ** min(num_failures, 16))


def _reply(completion: Any) -> ChatReply:
    """What a completion says. Raises JudgeCallError for what is none, though it came with status 200."""
    choices = getattr(completion, "choices", None)
    if choices == []:
        return ChatReply("", "empty")
    first: Any = choices[0] if isinstance(choices, list) else None
    message = getattr(first, "message", None)
    text = getattr(message, "content", None) or ""
    if message is None or not isinstance(text, str):
        raise JudgeCallError("malformed reply", retryable=True)
    refused, usage = getattr(message, "refusal", None), getattr(completion, "usage", None)
    counts = (_count(usage, "prompt_tokens"), _count(usage, "completion_tokens"))
    return ChatReply(text, "refusal" if refused else getattr(first, "finish_reason", None) or "", *counts)


def _count(usage: Any, name: str) -> int:
    count = getattr(usage, name, None)
    return count if isinstance(count, int) else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteSpec:
    """How an actor builds its Captioner around a remote model: call it in the actor's process."""

    cfg: Config
    prompts: tuple[Prompt, ...]
    permits: ActorPermits
    num_captioners: int
    gpus_each: float = 0.0
    engine: str = "remote"
    device: str = "cpu"

    @property
    def kernels(self) -> str:
        """The remote model's name."""
        return self.cfg.model

    @property
    def num_samples(self) -> int:
        """Captions a region and prompt."""
        return self.cfg.num_samples

    @property
    def facts(self) -> dict[str, str]:
        """What goes into the fingerprint; not the address, so that a moved server serves the same run."""
        shown = f"{self.cfg.show}{'+box' if self.cfg.draw_box else ''}"
        return {"engine": self.engine, "kernels": self.kernels, "dtype": "remote", "shown": shown}

    def __call__(self) -> Captioner:
        cfg = self.cfg
        assert cfg.base_url is not None  # the driver has looked, and at the key
        client = make_client(
            Endpoint(cfg.base_url, cfg.retention), os.environ.get(cfg.api_key_env) or "none", timeout_s=cfg.timeout_s
        )
        chat = PermittedChat(client, cfg.model, self.permits, RetryRules(timeout_s=cfg.timeout_s))
        engine = RemoteEngine(chat, cfg.model, Showing(cfg.show, cfg.draw_box))
        return Captioner(EngineLoop(engine), self.prompts, cfg.sampling, cfg.num_samples)


def endpoint_of(cfg: Config) -> Endpoint:
    """The endpoint of a remote run. Raises ValueError where it cannot be used, before anything is sent."""
    if cfg.base_url is None:
        raise ValueError("--engine remote needs --base-url, the OpenAI-compatible endpoint of --model")
    endpoint = Endpoint(cfg.base_url, cfg.retention)
    if endpoint.retention != "inside" and not os.environ.get(cfg.api_key_env):
        raise ValueError(f"the environment variable {cfg.api_key_env} holds no key for {endpoint.host}")
    return endpoint


def allowed_egress(cfg: Config) -> tuple[Egress, ...]:
    """The policies under which pictures may go to the run's endpoint."""
    endpoint = endpoint_of(cfg)
    return tuple(p for p in POLICIES if endpoint.may_see(p))


def remote_digest(model: str) -> str:
    """Stands for the weights of a model that is somewhere else: its name is all that is known."""
    return hashlib.sha256(f"remote {model}".encode()).hexdigest()
