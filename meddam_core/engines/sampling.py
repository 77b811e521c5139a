"""Choosing the next token: greedy, or temperature / top-k / top-p with a random stream a request.

Every engine that computes logits chooses here, so that the same logits and the same seed give the same token in any
engine, batch, order or after a preemption:
- the random number of a choice is a function of (request seed, index of the token) alone, with no state to carry;
- a choice looks at one row of logits only; it is made in float64, by inverse CDF over probabilities sorted from the
  likeliest down, equal ones by token id;
- order of filters: temperature, then top-k, then top-p (as Hugging Face `generate` applies them).

Arrays: B sequences, V tokens of the vocabulary, K leading candidates.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from meddam_core.engines.base import Sampling

HEAD_SIZE = 256
"""Candidates looked at first; the whole vocabulary is sorted only for rows whose choice lies beyond them."""


class Choice(NamedTuple):
    """The next token of each row, and its natural log-probability under the model before temperature."""

    token_ids: list[int]
    logprobs: list[float]


def uniform(seed: int, index: int) -> float:
    """The random number in [0, 1) for token number `index` (from 0) of a request with this seed. Stateless."""
    digest = hashlib.blake2b(f"{seed}/{index}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def choose_tokens(logits_BV: torch.Tensor, samplings: Sequence[Sampling], indices: Sequence[int]) -> Choice:
    """The next token of every row.

    Args:
        logits_BV: floating point, any device; not changed.
        samplings: B settings; temperature 0 takes the likeliest token.
        indices: B; how many tokens the row's request has generated before this one.

    Rows that hold NaN give the log-probability NaN; the caller ends such requests as failed.
    """
    assert logits_BV.shape[0] == len(samplings) == len(indices)
    sampled = [row for row, sampling in enumerate(samplings) if sampling.temperature > 0]
    # one copy from the device for everything greedy: most batches are nothing else
    top_B = _likeliest(logits_BV)
    norm_B = torch.logsumexp(logits_BV.float(), dim=-1)
    logprob_B = logits_BV.gather(-1, top_B[:, None])[:, 0].float() - norm_B
    both_2B = torch.stack((top_B.double(), logprob_B.double())).cpu()
    token_ids = [int(token) for token in both_2B[0].tolist()]
    logprobs = both_2B[1].tolist()
    if sampled:
        rows = torch.as_tensor(sampled, device=logits_BV.device)
        tokens = _sample(logits_BV[rows], [samplings[row] for row in sampled], [indices[row] for row in sampled])
        tokens_R = torch.as_tensor(tokens, device=logits_BV.device)
        chosen_R = (logits_BV[rows, tokens_R].float() - norm_B[rows]).tolist()
        for row, token, logprob in zip(sampled, tokens, chosen_R, strict=True):
            token_ids[row], logprobs[row] = token, logprob
    return Choice(token_ids, logprobs)


def _likeliest(logits_BV: torch.Tensor) -> torch.Tensor:
    """The first of the largest logits of every row. On the host NumPy finds it about fifteen times as fast as torch."""
    if logits_BV.device.type == "cpu" and logits_BV.dtype == torch.float32:
        return torch.from_numpy(logits_BV.numpy().argmax(axis=-1))
    return logits_BV.argmax(dim=-1)


def _sample(logits_BV: torch.Tensor, samplings: Sequence[Sampling], indices: Sequence[int]) -> list[int]:
    """Tokens by inverse CDF. Looks at the HEAD_SIZE likeliest first: with usual settings the choice is among them."""
    temperature_B = torch.tensor([s.temperature for s in samplings], dtype=torch.float64, device=logits_BV.device)
    scaled_BV = logits_BV.double() / temperature_B[:, None]
    vocabulary = scaled_BV.shape[1]
    # one more than the head, to see whether a tie crosses its edge
    head = torch.topk(scaled_BV, min(HEAD_SIZE + 1, vocabulary), dim=-1)
    total_B = torch.logsumexp(scaled_BV, dim=-1).cpu().numpy()
    values_BK, ids_BK = head.values.cpu().numpy(), head.indices.cpu().numpy()
    tokens = []
    for row, (sampling, index) in enumerate(zip(samplings, indices, strict=True)):
        point = uniform(sampling.seed, index)
        token = None
        if np.isfinite(total_B[row]):
            token = _pick_from_head(values_BK[row], ids_BK[row], vocabulary, float(total_B[row]), sampling, point)
        if token is None:
            values_V = scaled_BV[row].cpu().numpy()
            token = _pick(values_V, np.arange(vocabulary), _log_total(values_V, sampling), sampling, point)
        tokens.append(token)
    return tokens


def _pick_from_head(
    values_K: NDArray[np.float64], ids_K: NDArray[np.int64], vocabulary: int, log_total: float, sampling: Sampling,
    point: float,
) -> int | None:  # fmt: skip
    """The choice if it can be made from the head alone and would be the same from the whole row, else None."""
    if len(values_K) < vocabulary:
        if values_K[-1] == values_K[-2]:
            return None  # which of the equal candidates belongs to the head is not defined
        values_K, ids_K = values_K[:-1], ids_K[:-1]
    if 0 < sampling.top_k <= len(values_K):
        return _pick(values_K, ids_K, _log_total(values_K, sampling), sampling, point)
    if len(values_K) < vocabulary:
        mass = float(np.exp(values_K - log_total).sum())
        reach = sampling.top_p if sampling.top_p < 1 else point
        if sampling.top_k or mass < min(1.0, reach + 1e-9):
            return None
    return _pick(values_K, ids_K, log_total, sampling, point)


def _log_total(values: NDArray[np.float64], sampling: Sampling) -> float:
    """log of the sum of exp(values) over what top-k keeps."""
    if 0 < sampling.top_k < len(values):
        values = np.sort(values)[::-1][: sampling.top_k]
    peak = values.max()
    return float(peak + np.log(np.exp(values - peak).sum()))


def _pick(
    values: NDArray[np.float64], ids: NDArray[np.int64], log_total: float, sampling: Sampling, point: float
) -> int:
    """Inverse CDF over the candidates that top-k and top-p keep; `log_total` normalises what top-k keeps."""
    order = np.lexsort((ids, -values))
    if sampling.top_k:
        order = order[: sampling.top_k]
    cumulative = np.exp(values[order] - log_total).cumsum()
    kept = len(order)
    if sampling.top_p < 1:  # the smallest set that reaches top_p, the token that crosses it included
        kept = min(kept, int(np.searchsorted(cumulative, sampling.top_p)) + 1)
    # without top-p nothing is cut off and the whole has mass 1, also where only its head was looked at
    mass = cumulative[kept - 1] if sampling.top_p < 1 else 1.0
    place = int(np.searchsorted(cumulative[:kept], point * mass, side="right"))
    return int(ids[order[min(place, kept - 1)]])
