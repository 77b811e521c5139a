"""Results -> what clients read: OpenAI's chat completions, their streams, and described regions.

`/chat/completions` is DAM's own server's path, and its clients read the pieces of a stream as lists of parts; `/v1` is
OpenAI's, where a piece is a string.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Literal

from meddam_core.engines.base import Result
from meddam_core.imaging.decoded import Decoded
from meddam_core.imaging.windows import PRESETS
from meddam_core.judging.findings import findings, template_set_of
from meddam_core.records import Box
from qa_library.loader import Library
from qa_library.schema import TemplateSet
from ray_jobs.serve.errors import ApiError

Dialect = Literal["openai", "dam"]
NOTICE = "Research tool: not for diagnosis or treatment."
DONE = "data: [DONE]\n\n"


def vocabulary(library: Library, name: str | None, recipe: str, modality: str) -> TemplateSet | None:
    """The template set that a request names, or that fits the image. Raises ApiError for an unknown name."""
    if name is None:
        return template_set_of(library, recipe, modality)
    if name not in library.sets:
        raise ApiError(400, f"there is no such template set; use one of {', '.join(sorted(library.sets))}",
                       param="template_set")  # fmt: skip
    return library.sets[name]


def described(result: Result, box: Box | None, library: Library, words: TemplateSet | None) -> dict[str, Any]:
    """What is known of a caption beside its text: schema.Described."""
    found = [] if words is None else findings(result.text, words, library)
    return {
        "box": None if box is None else list(box),
        "confidence": None if result.mean_logprob is None else math.exp(result.mean_logprob),
        "mean_logprob": result.mean_logprob,
        "findings": [asdict(f) for f in found],
        "template_set": None if words is None else words.id,
        "notice": NOTICE,
    }


def usage(results: Sequence[Result]) -> dict[str, Any]:
    """Counts of tokens of all captions of a request: schema.Usage."""
    prompt = sum(r.num_prompt_tokens for r in results)
    new = sum(len(r.token_ids) for r in results)
    return {
        "prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new,
        "prompt_tokens_details": {"image_tokens": sum(r.num_image_tokens for r in results)},
    }  # fmt: skip


def completion(name: str, model: str, results: Sequence[Result], notes: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """schema.ChatCompletion."""
    choices = [
        {
            "index": i, "message": {"role": "assistant", "content": result.text},
            "finish_reason": result.finish_reason, "logprobs": None, "meddam": note,
        }
        for i, (result, note) in enumerate(zip(results, notes, strict=True))
    ]  # fmt: skip
    return {
        "id": name, "object": "chat.completion", "created": int(time.time()), "model": model, "choices": choices,
        "usage": usage(results),
    }  # fmt: skip


class Chunks:
    """The server-sent events of one streamed completion."""

    def __init__(self, name: str, model: str, dialect: Dialect) -> None:
        self._head = {"id": name, "object": "chat.completion.chunk", "created": int(time.time()), "model": model}
        self._dialect = dialect

    def begin(self, index: int) -> str:
        """The first event of a caption."""
        return self._event(index, {"role": "assistant", "content": self._content("")})

    def piece(self, index: int, text: str) -> str:
        """A piece of a caption."""
        return self._event(index, {"content": self._content(text)})

    def end(self, index: int, result: Result, note: dict[str, Any]) -> str:
        """The last event of a caption, with what is known of it."""
        return self._event(index, {}, finish_reason=result.finish_reason, meddam=note)

    def usage(self, results: Sequence[Result]) -> str:
        """The event after the last, for those who asked for it."""
        return event({**self._head, "choices": [], "usage": usage(results)})

    def _content(self, text: str) -> str | list[dict[str, str]]:
        if self._dialect == "openai":
            return text
        return [{"type": "text", "text": text}] if text else []

    def _event(self, index: int, delta: dict[str, Any], finish_reason: str | None = None, **more: Any) -> str:
        choice = {"index": index, "delta": delta, "finish_reason": finish_reason, "logprobs": None, **more}
        return event({**self._head, "choices": [choice]})


def event(content: dict[str, Any]) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(content, separators=(',', ':'))}\n\n"


def image_facts(decoded: Decoded, recipe: str, window: str | None) -> dict[str, Any]:
    """schema.ImageFacts."""
    grey_ct = decoded.modality == "CT" and decoded.stored.ndim == 2 and decoded.rescale is not None
    windows = (["header"] if decoded.window is not None else []) + ([*PRESETS, "three_window"] if grey_ct else [])
    return {
        "width": decoded.width, "height": decoded.height, "modality": decoded.modality,
        "num_frames": decoded.num_frames, "frame": decoded.frame, "recipe": recipe, "window": window,
        "windows": windows,
        "pixel_spacing_mm": list(decoded.pixel_spacing_mm) if decoded.pixel_spacing_mm else None,
    }  # fmt: skip
