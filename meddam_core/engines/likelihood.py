"""How likely a model finds given captions of a region: teacher-forced log-probabilities, nothing is generated.

    scored = caption_likelihoods(dam, views_N8SS, "<image> Describe it.", ["A round nodule.", "An oval nodule."])
    scored[0].total - scored[1].total

The region's vision is computed once for all its captions. The tokens
scored are the caption's and the end of sequence, as in `Result.mean_logprob`: natural logarithms, before temperature.

Arrays: N views, 8 channels, S the model's input side; C captions, L positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from meddam_core.dam.model import Dam
from meddam_core.engines.admission import admit
from meddam_core.engines.base import Request

DEFAULT_BATCH = 16


@dataclass(frozen=True, slots=True)
class Likelihood:
    """One caption's log-probability under the model."""

    token_logprobs: tuple[float, ...]
    """Of each token, the end of sequence last."""

    @property
    def total(self) -> float:
        """Natural log-probability of the whole caption."""
        return sum(self.token_logprobs)

    @property
    def mean(self) -> float:
        """The same, a token."""
        return self.total / len(self.token_logprobs)


def caption_likelihoods(
    dam: Dam, views_N8SS: NDArray[np.uint8], query: str, captions: Sequence[str], *, batch: int = DEFAULT_BATCH
) -> list[Likelihood]:
    """The likelihood of each caption, in their order.

    Args:
        views_N8SS: the region's model input, (N, 8, S, S) uint8.
        query: the prompt, with one `<image>` for each view.
        captions: any texts; "" is the likelihood of saying nothing.
        batch: captions in one pass.

    Raises RowError for views or a query that the checkpoint cannot take, ValueError for a caption beyond its context.
    """
    admit(Request(request_id="likelihood", views_N8SS=views_N8SS, query=query), dam.config, dam.tokenizer)
    with torch.inference_mode():
        tokens_NTD = dam.encode(torch.from_numpy(np.ascontiguousarray(views_N8SS)))
        prompt_LD = dam.merge(dam.tokenizer.encode_prompt(query), tokens_NTD)
        ids = [_ids(dam, caption) for caption in captions]
        longest = max((len(i) for i in ids), default=0)
        if len(prompt_LD) + longest > dam.config.context_length:
            raise ValueError(
                f"a caption of {longest} tokens does not fit behind a prompt of {len(prompt_LD)}: the model's context "
                f"is {dam.config.context_length}"
            )
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        found: dict[int, Likelihood] = {}
        for start in range(0, len(order), batch):
            chosen = order[start : start + batch]
            for i, scored in zip(chosen, _scored(dam, prompt_LD, [ids[i] for i in chosen]), strict=True):
                found[i] = scored
    return [found[i] for i in range(len(captions))]


def _ids(dam: Dam, caption: str) -> list[int]:
    """Tokens of a caption as the model would generate them, the end of sequence last."""
    tokenizer = dam.tokenizer
    ids = tokenizer.encode(caption.strip()) if caption.strip() else []
    if ids and ids[0] == tokenizer.bos_id:
        ids = ids[1:]
    return [*ids, tokenizer.eos_id]


def _scored(dam: Dam, prompt_LD: torch.Tensor, ids: Sequence[Sequence[int]]) -> list[Likelihood]:
    """One pass over captions of about equal length, behind the prompt; padding stands behind what is scored."""
    longest = max(len(i) for i in ids)
    padded_CL = torch.full((len(ids), longest), dam.tokenizer.eos_id, device=dam.device)
    for row, own in enumerate(ids):
        padded_CL[row, : len(own)] = torch.tensor(list(own), device=dam.device)
    texts_CLD = dam.llm.embed(padded_CL[:, :-1]).to(prompt_LD.dtype)
    embeds = torch.cat([prompt_LD.expand(len(ids), -1, -1), texts_CLD], dim=1)
    hidden, _ = dam.llm(embeds)
    logits_CLV = dam.llm.logits(hidden[:, len(prompt_LD) - 1 :])
    chosen_CL = torch.log_softmax(logits_CLV, dim=-1).gather(-1, padded_CL[..., None])[..., 0].cpu()
    return [Likelihood(tuple(float(v) for v in chosen_CL[row, : len(own)])) for row, own in enumerate(ids)]
