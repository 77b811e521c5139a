"""What engines that hold the weights themselves have in common: requests in, results, streams and cancels out.

A subclass says how a step is done (`_work`) and how an admitted request is dropped (`_drop`). Requests wait in
`_vision`, and every request that ends goes through `_finish`.

After a failure that may have left half a step behind the engine refuses further work with EngineDied.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence

from meddam_core.dam.model import Dam
from meddam_core.engines.admission import Prompt, admit, refusal
from meddam_core.engines.base import Delta, EngineDied, EngineStats, Request, Result
from meddam_core.engines.faults import lost_device
from meddam_core.engines.generation import Generation
from meddam_core.engines.vision import Pending, VisionQueue
from meddam_core.records import RowError


class LocalEngine(ABC):
    """The Engine protocol but for the computing; see meddam_core.engines.base.

    Args:
        vision_batch: views in one pass of the vision tower.
        eos_ids: ids that end a caption, instead of the checkpoint's; () decodes every caption to its limit.
    """

    def __init__(self, dam: Dam, *, vision_batch: int, eos_ids: Collection[int] | None) -> None:
        self.stats = EngineStats()
        self._config, self._tokenizer, self._device = dam.config, dam.tokenizer, dam.device
        checkpoint_eos = dam.config.llm.eos_token_ids or (dam.tokenizer.eos_id,)
        self._eos_ids = frozenset(checkpoint_eos if eos_ids is None else eos_ids)
        self._vision = VisionQueue(dam, vision_batch, self.stats)
        self._uids = itertools.count()
        self._uid_of: dict[str, int] = {}
        self._generations: dict[int, Generation] = {}
        self._finished: dict[str, Result] = {}
        self._reserved: set[str] = set()
        """Requests of `generate` and `stream` in progress; `step` does not return them."""
        self._broken = False
        self._closed = False

    @property
    def num_unfinished(self) -> int:
        return len(self._uid_of) + len(self._finished)

    def submit(self, requests: Sequence[Request]) -> None:
        self._check_usable()
        names = [r.request_id for r in requests]
        taken = {n for n in names if n in self._uid_of or n in self._finished}
        if taken or len(set(names)) < len(names):
            raise ValueError(f"request ids are in flight already or repeated: {sorted(taken or set(names))[:3]}")
        for request in requests:
            self.stats.num_requests += 1
            try:
                prompt = admit(request, self._config, self._tokenizer)
                self._check_fits(prompt)
            except RowError as error:
                self._finished[request.request_id] = refusal(request, error)
                continue
            self._queue(request, prompt)

    def step(self) -> list[Result]:
        self._advance()
        ours = [name for name in self._finished if name not in self._reserved]
        return [self._finished.pop(name) for name in ours]

    def generate(self, requests: Sequence[Request]) -> list[Result]:
        # The longest first: none is left to decode alone at the end, and neighbours end at about the same time.
        self.submit(sorted(requests, key=lambda request: -request.sampling.max_new_tokens))
        names = [r.request_id for r in requests]
        self._reserved.update(names)
        try:
            while any(name not in self._finished for name in names):
                self._advance()
            return [self._finished.pop(name) for name in names]
        finally:
            self._reserved.difference_update(names)

    def stream(self, request: Request) -> Iterator[Delta]:
        self.submit([request])
        name = request.request_id
        self._reserved.add(name)
        try:
            uid = self._uid_of.get(name)
            generation = None if uid is None else self._generations[uid]
            while name not in self._finished:
                self._advance()
                text = "" if generation is None or name in self._finished else generation.delta()
                if text:
                    yield Delta(text=text)
            failed = generation is None or generation.error is not None
            rest = "" if failed or generation is None else generation.delta()
            yield Delta(text=rest, result=self._finished.pop(name))
        finally:
            self._reserved.discard(name)
            self.cancel(name)

    def cancel(self, request_id: str) -> None:
        self._finished.pop(request_id, None)
        uid = self._uid_of.pop(request_id, None)
        if uid is None or self._closed or self._broken:
            return
        del self._generations[uid]
        self._vision.cancel(uid)
        self._drop(uid)

    def text_so_far(self, request_id: str) -> str:
        """What is certain to stay of a request's text; "" for one that is unknown or has not begun."""
        uid = self._uid_of.get(request_id)
        return "" if uid is None else self._generations[uid].certain_text()

    @abstractmethod
    def close(self) -> None:
        """Free memory. The engine cannot be used afterwards."""

    @abstractmethod
    def _work(self) -> None:
        """One step: admit what there is room for, compute, `_finish` what ended."""

    @abstractmethod
    def _drop(self, uid: int) -> None:
        """Forget a request that has left the vision queue, if it has."""

    def _check_fits(self, prompt: Prompt) -> None:  # noqa: B027 - most engines have no limit of their own
        """Raises RowError for a prompt that fits the model's context and not this engine."""

    def _check_usable(self) -> None:
        if self._closed:
            raise ValueError("this engine was closed")
        if self._broken:
            raise EngineDied("this engine failed in a step before; its state cannot be trusted")

    def _advance(self) -> None:
        self._check_usable()
        self._broken = True  # half a step must not be built upon, however it ended
        try:
            self._work()
        except RuntimeError as error:
            if lost_device(error):
                raise EngineDied(f"the CUDA context is lost: {error}") from error
            raise
        self._broken = False

    def _queue(self, request: Request, prompt: Prompt) -> None:
        uid = next(self._uids)
        generation = Generation(
            request, decode=self._tokenizer.decode, eos_ids=self._eos_ids, limit=prompt.num_new_tokens,
            num_prompt_tokens=len(prompt.token_ids), num_image_tokens=len(prompt.visual_positions),
        )  # fmt: skip
        self._uid_of[request.request_id] = uid
        self._generations[uid] = generation
        self._vision.put(Pending(uid, prompt, generation))

    def _finish(self, uid: int) -> None:
        generation = self._generations.pop(uid)
        name = generation.request.request_id
        del self._uid_of[name]
        self.stats.num_prompt_tokens += generation.num_prompt_tokens
        self.stats.num_new_tokens += generation.num_chosen
        self._finished[name] = generation.result()
