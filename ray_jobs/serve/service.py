"""What each route does: checks a request, has its regions read, described and put into words.

service = Service(cfg, loop, view_size=384, model="DAM-3B")
answer = await service.chat(request, exchange, "openai")
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator, Awaitable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from meddam_core.captioner import PreparedRegion
from meddam_core.engines.base import Request, Result
from meddam_core.engines.loop import Loop
from meddam_core.imaging.png import encode_png
from meddam_core.prompts import VIDEO_VIEWS
from meddam_core.records import Box, RowError
from meddam_core.regions.promptable import Segmenter
from qa_library.loader import load_library
from qa_library.schema import TemplateSet
from ray_jobs.serve import answers, reading, schema
from ray_jobs.serve.answers import Dialect
from ray_jobs.serve.config import Config
from ray_jobs.serve.describing import Describer, ReadImage, recipe_of, rendered
from ray_jobs.serve.errors import ApiError
from ray_jobs.serve.fetching import fetch
from ray_jobs.serve.keys import Keys, Ledger, LocalLedger
from ray_jobs.serve.metrics import Metrics
from ray_jobs.serve.names import now_s, request_name
from ray_jobs.serve.samples import Samples

T = TypeVar("T")
DAM_NAME = "describe_anything_model"
"""The name by which DAM's own clients ask for whatever model is served."""
NAMES = ("meddam", DAM_NAME)
WATCH_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """A chat request whose picture was read: what the engine needs, and what the answer says of it."""

    views_N8SS: NDArray[np.uint8]
    query: str
    box: Box | None
    words: TemplateSet | None


class Service:
    """The routes' work, of one replica.

    Args:
        cfg: the settings.
        loop: drives the engine.
        view_size: side of the model's input, pixels.
        model: the model's name in the API.
        metrics: counts; a fresh set by default.
        ledger: what keys used; this process's own by default.
        segmenter: makes masks of clicks.
    """

    def __init__(
        self, cfg: Config, loop: Loop, view_size: int, model: str, *, metrics: Metrics | None = None,
        ledger: Ledger | None = None, segmenter: Segmenter | None = None,
    ) -> None:  # fmt: skip
        self.cfg = cfg
        self.model = model
        self.metrics = metrics or Metrics()
        self.keys = Keys(cfg.keys, ledger or LocalLedger())
        self.describer = Describer(cfg, loop, view_size, self.metrics, segmenter)
        self.samples = Samples()
        self._library = load_library()
        self._created_s = now_s()

    # -- one region ---------------------------------------------------------------------------------------------------

    async def chat(self, body: schema.ChatRequest, exchange: Any, dialect: Dialect) -> dict[str, Any]:
        """schema.ChatCompletion. Raises ApiError."""
        asked, requests = await self._limited(self._begin(body, exchange, dialect))
        results = await self._limited(asyncio.gather(*(self.describer.caption(r) for r in requests)))
        _note(exchange, results)
        notes = [answers.described(r, asked.box, self._library, asked.words) for r in results]
        return answers.completion(request_name(), body.model, results, notes)

    async def chat_stream(self, body: schema.ChatRequest, exchange: Any, dialect: Dialect) -> AsyncIterator[str]:
        """The events of a streamed completion. Raises ApiError before the first; later errors are events."""
        asked, requests = await self._limited(self._begin(body, exchange, dialect))
        usage = body.stream_options is not None and body.stream_options.include_usage
        chunks = answers.Chunks(request_name(), body.model, dialect)
        return self._events(asked, requests, chunks, usage, exchange)

    async def _events(
        self, asked: _Asked, requests: list[Request], chunks: answers.Chunks, usage: bool, exchange: Any
    ) -> AsyncIterator[str]:
        results: list[Result] = []
        try:
            async with asyncio.timeout(self.cfg.request_timeout_s):
                for index, request in enumerate(requests):
                    yield chunks.begin(index)
                    async for piece in self.describer.stream(request):
                        if isinstance(piece, str):
                            yield chunks.piece(index, piece)
                        else:
                            results.append(piece)
                            note = answers.described(piece, asked.box, self._library, asked.words)
                            yield chunks.end(index, piece, note)
        except TimeoutError:
            yield answers.event(_timed_out(self.cfg).body())
        except ApiError as error:
            yield answers.event(error.body())
        _note(exchange, results)
        if usage and results:
            yield chunks.usage(results)
        yield answers.DONE

    async def _begin(self, body: schema.ChatRequest, exchange: Any, dialect: Dialect) -> tuple[_Asked, list[Request]]:
        self.check_model(body.model, dialect)
        urls, text = reading.asked_of(body.messages)
        default = "dam-video" if len(urls) == VIDEO_VIEWS else self.cfg.prompt
        question = reading.question_of(text, body.prompt, body.length, default)
        query = reading.query_of(question, len(urls), self.cfg.joint)
        num = body.n or 1
        await self.keys.charge(exchange.client, num)
        files = [await self._bytes(url, f"messages.image_url.{i}") for i, url in enumerate(urls)]
        owner = exchange.client
        read = [await self.describer.read(self.describer.one_region, data, body, body, owner) for data in files]
        views = [_views(image.prepared[0]) for image in read]
        words = self._words(body.template_set, read[0])
        box = read[0].prepared[0].region.box if len(read) == 1 else None
        asked = _Asked(views_N8SS=np.concatenate(views), query=query, box=box, words=words)
        max_tokens = body.max_completion_tokens or body.max_tokens
        samplings = [self.describer.sampling(body, max_tokens, i) for i in range(num)]
        return asked, [self.describer.request(asked.views_N8SS, query, s) for s in samplings]

    # -- many regions -------------------------------------------------------------------------------------------------

    async def describe(self, body: schema.DescribeRequest, exchange: Any) -> dict[str, Any]:
        """schema.DescribeResponse. Raises ApiError."""
        return await self._limited(self._describe(body, exchange))

    async def _describe(self, body: schema.DescribeRequest, exchange: Any) -> dict[str, Any]:
        if body.model is not None:
            self.check_model(body.model, "openai")
        if len(body.regions) > self.cfg.max_regions:
            raise ApiError(400, f"{len(body.regions)} regions; at most {self.cfg.max_regions} fit in one request",
                           code="too_many_regions", param="regions")  # fmt: skip
        question = reading.question_of(body.question or "", body.prompt, body.length, self.cfg.prompt)
        query = reading.query_of(question, 1, self.cfg.joint)
        data = await self._bytes(body.image, "image")
        read = await self.describer.read(self.describer.regions, data, list(body.regions), body, exchange.client)
        words = self._words(body.template_set, read)
        ready = [p for p in read.prepared if p.views_N8SS is not None]
        await self.keys.charge(exchange.client, len(ready))
        sampling = self.describer.sampling(body, body.max_tokens)
        requests = [self.describer.request(_views(p), query, sampling) for p in ready]
        results = await asyncio.gather(*(self.describer.caption(r) for r in requests))
        _note(exchange, results)
        rest = iter(results)
        names = [r.id for r in body.regions] or [None] * len(read.prepared)
        regions = []
        for ordinal, (name, prepared) in enumerate(zip(names, read.prepared, strict=True)):
            result = None if prepared.error is not None else next(rest)
            regions.append(self._region(name or str(ordinal), prepared, result, words))
        facts = answers.image_facts(read.decoded, read.recipe, body.window)
        return {"id": request_name(), "model": self.model, "image": facts, "regions": regions,
                "usage": answers.usage(results)}  # fmt: skip

    def _region(
        self, name: str, prepared: PreparedRegion, result: Result | None, words: TemplateSet | None
    ) -> dict[str, Any]:
        """schema.RegionDescribed."""
        if result is None:
            assert prepared.error is not None
            error = {"code": prepared.error.reason.value, "message": prepared.error.detail}
            nothing: dict[str, Any] = {
                "box": None,
                "confidence": None,
                "mean_logprob": None,
                "findings": [],
                "template_set": None,
            }
            return {"id": name, "caption": None, "finish_reason": "error", "num_tokens": 0, "error": error,
                    "notice": answers.NOTICE, **nothing}  # fmt: skip
        return {
            "id": name, "caption": result.text, "finish_reason": result.finish_reason,
            "num_tokens": len(result.token_ids), "error": None,
            **answers.described(result, prepared.region.box, self._library, words),
        }  # fmt: skip

    # -- the rest -----------------------------------------------------------------------------------------------------

    async def render(self, body: schema.RenderRequest, exchange: Any) -> dict[str, Any]:
        """schema.RenderResponse. Raises ApiError."""
        data = await self._bytes(body.image, "image")
        return await self._limited(self.describer.read(self._render, data, body, exchange.client))

    def _render(self, data: bytes, body: schema.RenderRequest, owner: str) -> dict[str, Any]:
        decoded = self.describer.picture(data, body.frame, owner)
        picture = encode_png(rendered(decoded, body.window))
        facts = answers.image_facts(decoded, recipe_of(None, decoded, masked=False).name, body.window)
        return {"image": facts, "png": "data:image/png;base64," + base64.b64encode(picture).decode()}

    def card(self) -> dict[str, Any]:
        """schema.ModelCard."""
        return {"id": self.model, "object": "model", "created": self._created_s, "owned_by": "meddam"}

    def check_model(self, name: str, dialect: Dialect) -> None:
        """Raises ApiError(404) for a model that is not served. DAM's own clients may name what they like."""
        if dialect == "openai" and name not in (self.model, *NAMES):
            raise ApiError(404, f"this server has the model {self.model!r}; GET /v1/models lists it",
                           code="model_not_found", param="model")  # fmt: skip

    def check_health(self) -> None:
        """Raises ApiError(503) when the engine is gone: Ray Serve then replaces the replica."""
        if self.describer.loop.failure is not None:
            raise ApiError(503, "this replica lost its model and is being replaced", code="replica_lost",
                           retry_after_s=5)  # fmt: skip

    async def watch(self) -> None:
        """Keeps the gauges current, and pictures not for ever, for as long as the app lives."""
        while True:
            self.metrics.read_engine(self.describer.loop)
            self.describer.kept.forget_old()
            await asyncio.sleep(WATCH_S)

    async def _bytes(self, url: str, param: str) -> bytes:
        limits = self.describer.limits
        if self.cfg.url_hosts and url.startswith("https://"):
            return await self.describer.read(fetch, url, self.cfg.url_hosts, limits.max_file_bytes)
        if len(url) < 1 << 16:
            return reading.bytes_of(url, limits=limits, param=param)
        return await self.describer.read(_decode, url, limits, param)

    def _words(self, name: str | None, read: ReadImage) -> TemplateSet | None:
        return answers.vocabulary(self._library, name, read.recipe, read.decoded.modality)

    async def _limited(self, work: Awaitable[T]) -> T:
        try:
            async with asyncio.timeout(self.cfg.request_timeout_s):
                return await work
        except TimeoutError:
            raise _timed_out(self.cfg) from None


def _decode(url: str, limits: Any, param: str) -> bytes:
    return reading.bytes_of(url, limits=limits, param=param)


def _views(prepared: PreparedRegion) -> NDArray[np.uint8]:
    if prepared.views_N8SS is None:
        assert isinstance(prepared.error, RowError)
        raise prepared.error
    return prepared.views_N8SS


def _note(exchange: Any, results: list[Result]) -> None:
    exchange.notes |= {"captions": len(results), "new_tokens": sum(len(r.token_ids) for r in results)}


def _timed_out(cfg: Config) -> ApiError:
    return ApiError(504, f"the request took longer than {cfg.request_timeout_s:g} s", code="timeout")
