"""Any OpenAI-compatible vision model behind the Engine protocol: the baselines of the paper's Table 1.

    engine = RemoteEngine(chat, "gpt-4o", Showing(what="both", box=True))

A request's views become pictures: the whole image, with a box around the region if wanted, and the crop of the region
(its box with the recipe's margin, or its mask's box). The prompt is the request's own, without its image tokens.

Notes:
- `chat` makes the calls: it holds the permits and the retries, and no engine of this kind sends a byte without it.
- The egress policy is looked at before, where the picture is prepared (`captioner.ViewRules.egress`): what may not
  leave never comes here.
- There is no log-probability and there are no token ids; `token_ids` holds UNKNOWN_TOKEN as often as the server counts.
- Every request ends: with a result, a failed one whatever was raised, or with EngineStopped where the run must end.

Arrays: H rows, W columns, C colours; S the side of the views.
"""

from __future__ import annotations

import asyncio
import base64
import functools
import io
import logging
import queue
import threading
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PilImage

from meddam_core.engines.base import Delta, EngineDied, EngineStats, EngineStopped, Request, Result, Sampling
from meddam_core.records import FinishReason, Reason
from meddam_core.regions.geometry import tight_box

logger = logging.getLogger(__name__)

UNKNOWN_TOKEN = -1
STEP_S = 0.05
BOX_RGB = (255, 0, 0)

WHOLE = "The first picture is the whole image."
WHOLE_WITH_BOX = "The first picture is the whole image, with the region marked by a red box."
CROP = "The second picture is the region itself, cut out of it."
ONLY_WHOLE_WITH_BOX = "The region is marked by a red box."
ONLY_CROP = "The picture is the region, cut out of an image."


@dataclass(frozen=True, slots=True)
class Showing:
    """What a remote model is shown."""

    what: Literal["both", "crop", "full"] = "both"
    box: bool = True
    """Whether a box is drawn around the region in the whole image."""

    def __post_init__(self) -> None:
        if self.what == "full" and not self.box:
            raise ValueError(
                "the whole image without a box does not tell which region is meant; draw it, or show the crop"
            )


@dataclass(frozen=True, slots=True)
class ChatReply:
    """What came back."""

    text: str
    finish_reason: str
    num_prompt_tokens: int = 0
    num_reply_tokens: int = 0


class ChatFailed(RuntimeError):
    """No reply, as often as is worth trying. Its text holds nothing of what was sent.

    `stops` tells whether the job must end: the budget is spent, or the endpoint is down.
    """

    def __init__(self, why: str, stops: bool = False) -> None:
        self.stops = stops
        super().__init__(why)


class Chat(Protocol):
    """Makes the calls."""

    async def complete(self, messages: list[dict[str, Any]], sampling: Sampling) -> ChatReply:
        """One reply. Raises ChatFailed."""
        ...


class RemoteEngine:
    """Requests run at once in a thread of their own; `step` hands out what has come back.

    Args:
        chat: makes the calls; lives in this engine's thread.
        model: the remote model's name, for `kernels`.
        showing: which pictures it gets.
    """

    name = "remote"

    def __init__(self, chat: Chat, model: str, showing: Showing) -> None:
        self.kernels = model
        self.stats = EngineStats()
        self._chat = chat
        self._showing = showing
        self._done: queue.Queue[Result | EngineStopped] = queue.Queue()
        self._running: dict[str, Future[Result]] = {}
        self._held: list[Result] = []
        """Came back while `generate` waited for others."""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="remote-engine", daemon=True)
        self._thread.start()

    @property
    def num_unfinished(self) -> int:
        """Requests submitted and not yet returned by `step`."""
        return len(self._running) + len(self._held)

    def submit(self, requests: Sequence[Request]) -> None:
        """Sends the requests off. Raises ValueError for a request_id that is in flight."""
        names = [r.request_id for r in requests]
        if len(set(names)) < len(names) or any(n in self._running for n in names):
            raise ValueError("request ids are in flight already or repeated")
        for request in requests:
            self.stats.num_requests += 1
            running = asyncio.run_coroutine_threadsafe(self._describe(request), self._loop)
            self._running[request.request_id] = running
            running.add_done_callback(functools.partial(self._end, request))

    def step(self) -> list[Result]:
        """What has come back; waits a moment where nothing has.

        Raises EngineStopped where the run must end, and EngineDied where nothing will come back any more.
        """
        found, self._held = self._held, []
        if found or not self._running:
            return found
        for one in self._collected():
            if isinstance(one, EngineStopped):
                raise one
            found.append(one)
        known = [r for r in found if self._running.pop(r.request_id, None) is not None]  # the others were cancelled
        for result in known:
            self.stats.num_prompt_tokens += result.num_prompt_tokens
            self.stats.num_new_tokens += len(result.token_ids)
        return known

    def generate(self, requests: Sequence[Request]) -> list[Result]:
        """All requests to the end; results in the order of the requests."""
        self.submit(requests)
        wanted = {r.request_id for r in requests}
        found: dict[str, Result] = {}
        held: list[Result] = []
        while len(found) < len(wanted):
            for result in self.step():
                if result.request_id in wanted:
                    found[result.request_id] = result
                else:
                    held.append(result)
        self._held = held
        return [found[r.request_id] for r in requests]

    def stream(self, request: Request) -> Iterator[Delta]:
        """One request; its text comes in one piece."""
        (result,) = self.generate([request])
        yield Delta(text=result.text, result=result)

    def cancel(self, request_id: str) -> None:
        """Gives up a request; unknown ids are ignored."""
        running = self._running.pop(request_id, None)
        if running is not None:
            running.cancel()

    def close(self) -> None:
        """Ends the thread."""
        self._loop.call_soon_threadsafe(self._loop.stop)

    def _run(self) -> None:
        try:
            self._loop.run_forever()
            if left := asyncio.all_tasks(self._loop):
                for task in left:
                    task.cancel()
                self._loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
        finally:
            self._loop.close()

    async def _describe(self, request: Request) -> Result:
        try:
            messages = await asyncio.to_thread(chat_messages, request, self._showing)
        except ValueError as error:  # a picture that cannot be made; the text is ours
            return _failed(request, str(error))
        return _result(request, await self._chat.complete(messages, request.sampling))

    def _end(self, request: Request, ended: Future[Result]) -> None:
        """Hands on how a request ended; whatever was raised, `step` hears of it."""
        if self._running.get(request.request_id) is not ended:  # it was given up
            return
        error = CancelledError() if ended.cancelled() else ended.exception()
        if error is None:
            self._done.put(ended.result())
        elif isinstance(error, ChatFailed):
            self._done.put(EngineStopped(str(error)) if error.stops else _failed(request, str(error)))
        else:  # other people's texts may hold what was sent: only the type is told
            kind = type(error).__name__
            logger.error("%s while asking the endpoint\n%s", kind, "".join(traceback.format_tb(error.__traceback__)))
            self._done.put(_failed(request, f"{kind} while asking the endpoint; its place is in the worker's log"))

    def _collected(self) -> list[Result | EngineStopped]:
        """What has ended; waits a moment where nothing has. Raises EngineDied where the thread is gone."""
        found: list[Result | EngineStopped] = []
        try:
            found.append(self._done.get(timeout=STEP_S))
            while True:
                found.append(self._done.get_nowait())
        except queue.Empty:
            pass
        if not found and not self._thread.is_alive():
            raise EngineDied("the thread that asks the endpoint has ended")
        return found


def chat_messages(request: Request, showing: Showing) -> list[dict[str, Any]]:
    """The one user message: what the pictures are, the prompt, the pictures. Raises ValueError for a clip."""
    if len(request.views_N8SS) != 1:
        raise ValueError("a remote model is shown pictures, not clips; choose another recipe and prompt")
    full_HWC, crop_HWC = pictures(request.views_N8SS[0], showing.box)
    prompt = request.query.replace("<image>", "").strip()
    introduction = {
        "both": f"{WHOLE_WITH_BOX if showing.box else WHOLE} {CROP}", "crop": ONLY_CROP, "full": ONLY_WHOLE_WITH_BOX,
    }[showing.what]  # fmt: skip
    shown = {"both": [full_HWC, crop_HWC], "crop": [crop_HWC], "full": [full_HWC]}[showing.what]
    parts: list[dict[str, Any]] = [{"type": "text", "text": f"{introduction}\n\n{prompt}"}]
    parts += [{"type": "image_url", "image_url": {"url": data_url(picture)}} for picture in shown]
    return [{"role": "user", "content": parts}]


def pictures(views_8SS: NDArray[np.uint8], box: bool) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """(whole image, with a box if wanted; crop of the region), each (H, W, 3) uint8, from a model input.

    Raises RowError(mask_empty) where the region is too small to be seen in the view.
    """
    full_HWC = np.ascontiguousarray(views_8SS[0:3].transpose(1, 2, 0))
    focal_HWC = views_8SS[4:7].transpose(1, 2, 0)
    x0, y0, x1, y1 = tight_box((views_8SS[7] > 0).astype(np.uint8))
    if box:
        full_HWC = boxed(full_HWC, tight_box((views_8SS[3] > 0).astype(np.uint8)))
    return full_HWC, np.ascontiguousarray(focal_HWC[y0:y1, x0:x1])


def boxed(image_HWC: NDArray[np.uint8], box: tuple[int, int, int, int]) -> NDArray[np.uint8]:
    """The image with a red frame just outside the box, so that nothing of the region is covered."""
    height, width = image_HWC.shape[:2]
    line = max(2, max(height, width) // 300)
    x0, y0, x1, y1 = box
    out = image_HWC.copy()
    left, top = max(0, x0 - line), max(0, y0 - line)
    right, bottom = min(width, x1 + line), min(height, y1 + line)
    out[top:bottom, left:right] = BOX_RGB
    out[y0:y1, x0:x1] = image_HWC[y0:y1, x0:x1]
    return out


def data_url(image_HWC: NDArray[np.uint8]) -> str:
    """The picture as PNG in a data URL."""
    sink = io.BytesIO()
    PilImage.fromarray(image_HWC).save(sink, "PNG")
    return "data:image/png;base64," + base64.b64encode(sink.getvalue()).decode("ascii")


_FINISH: dict[str, FinishReason] = {"stop": "stop", "length": "length", "end_turn": "stop", "max_tokens": "length"}


def _result(request: Request, reply: ChatReply) -> Result:
    finish = _FINISH.get(reply.finish_reason)
    if finish is None:
        return _failed(request, "the endpoint gave no caption: its reply ended with another reason than stop or length")
    return Result(
        request_id=request.request_id, text=reply.text.strip(), token_ids=(UNKNOWN_TOKEN,) * reply.num_reply_tokens,
        mean_logprob=None, finish_reason=finish, num_prompt_tokens=reply.num_prompt_tokens,
    )  # fmt: skip


def _failed(request: Request, detail: str) -> Result:
    return Result(
        request_id=request.request_id, text="", token_ids=(), mean_logprob=None, finish_reason="error",
        reason=Reason.ENGINE_ERROR, detail=detail,
    )  # fmt: skip
