"""A caption's end, text and stream pieces."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from meddam_core.engines.base import Request, Sampling
from meddam_core.engines.generation import Generation
from meddam_core.records import Reason


def letters(ids: Sequence[int]) -> str:
    """A decoder for tests: one character a token, as bytes of UTF-8, unfinished ones as a replacement character."""
    return bytes(ids).decode("utf-8", errors="replace")


def generation(stop: tuple[str, ...] = (), limit: int = 100) -> Generation:
    request = Request(
        request_id="a",
        views_N8SS=np.zeros((1, 8, 2, 2), np.uint8),
        query="<image>",
        sampling=Sampling(max_new_tokens=limit, stop=stop),
    )
    return Generation(request, decode=letters, eos_ids={2, 3}, limit=limit, num_prompt_tokens=7, num_image_tokens=4)


def run(made: Generation, text: bytes, eos: int | None = 2) -> list[str]:
    pieces = []
    for token in [*text, *([] if eos is None else [eos])]:
        done = made.push(token, -0.5)
        pieces.append(made.delta())
        if done:
            break
    return pieces


@pytest.mark.parametrize(
    ("raw", "stop", "text"),
    [
        (" A nodule. ", (), "A nodule."),
        ("one two\n\nthree", ("\n\n",), "one two"),
        ("one two", ("wo", "one tw"), ""),
        ("ab###", ("##",), "ab"),
        ("héé — ß", (), "héé — ß"),
        ("a </s>", (), "a"),
        ("a < b </", (), "a < b </"),
        ("   ", (), ""),
        ("a\ufffdb", (), "a\ufffdb"),
    ],
)
@pytest.mark.parametrize("eos", [2, 3])
def test_text_and_stream(raw: str, stop: tuple[str, ...], text: str, eos: int) -> None:
    made = generation(stop)
    pieces = run(made, raw.encode(), eos)
    assert made.result().text == text
    assert "".join(pieces) == text
    assert made.result().finish_reason == "stop"


def test_a_stream_does_not_wait_for_the_end() -> None:
    pieces = run(generation(("zzz",)), b"hello world, zz top")
    assert pieces[:6] == ["h", "e", "l", "l", "o", ""]
    assert pieces[6] == " w"


def test_limit_and_log_probability() -> None:
    made = generation(limit=3)
    run(made, b"abcdef")
    result = made.result()
    assert (result.text, result.finish_reason, result.token_ids) == ("abc", "length", tuple(b"abc"))
    assert result.mean_logprob == pytest.approx(-0.5)
    made = generation(limit=4)
    run(made, b"abc", eos=3)
    assert made.result().finish_reason == "stop"
    assert made.result().token_ids == tuple(b"abc")
    assert made.num_chosen == 4


def test_broken_logits_fail_the_request() -> None:
    made = generation()
    assert made.push(50, float("nan"))
    result = made.result()
    assert (result.finish_reason, result.reason, result.text, result.mean_logprob) == (
        "error", Reason.ENGINE_ERROR, "", None,
    )  # fmt: skip
