"""Token choice: exact against brute force, independent of the batch, and distributed as the model says."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from meddam_core.engines.base import Sampling
from meddam_core.engines.sampling import HEAD_SIZE, choose_tokens, uniform


def brute_force(logits: np.ndarray, sampling: Sampling, index: int) -> int:
    """The definition, written out over the whole vocabulary."""
    values = logits.astype(np.float64) / sampling.temperature
    order = sorted(range(len(values)), key=lambda i: (-values[i], i))
    if sampling.top_k:
        order = order[: sampling.top_k]
    weights = np.exp(values[order] - values.max())
    weights /= weights.sum()
    kept: list[int] = []
    for place in range(len(order)):
        if weights[:place].sum() >= sampling.top_p:
            break
        kept.append(place)
    weights = weights[kept] / weights[kept].sum()
    point, total = uniform(sampling.seed, index), 0.0
    for place, weight in zip(kept, weights, strict=True):
        total += weight
        if point < total:
            return order[place]
    return order[kept[-1]]


SETTINGS = [
    Sampling(temperature=0.2, top_p=0.5, seed=1),
    Sampling(temperature=1.0, seed=2),
    Sampling(temperature=1.0, top_k=50, top_p=0.9, seed=3),
    Sampling(temperature=3.0, top_k=400, seed=4),
    Sampling(temperature=5.0, top_p=0.99, seed=5),
    Sampling(temperature=0.7, top_k=10**9, seed=6),
    Sampling(temperature=1e-6, seed=7),
]


@pytest.mark.parametrize("vocabulary", [5, HEAD_SIZE, HEAD_SIZE + 1, 3000])
@pytest.mark.parametrize("spread", [0.1, 4.0])
def test_equals_the_definition_in_any_batch(vocabulary: int, spread: float) -> None:
    rng = np.random.default_rng(0)
    logits = torch.from_numpy(rng.normal(0, spread, (len(SETTINGS), vocabulary)).astype(np.float32))
    for index in range(6):
        together = choose_tokens(logits, SETTINGS, [index] * len(SETTINGS))
        for row, sampling in enumerate(SETTINGS):
            assert together.token_ids[row] == brute_force(logits[row].numpy(), sampling, index)
            alone = choose_tokens(logits[row : row + 1], [sampling], [index])
            assert alone.token_ids == [together.token_ids[row]]
            assert alone.logprobs[0] == pytest.approx(together.logprobs[row], abs=1e-6)


def test_equal_logits_are_ordered_by_token_id() -> None:
    logits = torch.round(torch.randn(4, 2000, generator=torch.Generator().manual_seed(0)) * 2) / 2
    settings = [Sampling(temperature=1.0, top_p=p, top_k=k, seed=9) for p, k in ((0.9, 0), (1.0, 40), (0.3, 0), (1, 0))]
    for index in range(20):
        chosen = choose_tokens(logits, settings, [index] * 4)
        assert chosen.token_ids == [brute_force(logits[row].numpy(), settings[row], index) for row in range(4)]


def test_frequencies_follow_the_probabilities() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    counts = np.zeros(4)
    for seed in range(4000):
        counts[choose_tokens(logits, [Sampling(temperature=2.0, seed=seed)], [3]).token_ids[0]] += 1
    expected = torch.softmax(logits[0] / 2.0, 0).numpy() * 4000
    assert ((counts - expected) ** 2 / expected).sum() < 16.3  # chi-square, 3 degrees of freedom, p = 0.001


def test_greedy_rows_in_a_mixed_batch_and_log_probabilities_before_temperature() -> None:
    logits = torch.randn(3, 100, generator=torch.Generator().manual_seed(1))
    settings = [Sampling(), Sampling(temperature=9.0, seed=5), Sampling()]
    chosen = choose_tokens(logits, settings, [0, 0, 0])
    assert [chosen.token_ids[0], chosen.token_ids[2]] == logits[[0, 2]].argmax(-1).tolist()
    expected = torch.log_softmax(logits, -1)[torch.arange(3), torch.tensor(chosen.token_ids)]
    assert chosen.logprobs == pytest.approx(expected.tolist(), abs=1e-5)


def test_a_broken_row_is_visible_and_leaves_the_others_alone() -> None:
    logits = torch.zeros(2, 10)
    logits[0, 3] = float("nan")
    logits[1, 4] = 5.0
    for temperature in (0.0, 1e-3):
        chosen = choose_tokens(logits, [Sampling(temperature=temperature)] * 2, [0, 0])
        assert np.isnan(chosen.logprobs[0])
        assert chosen.token_ids[1] == 4
