"""The Engine protocol: prepared regions and prompts in, captions out.

An engine holds the weights and decides how requests share a forward pass. What it must keep:
- float32: the same request gives the same tokens, whatever it is batched with and in whatever order it came;
- a request that cannot be served gets a Result with `finish_reason="error"` and a reason; it never sinks the others;
- one thread drives an engine; callers that share one hold a lock.

Arrays: N views (1 for an image, 8 for a video prompt), 8 channels, S the model's input side.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from meddam_core.records import FinishReason, Reason


class EngineDied(RuntimeError):
    """The process can compute no more: its CUDA context is lost, or the engine's state cannot be trusted.

    Nothing in this process helps. A Ray actor lets its process end, so that Ray replaces it and does the rows again.
    """


class EngineStopped(RuntimeError):
    """The run must end, to be resumed: what the engine needs is gone for all of its processes, and no row is to blame.

    Another process would fare no better. A Ray actor stops the run before it hands out a row.
    """


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How tokens are chosen. temperature 0 is greedy. Raises ValueError for values outside their range."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    """Keep the k likeliest tokens; 0 keeps all."""
    seed: int = 0
    """The request's own random stream: the same seed gives the same caption in any batch."""
    stop: tuple[str, ...] = ()
    """Ends the caption before the first of these strings."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}; it must be at least 1")
        if not self.temperature >= 0:
            raise ValueError(f"temperature is {self.temperature}; it must be 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must be above 0 and at most 1")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}; it must be 0 (off) or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One caption to make."""

    request_id: str
    """Unique among the requests in flight."""
    views_N8SS: NDArray[np.uint8]
    """Full image RGB + mask, focal crop RGB + mask, 0 to 255, one entry a frame (meddam_core.focal)."""
    query: str
    """The user's text; holds one `<image>` for each of the N views."""
    sampling: Sampling = field(default_factory=Sampling)


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """A finished request."""

    request_id: str
    text: str
    token_ids: tuple[int, ...]
    """Generated ids, without the end-of-sequence token."""
    mean_logprob: float | None
    """Mean over the generated tokens (end of sequence included) of their natural log-probability before temperature."""
    finish_reason: FinishReason
    num_prompt_tokens: int = 0
    num_image_tokens: int = 0
    reason: Reason | None = None
    detail: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """A piece of a streamed caption. The last one carries the result; the texts of all joined are the result's text."""

    text: str
    result: Result | None = None


@dataclass(slots=True, kw_only=True)
class EngineStats:
    """Running totals since the engine was made."""

    num_requests: int = 0
    num_prompt_tokens: int = 0
    num_new_tokens: int = 0
    num_out_of_memory: int = 0
    vision_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0


@runtime_checkable
class Engine(Protocol):
    """What a Captioner drives."""

    name: str
    """torch, mii or remote."""
    kernels: str
    """Which implementation of the arithmetic: torch, cuda, or the remote model's name."""
    stats: EngineStats

    def submit(self, requests: Sequence[Request]) -> None:
        """Queue requests. Raises ValueError for a request_id that is already in flight."""
        ...

    def step(self) -> list[Result]:
        """One scheduling step; returns the requests that finished in it: [] when more are needed or none is queued."""
        ...

    @property
    def num_unfinished(self) -> int:
        """Requests submitted and not yet returned by `step`."""
        ...

    def generate(self, requests: Sequence[Request]) -> list[Result]:
        """All requests to the end; results in the order of the requests."""
        ...

    def stream(self, request: Request) -> Iterator[Delta]:
        """One request, its text as it comes. Closing the iterator cancels the request."""
        ...

    def cancel(self, request_id: str) -> None:
        """Give up a request; it does not come back from `step`. Unknown ids are ignored."""
        ...

    def close(self) -> None:
        """Free memory. The engine cannot be used afterwards."""
        ...


@runtime_checkable
class ReportsText(Protocol):
    """What an engine may offer besides: the text of a caption that still grows, for streams of many at once."""

    def text_so_far(self, request_id: str) -> str:
        """What is certain to stay of a request's text; "" for one that is unknown or has not begun."""
        ...
