"""From a request to what the language model will read: checked, tokenised, with a place for every visual token.

Every engine admits requests here, so that the same ones are refused with the same words, and the same limit on new
tokens applies.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from meddam_core.dam.config import DamConfig
from meddam_core.dam.tokens import IMAGE_TOKEN_ID, Tokenizer
from meddam_core.engines.base import Request, Result
from meddam_core.records import Reason, RowError

PLACEHOLDER_ID = 0
"""Stands where a visual token's row will be; any id of the vocabulary would do."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A request's prompt as positions of the language model."""

    token_ids: list[int]
    """One a position; PLACEHOLDER_ID where a visual token goes."""
    visual_positions: list[int]
    """Ascending; N * T of them, for N views of T tokens, in the order of the views."""
    num_new_tokens: int
    """Most tokens to generate: what the request asks for, or what the context leaves."""


def admit(request: Request, config: DamConfig, tokenizer: Tokenizer) -> Prompt:
    """Raises RowError with the reason for a request that cannot be served."""
    views, size = request.views_N8SS, config.view_size
    if views.dtype != np.uint8 or views.ndim != 4 or views.shape[1:] != (8, size, size) or not len(views):
        raise RowError(
            Reason.ENGINE_ERROR,
            f"views are {views.dtype} {views.shape}; this checkpoint takes uint8 (N, 8, {size}, {size}), N at least 1",
        )
    try:
        ids = tokenizer.encode_prompt(request.query)
    except ValueError as error:
        raise RowError(Reason.ENGINE_ERROR, str(error)) from error
    num_places = ids.count(IMAGE_TOKEN_ID)
    if num_places != len(views):
        raise RowError(Reason.ENGINE_ERROR, f"the query has {num_places} <image> places for {len(views)} views")
    token_ids: list[int] = []
    visual: list[int] = []
    for token in ids:
        if token == IMAGE_TOKEN_ID:
            visual += range(len(token_ids), len(token_ids) + config.num_image_tokens)
            token_ids += [PLACEHOLDER_ID] * config.num_image_tokens
        else:
            token_ids.append(token)
    room = config.context_length - len(token_ids)
    if room < 1:
        raise RowError(
            Reason.PROMPT_TOO_LONG,
            f"the prompt takes {len(token_ids)} positions and the model's context has {config.context_length}, "
            "with at least one for the caption",
        )
    return Prompt(token_ids, visual, min(request.sampling.max_new_tokens, room))


def refusal(request: Request, error: RowError) -> Result:
    """The result of a request that was not admitted."""
    return Result(
        request_id=request.request_id, text="", token_ids=(), mean_logprob=None, finish_reason="error",
        reason=error.reason, detail=error.detail,
    )  # fmt: skip
