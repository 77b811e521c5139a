"""LLM-score against a real HTTP server on loopback."""

from __future__ import annotations

import asyncio

import pytest

from meddam_core.judging.egress import Endpoint
from meddam_core.judging.llm import make_client
from meddam_core.judging.llm_score import FACTORS, LlmRater, Rating, known_facts, mean_score, parse_rating
from meddam_core.judging.protocol import Unscored
from meddam_core.records import Label
from qa_library import load_library
from qa_library.truth import truth_of
from tests.meddam_core.judging.test_llm import Handler, completion, server

__all__ = ["server"]

NODULES = load_library().sets["lidc_idri"]
FACTS = known_facts(NODULES, truth_of(NODULES, [Label(name="texture", value="5")]))


def rate(url: str, facts: str = FACTS, retains: bool = False) -> Rating:
    endpoint = Endpoint("https://127.0.0.1:9/v1" if retains else url, "retains" if retains else "inside")
    return asyncio.run(LlmRater(make_client(endpoint, "k", timeout_s=5), "m", endpoint).rate("A solid nodule.", facts))


def test_each_factor_is_rated_on_its_own(server: str) -> None:
    Handler.reply = lambda body: (200, {}, completion(str(60 + 10 * len(Handler.seen))))
    rating = rate(server)
    assert [rating.factors[f] for f in FACTORS] == [70, 80, 90, 100]
    assert (rating.score, rating.num_prompt_tokens) == (85.0, 800)
    texts = [body["messages"][1]["content"] for body in Handler.seen]
    assert ["solid nodule" in t and "Known facts" in t for t in texts] == [False, False, True, False]
    assert all(f.split()[0] in t.lower() for f, t in zip(FACTORS, texts, strict=True))


def test_what_is_no_number_or_fails_is_unscored(server: str) -> None:
    replies = [
        (200, {}, completion("80")),
        (200, {}, completion("about 80")),
        (500, {}, {}),
        (200, {}, completion("90")),
    ]
    Handler.reply = lambda body: replies[len(Handler.seen) - 1]
    rating = rate(server)
    assert rating.score is None
    assert rating.unscored == {"relevance": Unscored.UNPARSABLE, "factual correctness": Unscored.CALL_FAILED}


def test_correctness_is_not_guessed_without_facts_and_nothing_leaves_without_leave(server: str) -> None:
    Handler.reply = lambda body: (200, {}, completion("50"))
    assert rate(server, facts="").unscored == {"factual correctness": Unscored.CANNOT_JUDGE}
    assert len(Handler.seen) == 3
    assert set(rate(server, retains=True).unscored.values()) == {Unscored.EGRESS_DENIED}


@pytest.mark.parametrize(
    ("reply", "rating"),
    [("87", 87), (" 100. ", 100), ('{"rating": 5}', 5), ("0", 0), ("101", None), ("-1", None), ("87/100", None),
     ("", None), ("80 or 90", None), ("7.5", None)],
)  # fmt: skip
def test_ratings(reply: str, rating: float | None) -> None:
    assert parse_rating(reply) == rating


def test_means() -> None:
    full = Rating(dict.fromkeys(FACTORS, 80.0), {}, "j")
    half = Rating({"fluency": 100.0}, dict.fromkeys(FACTORS[1:], Unscored.REFUSED), "j")
    score, factors, lacking = mean_score([full, half])
    assert (score, factors["fluency"], lacking) == (80.0, 90.0, 0.5)
    assert mean_score([]) == (None, {}, 0.0)
