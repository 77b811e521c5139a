"""The torch engine: the oracle's captions, the same in any company, and every way a request can end."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from meddam_core.dam.checkpoint import load_dam
from meddam_core.dam.model import Dam
from meddam_core.engines.base import Engine, Request, Result, Sampling
from meddam_core.engines.decoder import Decoder
from meddam_core.engines.torch_engine import TorchEngine
from meddam_core.focal import focal_views
from meddam_core.records import Reason
from tests.meddam_core.dam.small import CHECKPOINT, CONFIG, ORACLE, QUERY, random_views, small_config, small_dam

VIDEO = "Video: " + "<image>" * 2 + "\nDescribe the region."


@pytest.fixture(scope="module")
def oracle_dam() -> Dam:
    return load_dam(CHECKPOINT)


@pytest.fixture(scope="module")
def dam() -> Dam:
    """Odd grid, grouped-query attention."""
    return small_dam()


def _oracle_requests() -> tuple[list[Request], list[dict[str, Any]]]:
    requests, cases = [], []
    for file in sorted((ORACLE / "cases").glob("*.npz")):
        with np.load(file) as arrays:
            case = dict(arrays)
        images = case["images"] if "images" in case else case["image"][None]
        masks = case["masks"] if "masks" in case else case["mask"][None]
        views = np.stack([focal_views(i, m, 112) for i, m in zip(images, masks, strict=True)])
        sampling = Sampling(max_new_tokens=24)
        requests.append(Request(request_id=file.stem, views_N8SS=views, query=str(case["query"]), sampling=sampling))
        cases.append(case)
    return requests, cases


def _requests(num: int, **sampling: Any) -> list[Request]:
    """Different regions, prompts of different lengths (some with two views), limits of 3 to 30 tokens."""
    rng = np.random.default_rng(0)
    requests = []
    for i in range(num):
        two = i % 7 == 3
        words = "<image>\nDescribe the region" + " in detail" * (i % 5) + "."
        settings = {"max_new_tokens": int(rng.integers(3, 31)), **sampling}
        if "seed" not in settings:
            settings["seed"] = i
        requests.append(
            Request(
                request_id=f"r{i}",
                views_N8SS=random_views(1 + two, CONFIG.view_size, seed=i),
                query=VIDEO if two else words,
                sampling=Sampling(**settings),
            )
        )
    return requests


def _by_id(results: Sequence[Result]) -> dict[str, Result]:
    return {r.request_id: r for r in results}


def _drain(engine: Engine) -> list[Result]:
    results = []
    while engine.num_unfinished:
        results += engine.step()
    return results


@pytest.mark.parametrize("max_batch", [1, 3, 8, 32])
def test_captions_of_the_oracle(oracle_dam: Dam, max_batch: int) -> None:
    requests, cases = _oracle_requests()
    engine = TorchEngine(oracle_dam, max_batch=max_batch)
    for result, case in zip(engine.generate(requests), cases, strict=True):
        tokens = case["tokens"].tolist()
        assert list(result.token_ids) == [t for t in tokens if t != 2]
        assert result.text == str(case["text"])
        assert result.finish_reason == ("stop" if tokens[-1] == 2 else "length")
        logprobs = torch.log_softmax(torch.from_numpy(case["step_logits"]), -1)
        expected = logprobs[range(len(tokens)), tokens].mean().item()
        assert result.mean_logprob == pytest.approx(expected, abs=1e-5)
        assert result.num_prompt_tokens == len(case["inputs_embeds_rows"])
        assert result.num_image_tokens == 16 * len(case["is_cimage"])
    assert isinstance(engine, Engine)
    assert engine.stats.num_requests == 8
    assert engine.stats.num_new_tokens == sum(len(c["tokens"]) for c in cases)
    assert min(engine.stats.vision_s, engine.stats.prefill_s, engine.stats.decode_s) > 0


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_the_same_captions_in_any_batch_and_order(dam: Dam, temperature: float) -> None:
    """To the last bit: the log-probabilities too."""
    requests = _requests(40, temperature=temperature, top_p=0.9)
    alone = _by_id(TorchEngine(dam, max_batch=1).generate(requests))
    assert len({r.text for r in alone.values()}) > 30
    orders = np.random.default_rng(1)
    for max_batch in (3, 8, 32):
        shuffled = [requests[i] for i in orders.permutation(40)]
        engine = TorchEngine(dam, max_batch=max_batch, vision_batch=5, prefill_tokens=300)
        results = engine.generate(shuffled)
        assert [r.request_id for r in results] == [r.request_id for r in shuffled]
        assert _by_id(results) == alone


def test_requests_that_arrive_while_others_run(dam: Dam) -> None:
    requests = _requests(12)
    expected = _by_id(TorchEngine(dam, max_batch=4).generate(requests))
    engine, results = TorchEngine(dam, max_batch=4), []
    for request in requests:
        engine.submit([request])
        results += engine.step()
    assert engine.num_unfinished == 12 - len(results)
    assert _by_id([*results, *_drain(engine)]) == expected
    assert engine.num_unfinished == 0 and engine.step() == []


def test_the_seed_decides_a_sample_and_nothing_else_does(dam: Dam) -> None:
    request = _requests(1, temperature=1.0, max_new_tokens=20, seed=5)[0]
    others = _requests(6, temperature=1.0, max_new_tokens=20)
    texts = set()
    for company in (others[1:], others[3:5], []):
        engine = TorchEngine(dam, max_batch=4)
        texts.add(_by_id(engine.generate([*company, request]))[request.request_id].text)
    assert len(texts) == 1
    again = replace(request, sampling=replace(request.sampling, seed=6))
    assert TorchEngine(dam).generate([again])[0].text not in texts


def test_samples_follow_the_models_distribution(dam: Dam) -> None:
    """First tokens of many seeds against the softmax of the plain network's logits."""
    request = _requests(1)[0]
    with torch.inference_mode():
        tokens = dam.encode(torch.from_numpy(request.views_N8SS))
        rows = dam.merge(dam.tokenizer.encode_prompt(request.query), tokens)
        chances = dam.llm.logits(dam.llm(rows[None])[0][0, -1]).div(0.7).softmax(-1).numpy()
    num = 1500
    many = [
        replace(request, request_id=str(i), sampling=Sampling(max_new_tokens=1, temperature=0.7, seed=i))
        for i in range(num)
    ]
    counts = np.bincount([r.token_ids[0] for r in TorchEngine(dam, eos_ids=()).generate(many)], minlength=1000)
    likely = chances > 5 / num
    deviation = (counts[likely] - num * chances[likely]) / np.sqrt(num * chances[likely])
    assert likely.sum() >= 5 and np.abs(deviation).max() < 4.5
    assert counts[~likely].sum() == pytest.approx(num * chances[~likely].sum(), abs=4.5 * math.sqrt(num * 0.5))


def test_the_mean_logprob_is_before_temperature(dam: Dam) -> None:
    request = _requests(1, temperature=3.0, max_new_tokens=1, seed=1)[0]
    result = TorchEngine(dam, eos_ids=()).generate([request])[0]
    with torch.inference_mode():
        tokens = dam.encode(torch.from_numpy(request.views_N8SS))
        hidden, _ = dam.llm(dam.merge(dam.tokenizer.encode_prompt(request.query), tokens)[None])
        logprobs = dam.llm.logits(hidden[0, -1]).log_softmax(-1)
    assert result.mean_logprob == pytest.approx(logprobs[result.token_ids[0]].item(), abs=1e-4)


def test_any_of_several_end_tokens_ends_a_caption(dam: Dam) -> None:
    request = _requests(1, max_new_tokens=12)[0]
    free = TorchEngine(dam, eos_ids=()).generate([request])[0]
    assert free.finish_reason == "length" and len(free.token_ids) == 12
    ends = free.token_ids[4]
    first = free.token_ids.index(ends)
    stopped = TorchEngine(dam, eos_ids=(2, 999, ends)).generate([request])[0]
    assert stopped.finish_reason == "stop" and stopped.token_ids == free.token_ids[:first]


def test_a_stop_string_ends_a_caption_before_it(dam: Dam) -> None:
    request = _requests(1, max_new_tokens=25)[0]
    free = TorchEngine(dam, eos_ids=()).generate([request])[0]
    stop = free.text[10:14]
    request = replace(request, sampling=replace(request.sampling, stop=("never there", stop)))
    stopped = TorchEngine(dam, eos_ids=()).generate([request])[0]
    assert stopped.finish_reason == "stop"
    assert stopped.text == free.text[: free.text.index(stop)].strip()
    assert len(stopped.token_ids) < len(free.token_ids)


def test_a_stream_joined_is_the_caption(dam: Dam) -> None:
    for request in _requests(6, max_new_tokens=20):
        engine = TorchEngine(dam)
        deltas = list(engine.stream(request))
        result = TorchEngine(dam).generate([request])[0]
        assert "".join(d.text for d in deltas) == result.text
        assert deltas[-1].result == result and all(d.result is None for d in deltas[:-1])
        assert len(deltas) > 2 and engine.num_unfinished == 0


def test_a_stream_beside_other_requests_loses_none(dam: Dam) -> None:
    requests = _requests(5)
    expected = _by_id(TorchEngine(dam).generate(requests))
    engine = TorchEngine(dam, max_batch=3)
    engine.submit(requests[1:])
    last = list(engine.stream(requests[0]))[-1]
    assert last.result is not None
    assert _by_id([last.result, *_drain(engine)]) == expected


def test_closing_a_stream_cancels_its_request(dam: Dam) -> None:
    engine = TorchEngine(dam, eos_ids=())
    stream = engine.stream(_requests(1, max_new_tokens=300)[0])
    next(stream)
    assert engine.num_unfinished == 1
    stream.close()
    assert engine.num_unfinished == 0 and engine.step() == []


def test_cancelled_requests_leave_the_others_alone(dam: Dam) -> None:
    """Cancelled while waiting, while decoding, and when finished."""
    requests = _requests(9)
    expected = _by_id(TorchEngine(dam).generate(requests))
    engine = TorchEngine(dam, max_batch=4)
    engine.submit(requests)
    results = [*engine.step(), *engine.step()]
    for name in ("r0", "r2", "r8", "unknown"):
        engine.cancel(name)
    results += _drain(engine)
    gone = {"r0", "r2", "r8"} - {r.request_id for r in results}
    assert _by_id(results) == {n: r for n, r in expected.items() if n not in gone} and len(gone) >= 2
    engine.submit(requests[:1])  # the name is free again
    assert _drain(engine) == [expected["r0"]]


def test_requests_that_cannot_be_served_say_why(dam: Dam) -> None:
    good = _requests(3)
    views = random_views(1, CONFIG.view_size)
    bad = {
        "long": Request(request_id="long", views_N8SS=views, query=QUERY + " and more" * 400),
        "no place": Request(request_id="no place", views_N8SS=views, query="Describe it."),
        "two places": Request(request_id="two places", views_N8SS=views, query=VIDEO),
        "size": Request(request_id="size", views_N8SS=views[:, :, :64, :64].copy(), query=QUERY),
        "none": Request(request_id="none", views_N8SS=views[:0], query=QUERY),
    }
    engine = TorchEngine(dam, max_batch=2)
    results = _by_id(engine.generate([*good, *bad.values()]))
    assert {name: results[name].reason for name in bad} == {
        name: Reason.PROMPT_TOO_LONG if name == "long" else Reason.ENGINE_ERROR for name in bad
    }
    for name in bad:
        assert results[name].finish_reason == "error" and results[name].text == "" and results[name].detail
    assert all(results[r.request_id].finish_reason in ("stop", "length") for r in good)


def test_a_caption_ends_where_the_context_does(dam: Dam) -> None:
    """400 positions in this model; the rest is cut, not the prompt."""
    request = Request(
        request_id="a", views_N8SS=random_views(1, 128), query=QUERY, sampling=Sampling(max_new_tokens=10_000)
    )
    result = TorchEngine(dam, eos_ids=()).generate([request])[0]
    assert result.finish_reason == "length"
    assert result.num_prompt_tokens + len(result.token_ids) == 400


def test_a_name_in_flight_cannot_be_taken(dam: Dam) -> None:
    engine = TorchEngine(dam)
    requests = _requests(2)
    engine.submit(requests)
    for again in ([requests[0]], [replace(requests[0], request_id="x"), replace(requests[1], request_id="x")]):
        with pytest.raises(ValueError, match="in flight already or repeated"):
            engine.submit(again)
    assert len(_drain(engine)) == 2


def test_weights_that_are_not_numbers_fail_the_request() -> None:
    broken = small_dam()
    broken.llm.lm_head.weight.data[7] = float("nan")
    result = TorchEngine(broken).generate(_requests(2))[0]
    assert result.finish_reason == "error" and result.reason == Reason.ENGINE_ERROR and result.token_ids == ()


class _ScarceMemory:
    """Lets a decoder run out of memory whenever more than `rows` rows are used in one call of `method`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, method: str, rows: int, on_host: bool = False) -> None:
        self.num_failures = 0
        real = getattr(Decoder, method)

        def scarce(decoder: Decoder, first: Sequence[object], *rest: object) -> torch.Tensor:
            if len(first) > rows:
                self.num_failures += 1
                if on_host:
                    np.empty(1 << 60, np.uint8)
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")
            result: torch.Tensor = real(decoder, first, *rest)
            return result

        monkeypatch.setattr(Decoder, method, scarce)


@pytest.mark.parametrize(
    ("method", "rows", "on_host"),
    [("prefill", 2, False), ("step", 3, False), ("prefill", 1, False), ("step", 1, False), ("prefill", 2, True)],
)
def test_running_out_of_memory_makes_the_batch_smaller(
    dam: Dam, monkeypatch: pytest.MonkeyPatch, method: str, rows: int, on_host: bool
) -> None:
    requests = _requests(11, max_new_tokens=9)
    expected = {n: r.text for n, r in _by_id(TorchEngine(dam).generate(requests)).items()}
    memory = _ScarceMemory(monkeypatch, method, rows, on_host)
    engine = TorchEngine(dam, max_batch=8)
    results = _by_id(engine.generate(requests))
    assert {n: r.text for n, r in results.items()} == expected
    assert engine.stats.num_out_of_memory == memory.num_failures > 0


@pytest.mark.parametrize("method", ["prefill", "step"])
def test_no_memory_at_all_fails_the_requests_one_by_one(dam: Dam, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    _ScarceMemory(monkeypatch, method, 0)
    engine = TorchEngine(dam, max_batch=4)
    results = engine.generate(_requests(5))
    assert {r.reason for r in results} == {Reason.OUT_OF_MEMORY} and engine.num_unfinished == 0


def test_other_errors_are_not_taken_for_want_of_memory(dam: Dam, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> torch.Tensor:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(Decoder, "step", broken)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        TorchEngine(dam).generate(_requests(1))


def test_bfloat16_captions_are_close_to_float32() -> None:
    """Not equal: the first tokens agree for most regions, and likelihoods are near."""
    requests = _requests(16, max_new_tokens=1)
    exact = TorchEngine(small_dam()).generate(requests)
    half = TorchEngine(small_dam().to(torch.bfloat16)).generate(requests)
    agree = sum(a.token_ids == b.token_ids for a, b in zip(exact, half, strict=True))
    assert agree >= 12


def test_a_closed_engine_refuses_work(dam: Dam) -> None:
    engine = TorchEngine(dam)
    engine.close()
    engine.close()
    with pytest.raises(ValueError, match="was closed"):
        engine.submit(_requests(1))


def test_wrong_settings_are_refused(dam: Dam) -> None:
    with pytest.raises(ValueError, match="max_batch is 0"):
        TorchEngine(dam, max_batch=0)
    assert TorchEngine(dam).max_batch >= 1


def test_an_engine_leaves_its_dam_usable() -> None:
    """The fused weights are the same memory: a changed weight shows in both."""
    dam = small_dam(small_config(llm__num_kv_heads=6))
    request = _requests(1)[0]
    before = TorchEngine(dam).generate([request])[0]
    engine = TorchEngine(dam)
    state = {name: value.clone() for name, value in dam.llm.state_dict().items()}
    dam.llm.layers()[0].self_attn.k_proj.weight.data *= 3
    assert engine.generate([request])[0].token_ids != before.token_ids
    dam.llm.load_state_dict(state)
    assert engine.generate([request])[0] == before
