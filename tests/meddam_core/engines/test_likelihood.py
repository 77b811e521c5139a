"""Teacher-forced likelihoods agree with what the engine reports for its own captions, in any batch."""

from __future__ import annotations

import pytest
import torch

from meddam_core.dam.checkpoint import load_dam
from meddam_core.dam.model import Dam
from meddam_core.engines import likelihood
from meddam_core.engines.base import Request, Sampling
from meddam_core.engines.likelihood import caption_likelihoods
from meddam_core.engines.torch_engine import TorchEngine
from meddam_core.records import RowError
from tests.meddam_core.dam.small import CHECKPOINT, QUERY, random_views

CAPTIONS = [
    "A round nodule with a smooth margin.",
    "",
    "An oval mass.",
    "A long description of a " + "very " * 30 + "dark spot.",
]


@pytest.fixture(scope="module")
def dam() -> Dam:
    return load_dam(CHECKPOINT)


def test_no_first_token_is_likelier_than_the_greedy_one(dam: Dam) -> None:
    views = random_views(1, 112)
    (silent,) = caption_likelihoods(dam, views, QUERY, [""])
    (result,) = TorchEngine(dam, eos_ids=()).generate(
        [Request(request_id="b", views_N8SS=views, query=QUERY, sampling=Sampling(max_new_tokens=1))]
    )
    assert result.mean_logprob is not None
    assert silent.total <= result.mean_logprob + 1e-5


def test_forced_tokens_are_those_that_sampling_reports(dam: Dam) -> None:
    """Whatever was sampled: forcing the same ids gives the same log-probabilities."""
    views = random_views(1, 112, seed=3)
    sampling = Sampling(max_new_tokens=12, temperature=1.0, seed=5)
    (result,) = TorchEngine(dam, eos_ids=()).generate(
        [Request(request_id="a", views_N8SS=views, query=QUERY, sampling=sampling)]
    )
    with torch.inference_mode():
        prompt = dam.merge(dam.tokenizer.encode_prompt(QUERY), dam.encode(torch.from_numpy(views)))
        (scored,) = likelihood._scored(dam, prompt, [list(result.token_ids)])
    assert scored.mean == pytest.approx(result.mean_logprob, abs=1e-4)


def test_a_caption_s_likelihood_does_not_depend_on_its_neighbours(dam: Dam) -> None:
    views = random_views(1, 112, seed=1)
    together = caption_likelihoods(dam, views, QUERY, CAPTIONS, batch=3)
    alone = [caption_likelihoods(dam, views, QUERY, [c])[0] for c in CAPTIONS]
    assert [s.total for s in together] == pytest.approx([s.total for s in alone], abs=1e-3)
    assert [len(s.token_logprobs) for s in together] == [len(s.token_logprobs) for s in alone]
    assert len(together[1].token_logprobs) == 1
    assert all(v <= 0 for s in together for v in s.token_logprobs)


def test_the_picture_matters(dam: Dam) -> None:
    first, second = (caption_likelihoods(dam, random_views(1, 112, seed=s), QUERY, CAPTIONS[:1])[0] for s in (1, 2))
    assert first.total != second.total


def test_what_does_not_fit_is_refused(dam: Dam) -> None:
    views = random_views(1, 112)
    with pytest.raises(ValueError, match="does not fit behind"):
        caption_likelihoods(dam, views, QUERY, ["nodule " * 5000])
    with pytest.raises(RowError):
        caption_likelihoods(dam, views, "no place for a view", ["A nodule."])
    with pytest.raises(RowError):
        caption_likelihoods(dam, views[:, :, :50, :50], QUERY, ["A nodule."])
