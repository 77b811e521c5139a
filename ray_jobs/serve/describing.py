"""Pictures and regions -> captions, through the same preparer and engine loop as the batch job.

    describer = Describer(cfg, loop, view_size=384, metrics=Metrics())
    asked = await describer.read(describer.regions_of_request, request)       # CPU work, in threads
    async for piece in describer.stream(asked.request(sampling)): ...

Same bytes in, same caption out, as in batch: rows are rendered by the row's recipe, cut out by RegionPreparer, and the
engine's result does not depend on what else it decodes.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from meddam_core.captioner import PreparedRegion, RegionPreparer, ViewRules, detected_regions
from meddam_core.datasets.recipes import AUTO, Recipe, resolve_recipe
from meddam_core.engines.base import EngineDied, Request, Result, Sampling
from meddam_core.engines.loop import Loop
from meddam_core.imaging.decoded import Decoded
from meddam_core.imaging.limits import Limits
from meddam_core.imaging.render import render
from meddam_core.records import EncodedImage, Image, Reason, Region, RowError
from meddam_core.regions.promptable import RegionPrompt, Segmenter
from ray_jobs.serve import reading
from ray_jobs.serve.config import Config
from ray_jobs.serve.errors import ApiError, of_row
from ray_jobs.serve.keeping import KeptPictures
from ray_jobs.serve.keys import ANONYMOUS
from ray_jobs.serve.metrics import Metrics
from ray_jobs.serve.schema import Sampled, Where

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadImage:
    """A picture that was read, with its regions ready for the engine."""

    decoded: Decoded
    recipe: str
    prepared: list[PreparedRegion]


class Describer:
    """Shares one engine among the requests of a replica. Lives in one asyncio loop.

    Args:
        cfg: limits and defaults.
        loop: drives the engine.
        view_size: side of the model's input, pixels.
        metrics: counts captions and tokens.
        segmenter: makes masks of clicks.
    """

    def __init__(
        self, cfg: Config, loop: Loop, view_size: int, metrics: Metrics, segmenter: Segmenter | None = None
    ) -> None:
        self.cfg = cfg
        self.loop = loop
        self.metrics = metrics
        self.limits = Limits(
            max_file_bytes=int(cfg.max_body_mb * 1e6), max_inflated_bytes=8 * cfg.max_pixels, max_pixels=cfg.max_pixels,
            max_frames=10_000,
        )  # fmt: skip
        self.kept = KeptPictures(int(cfg.keep_pictures_mb * 1e6))
        self._view_size = view_size
        self._segmenter = segmenter
        self._segmenting = threading.Lock()
        self._pool = ThreadPoolExecutor(cfg.num_decoders, thread_name_prefix="decode")
        self._numbers = itertools.count()

    async def read(self, work: Callable[..., T], *args: Any) -> T:
        """CPU work in a thread. RowErrors become the request's error."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, work, *args)
        except RowError as error:
            raise of_row(error) from None

    def sampling(self, asked: Sampled, max_tokens: int | None, index: int = 0) -> Sampling:
        """How a request wants its tokens chosen; its `index`-th caption has a random stream of its own."""
        cfg = self.cfg
        stop = () if asked.stop is None else (asked.stop,) if isinstance(asked.stop, str) else tuple(asked.stop)
        return Sampling(
            max_new_tokens=min(max_tokens or cfg.max_tokens, cfg.most_tokens),
            temperature=cfg.temperature if asked.temperature is None else asked.temperature,
            top_p=1.0 if asked.top_p is None else asked.top_p, top_k=asked.top_k or 0,
            seed=(asked.seed or 0) + index, stop=stop,
        )  # fmt: skip

    def request(self, views_N8SS: NDArray[np.uint8], query: str, sampling: Sampling) -> Request:
        """A request of this process's own number."""
        name = f"{uuid.uuid4().hex[:8]}-{next(self._numbers)}"
        return Request(request_id=name, views_N8SS=views_N8SS, query=query, sampling=sampling)

    # -- in threads ---------------------------------------------------------------------------------------------------

    def picture(self, data: bytes, frame: int | None, owner: str) -> Decoded:
        """The picture of a file that `owner` sent. Raises RowError."""
        return self.kept.get(
            owner, data, frame, lambda: reading.picture_of(data, frame=frame, limits=self.limits)
        )  # fmt: skip

    def regions(self, data: bytes, wheres: list[Where], asked: Sampled, owner: str = ANONYMOUS) -> ReadImage:
        """The regions of one picture, ready for the engine; without any, its alpha channel or what is detected.

        A region that is broken is a PreparedRegion with an error. Raises RowError where the picture is.
        """
        decoded = self.picture(data, asked.frame, owner)
        alpha_HW = reading.alpha_mask(decoded)
        recipe = recipe_of(asked.recipe, decoded, masked=False)
        if not wheres and alpha_HW is None and recipe.detector is None:
            raise RowError(Reason.NO_REGIONS, "give regions: this picture has no mask in alpha, its recipe no detector")
        image_HWC = rendered(decoded, asked.window or recipe.window)
        found: list[Region | RowError] = []
        masks: dict[int, NDArray[np.uint8]] = {}
        if not wheres and alpha_HW is None:
            found += detected_regions(_row(decoded, recipe.name, []), image_HWC, recipe)
        for ordinal, where in enumerate(wheres or ([] if found else [Where()])):
            try:
                region, mask_HW = reading.region_of(
                    where, decoded, alpha_HW, ordinal=ordinal, limits=self.limits,
                    clicked_HW=self._clicked(where, image_HWC),
                )  # fmt: skip
                found.append(region)
                if mask_HW is not None:
                    masks[ordinal] = mask_HW
            except RowError as error:
                found.append(error)
        prepared = [self._prepare(decoded, image_HWC, region, asked, masks) for region in found]
        masked = bool(prepared) and all(p.region.mask is not None for p in prepared)
        return ReadImage(decoded=decoded, recipe=recipe_of(asked.recipe, decoded, masked).name, prepared=prepared)

    def one_region(self, data: bytes, where: Where, asked: Sampled, owner: str = ANONYMOUS) -> ReadImage:
        """As `regions`, for exactly one. Raises RowError also where the region is broken."""
        read = self.regions(data, [where], asked, owner)
        (prepared,) = read.prepared
        if prepared.error is not None:
            raise prepared.error
        return read

    def _prepare(
        self, decoded: Decoded, image_HWC: NDArray[np.uint8], region: Region | RowError, asked: Sampled,
        masks: Mapping[int, NDArray[np.uint8]],
    ) -> PreparedRegion:  # fmt: skip
        if isinstance(region, RowError):
            nowhere = Region(region_id=0, box=(0, 0, 0, 0), source="prompted")
            return PreparedRegion(region=nowhere, views_N8SS=None, error=region)
        rules = ViewRules(size=self._view_size, aspect=asked.aspect, margin=asked.margin, window=asked.window)
        recipe = recipe_of(asked.recipe, decoded, masked=region.mask is not None)
        (prepared,) = RegionPreparer(rules).prepare_rendered(_row(decoded, recipe.name, [region]), image_HWC, masks)
        return prepared

    def _clicked(self, where: Where, image_HWC: NDArray[np.uint8]) -> NDArray[np.uint8] | None:
        if where.points is None or self._segmenter is None:
            return None
        points = [(x, y) for x, y in where.points]
        with self._segmenting:
            (found,) = self._segmenter.segment(image_HWC, [RegionPrompt(points=points)])
        return found.mask_HW

    # -- through the engine -------------------------------------------------------------------------------------------

    async def caption(self, request: Request) -> Result:
        """One caption, to its end. Raises ApiError; gives the request up when the caller is cancelled."""
        result: Result | None = None
        async for piece in self.stream(request, pieces=False):
            if isinstance(piece, Result):
                result = piece
        assert result is not None
        return result

    async def stream(self, request: Request, *, pieces: bool = True) -> AsyncIterator[str | Result]:
        """The text piece by piece, then the result. Raises ApiError; gives the request up when it is closed early."""
        event_loop = asyncio.get_running_loop()
        arrived: asyncio.Queue[str | None] = asyncio.Queue()

        def put(piece: str | None) -> None:
            if not event_loop.is_closed():
                event_loop.call_soon_threadsafe(arrived.put_nowait, piece)

        started = event_loop.time()
        try:
            future = self.loop.submit(request, on_text=put if pieces else None)
        except EngineDied as error:
            raise _engine_gone() from error
        future.add_done_callback(lambda _: put(None))
        first = True
        try:
            while (piece := await arrived.get()) is not None:
                if first:
                    self.metrics.first_token_s.observe(event_loop.time() - started)
                    first = False
                while not arrived.empty():  # a slow client gets fewer, longer pieces
                    more = arrived.get_nowait()
                    if more is None:
                        arrived.put_nowait(None)
                        break
                    piece += more
                yield piece
        finally:
            if not future.done():
                self.loop.cancel(request.request_id)
        result = _checked(future)
        self.metrics.count_caption(result)
        yield result


def _checked(future: Any) -> Result:
    """A future's result. Raises ApiError for what has none."""
    error = future.exception()
    if error is not None:
        raise _engine_gone() from error
    result: Result = future.result()
    if result.finish_reason == "error":
        reason = result.reason or Reason.ENGINE_ERROR
        detail = result.detail or "the engine gave the request up"
        if reason is Reason.PROMPT_TOO_LONG:
            raise ApiError(400, detail, code="context_length_exceeded", param="messages")
        if reason is Reason.OUT_OF_MEMORY:
            raise ApiError(503, detail, code="out_of_memory", retry_after_s=5)
        raise ApiError(500, detail, code=reason.value)
    return result


def _engine_gone() -> ApiError:
    return ApiError(503, "this replica lost its model and is being replaced; try again", code="replica_lost",
                    retry_after_s=5)  # fmt: skip


def recipe_of(name: str | None, decoded: Decoded, masked: bool) -> Recipe:
    """The rule of `meddam describe`: by name, else for a mask the mask itself, else by modality. Raises ApiError."""
    name = name or ("generic-mask" if masked else AUTO)
    try:
        return resolve_recipe(name, decoded.modality)
    except ValueError as error:
        raise ApiError(400, str(error), param="recipe") from None


def rendered(decoded: Decoded, window: str | None) -> NDArray[np.uint8]:
    """(H, W, 3) uint8. Raises RowError, and ApiError for a window that there is none of."""
    try:
        return render(decoded, window)
    except RowError:
        raise
    except ValueError as error:
        raise ApiError(400, str(error), param="window") from None


def _row(decoded: Decoded, recipe: str, regions: list[Region]) -> Image:
    """The row that ingest would make of a picture, without its pixels."""
    spacing = decoded.pixel_spacing_mm
    return Image(
        image_id=0, image_key="", dataset="serve", recipe=recipe, modality=decoded.modality, image=EncodedImage(),
        preview=EncodedImage(), width=decoded.width, height=decoded.height, stored_bits=decoded.stored_bits,
        rescale=decoded.rescale, window=decoded.window, lut=decoded.lut, photometric=decoded.photometric,
        pixel_spacing_mm=list(spacing) if spacing else None, regions=regions,
    )  # fmt: skip
