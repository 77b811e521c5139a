"""One request's caption as it grows: when it ends, its text, its pieces for a stream, its result.

Engines differ in how they compute logits; what a caption is, they share from here:
- it ends at an end-of-sequence id, before the first stop string, or at the token limit;
- its text is stripped at both ends, and the pieces of a stream joined are exactly that text;
- its log-probability is the mean over all chosen tokens, the end-of-sequence token included.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence

from meddam_core.engines.base import Request, Result
from meddam_core.records import FinishReason, Reason

END_OF_TEXT = "</s>"
"""A caption never ends in this literal: the reference removes one from the end of the text."""
UNFINISHED_CHARACTER = "\ufffd"


class Generation:
    """What a request has generated so far.

    Args:
        decode: token ids -> text, special tokens left out.
        eos_ids: ids that end a caption; they count for the log-probability and are not part of the caption.
        limit: most tokens to generate; below the request's max_new_tokens where the context leaves less.
    """

    __slots__ = ("_decode", "_emitted", "_eos_ids", "_logprob", "_num_chosen", "_stop_at", "error", "finish_reason",
                 "limit", "num_image_tokens", "num_prompt_tokens", "request", "token_ids")  # fmt: skip

    def __init__(
        self, request: Request, *, decode: Callable[[Sequence[int]], str], eos_ids: Collection[int], limit: int,
        num_prompt_tokens: int, num_image_tokens: int,
    ) -> None:  # fmt: skip
        self.request = request
        self.token_ids: list[int] = []
        self.limit = limit
        self.num_prompt_tokens = num_prompt_tokens
        self.num_image_tokens = num_image_tokens
        self.finish_reason: FinishReason | None = None
        self.error: tuple[Reason, str] | None = None
        self._decode = decode
        self._eos_ids = eos_ids
        self._logprob = 0.0
        self._num_chosen = 0
        self._stop_at: int | None = None
        self._emitted = ""

    @property
    def num_chosen(self) -> int:
        """Tokens chosen so far, the end-of-sequence token included: the index of the next choice."""
        return self._num_chosen

    def push(self, token_id: int, logprob: float) -> bool:
        """Takes the next token; True when the caption has ended with it."""
        assert self.finish_reason is None, "pushed to a finished caption"
        self._num_chosen += 1
        self._logprob += logprob
        if math.isnan(logprob):
            self.fail(Reason.ENGINE_ERROR, "the model's logits are not numbers: the weights or the kernels are broken")
        elif token_id in self._eos_ids:
            self.finish_reason = "stop"
        else:
            self.token_ids.append(token_id)
            if self._reached_stop_string():
                self.finish_reason = "stop"
            elif self._num_chosen >= self.limit:
                self.finish_reason = "length"
        return self.finish_reason is not None

    def fail(self, reason: Reason, detail: str) -> None:
        """Ends the caption as failed. `detail` is a sentence without patient data."""
        self.finish_reason = "error"
        self.error = (reason, detail)

    def text(self) -> str:
        """The caption so far, stripped, cut before a stop string; the result's text once it has ended."""
        whole = self._decode(self.token_ids)
        if self._stop_at is not None:
            whole = whole[: self._stop_at]
        return whole.strip().removesuffix(END_OF_TEXT).strip()

    def certain_text(self) -> str:
        """The text so far without what may still change: an unfinished character, the beginning of a stop string."""
        text = self.text()
        if self.finish_reason is None:
            text = text.rstrip(UNFINISHED_CHARACTER)
            text = _without_beginning_of(text, (*self.request.sampling.stop, END_OF_TEXT)).rstrip()
        return text

    def delta(self) -> str:
        """The text to stream now: what is certain to stay and has not been handed out before."""
        piece = self.certain_text()[len(self._emitted) :]
        self._emitted += piece
        return piece

    def result(self) -> Result:
        """The finished request."""
        assert self.finish_reason is not None, "the caption has not ended"
        failed = self.error is not None
        return Result(
            request_id=self.request.request_id,
            text="" if failed else self.text(),
            token_ids=() if failed else tuple(self.token_ids),
            mean_logprob=self._logprob / self._num_chosen if self._num_chosen and not failed else None,
            finish_reason=self.finish_reason,
            num_prompt_tokens=self.num_prompt_tokens,
            num_image_tokens=self.num_image_tokens,
            reason=self.error[0] if self.error else None,
            detail=self.error[1] if self.error else None,
        )

    def _reached_stop_string(self) -> bool:
        stops = self.request.sampling.stop
        if not stops:
            return False
        whole = self._decode(self.token_ids)
        places = [place for stop in stops if stop and (place := whole.find(stop)) >= 0]
        self._stop_at = min(places, default=None)
        return self._stop_at is not None


def _without_beginning_of(text: str, markers: Sequence[str]) -> str:
    """`text` without an end that may turn out to be the beginning of a marker."""
    held = 0
    for marker in markers:
        for length in range(min(len(marker), len(text)), held, -1):
            if text.endswith(marker[:length]):
                held = length
                break
    return text[: len(text) - held]
