"""MII's engine with torch kernels: the real scheduler, cache and ragged batches, on a CPU."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable

import numpy as np
import pytest
import torch

from meddam_core.dam.model import Dam
from meddam_core.engines.base import Engine, EngineDied, Request, Result, Sampling
from meddam_core.engines.faults import lost_device
from meddam_core.engines.mii.engine import MiiEngine
from meddam_core.records import Reason
from tests.meddam_core.engines.mii.conftest import (
    QUERY,
    VIDEO,
    grouped_dam,
    make_request,
    oracle_dam,
    reference_tokens,
)

UNEVEN = [Sampling(max_new_tokens=4 + 5 * (i % 5)) for i in range(9)]


def mixed_requests() -> list[Request]:
    requests = [make_request(i, UNEVEN[i]) for i in range(9)]
    return [*requests, make_request(20, UNEVEN[3], VIDEO, num_views=3)]


def drive(engine: MiiEngine, requests: list[Request]) -> dict[str, Result]:
    engine.submit(requests)
    results: dict[str, Result] = {}
    while engine.num_unfinished:
        results |= {r.request_id: r for r in engine.step()}
    return results


def assert_all_released(engine: MiiEngine) -> None:
    assert engine.num_unfinished == 0
    assert engine.scheduler.num_free_blocks == engine.num_blocks
    assert not engine._ragged._model.visual
    assert engine._ragged._state_manager.n_tracked_sequences == 0


@pytest.fixture(scope="module", params=[oracle_dam, grouped_dam, lambda: grouped_dam(4, heads=6, kv_heads=3, layers=2)])
def dam_and_reference(request: pytest.FixtureRequest) -> tuple[Callable[[], Dam], dict[str, list[int]]]:
    make: Callable[[], Dam] = request.param
    dam = make()
    return make, {r.request_id: reference_tokens(dam, r) for r in mixed_requests()}


# prompts hold 16 visual tokens, the video prompt 48: a budget of 7 or 24 cuts them over several forwards
@pytest.mark.parametrize("token_budget", [7, 24, 512])
@pytest.mark.parametrize("num_blocks", [16, 400])
def test_greedy_tokens_equal_one_at_a_time(
    dam_and_reference: tuple[Callable[[], Dam], dict[str, list[int]]], token_budget: int, num_blocks: int
) -> None:
    make, expected = dam_and_reference
    engine = MiiEngine(make(), token_budget=token_budget, num_blocks=num_blocks, max_sequences=8)
    results = drive(engine, mixed_requests())
    assert {name: list(result.token_ids) for name, result in results.items()} == expected
    counts = engine.scheduler.counts
    assert counts.max_tokens_per_forward <= token_budget
    if token_budget > 7:  # with 7, one prompt after the other trickles in, and there is no crowd
        assert (counts.num_preemptions > 0) == (num_blocks == 16), counts
        assert (counts.max_sequences_per_forward > 4) == (num_blocks == 400), counts
    assert_all_released(engine)
    engine.close()


def test_requests_arrive_and_leave_while_others_run() -> None:
    requests = [make_request(i, Sampling(max_new_tokens=6 + 3 * i)) for i in range(8)]
    dam = grouped_dam()
    expected = {r.request_id: reference_tokens(dam, r) for r in requests}
    engine = MiiEngine(dam, token_budget=60, num_blocks=60, max_sequences=4)
    results: dict[str, Result] = {}
    for request in requests:
        engine.submit([request])
        for _ in range(3):
            results |= {r.request_id: r for r in engine.step()}
    assert 0 < len(results) < len(requests)
    while engine.num_unfinished:
        results |= {r.request_id: r for r in engine.step()}
    assert {name: list(result.token_ids) for name, result in results.items()} == expected
    assert_all_released(engine)


@pytest.mark.parametrize("num_steps", [0, 1, 2, 3, 5, 9, 14, 30])
def test_cancel_at_any_moment_leaves_the_others_and_frees_everything(num_steps: int) -> None:
    requests = [make_request(i, Sampling(max_new_tokens=8)) for i in range(6)]
    dam = oracle_dam()
    expected = {r.request_id: reference_tokens(dam, r) for r in requests}
    engine = MiiEngine(dam, token_budget=17, num_blocks=14, max_sequences=5, startup_check=False)
    engine.submit(requests)
    results = {r.request_id: r for _ in range(num_steps) for r in engine.step()}
    for name in ("r0", "r2", "r5", "unknown", "r2"):
        engine.cancel(name)
    while engine.num_unfinished:
        results |= {r.request_id: r for r in engine.step()}
    gone = {"r0", "r2", "r5"}
    assert expected.keys() - gone <= results.keys()
    assert all(list(r.token_ids) == expected[name] for name, r in results.items())
    assert_all_released(engine)
    # the same ids can be used again
    assert list(engine.generate([requests[2]])[0].token_ids) == expected["r2"]
    assert_all_released(engine)


def test_seeded_sampling_is_the_same_in_any_batch_and_after_preemption() -> None:
    settings = [
        Sampling(max_new_tokens=50, temperature=t, top_p=p, top_k=k, seed=s)
        for t, p, k, s in ((0.2, 0.5, 0, 1), (1.0, 1.0, 0, 2), (0.8, 0.9, 20, 3), (0.0, 1.0, 0, 4), (1.5, 0.7, 0, 2))
    ]
    requests = [make_request(i, s) for i, s in enumerate(settings)]
    dam = oracle_dam()
    expected = [reference_tokens(dam, r) for r in requests]
    engine = MiiEngine(dam, token_budget=300, num_blocks=24)
    assert [list(r.token_ids) for r in engine.generate(requests)] == expected
    assert engine.scheduler.counts.num_preemptions > 0
    alone = [engine.generate([r])[0] for r in requests]
    assert [list(r.token_ids) for r in alone] == expected
    assert_all_released(engine)


def test_log_probability_finish_and_counts() -> None:
    dam = oracle_dam()
    request = make_request(1, Sampling(max_new_tokens=7, temperature=0.9, seed=5))
    tokens = reference_tokens(dam, request)
    rows = dam.merge(dam.tokenizer.encode_prompt(QUERY), dam.encode(torch.from_numpy(request.views_N8SS)))
    with torch.inference_mode():
        hidden, _ = dam.llm(torch.cat((rows, dam.llm.embed(torch.tensor(tokens))))[None])
        logprobs = torch.log_softmax(dam.llm.logits(hidden[0, len(rows) - 1 : -1]), -1)
    expected = logprobs[torch.arange(len(tokens)), torch.tensor(tokens)].mean()
    engine = MiiEngine(dam)
    result = engine.generate([request])[0]
    assert result.mean_logprob == pytest.approx(float(expected), abs=1e-4)
    assert (result.finish_reason, result.num_image_tokens, result.num_prompt_tokens) == ("length", 16, len(rows))
    assert engine.stats.num_new_tokens == 7
    assert engine.stats.num_prompt_tokens == len(rows)


def test_stop_strings_and_end_ids() -> None:
    whole = MiiEngine(oracle_dam()).generate([make_request(3)])[0]
    assert len(whole.text) > 6
    stop = whole.text[3:5]
    engine = MiiEngine(oracle_dam())
    stopped = engine.generate([make_request(3, Sampling(max_new_tokens=16, stop=("never", stop)))])[0]
    assert stopped.finish_reason == "stop"
    assert stopped.text == whole.text[: whole.text.index(stop)].strip()
    assert_all_released(engine)
    engine = MiiEngine(oracle_dam(), eos_ids={2, whole.token_ids[4]})
    ended = engine.generate([make_request(3)])[0]
    assert ended.finish_reason == "stop"
    assert ended.token_ids == whole.token_ids[: whole.token_ids.index(whole.token_ids[4])]
    assert_all_released(engine)


def test_stream_gives_the_text_in_pieces_beside_other_requests() -> None:
    requests = [make_request(i, Sampling(max_new_tokens=12)) for i in range(3)]
    engine = MiiEngine(oracle_dam(), token_budget=40)
    expected = {r.request_id: r.text for r in engine.generate(requests)}
    engine.submit(requests[1:])
    pieces = list(engine.stream(requests[0]))
    assert len(pieces) > 4
    assert "".join(p.text for p in pieces) == expected["r0"]
    assert [p.result is not None for p in pieces] == [False] * (len(pieces) - 1) + [True]
    others: dict[str, Result] = {}
    while engine.num_unfinished:
        others |= {r.request_id: r for r in engine.step()}
    assert {name: r.text for name, r in others.items()} == {k: expected[k] for k in ("r1", "r2")}
    assert_all_released(engine)


def test_closing_a_stream_cancels_its_request() -> None:
    engine = MiiEngine(oracle_dam(), token_budget=64)
    stream = engine.stream(make_request(0, Sampling(max_new_tokens=200)))
    next(stream)
    assert engine.num_unfinished == 1
    stream.close()
    assert_all_released(engine)


def test_requests_that_cannot_be_served_are_refused_and_sink_nobody() -> None:
    engine = MiiEngine(grouped_dam(), num_blocks=12, token_budget=64)
    good = make_request(0, Sampling(max_new_tokens=5))
    small = np.zeros((1, 8, 20, 20), np.uint8)
    bad = [
        make_request(1, Sampling(max_new_tokens=200)),
        make_request(2, query="<image>" + "word " * 600),
        make_request(3, query="no place"),
        make_request(4, num_views=2),
        Request(request_id="r5", views_N8SS=small, query=QUERY),
    ]
    results = drive(engine, [good, *bad])
    assert results["r0"].finish_reason == "length"
    reasons = [results[r.request_id].reason for r in bad]
    assert reasons == [Reason.PROMPT_TOO_LONG] * 2 + [Reason.ENGINE_ERROR] * 3
    assert all(results[r.request_id].finish_reason == "error" and results[r.request_id].detail for r in bad)
    assert list(engine.stream(bad[2]))[-1].result == results["r3"]
    with pytest.raises(ValueError, match="in flight"):
        engine.submit([good, good])
    assert_all_released(engine)


def test_the_context_limits_a_caption() -> None:
    dam = grouped_dam()
    request = make_request(0, Sampling(max_new_tokens=10_000))
    expected = reference_tokens(dam, request)
    result = MiiEngine(dam).generate([request])[0]
    assert result.finish_reason == "length"
    assert result.num_prompt_tokens + len(result.token_ids) == 480
    assert list(result.token_ids) == expected


def test_engines_live_side_by_side_and_one_after_the_other() -> None:
    environment = dict(os.environ)
    requests = [make_request(i) for i in range(3)]
    first = MiiEngine(oracle_dam())
    expected = [r.token_ids for r in first.generate(requests)]
    second = MiiEngine(grouped_dam(), token_budget=32)
    first.submit(requests)
    second.submit(requests)
    found: dict[str, Result] = {}
    while first.num_unfinished or second.num_unfinished:
        second.step()
        found |= {r.request_id: r for r in first.step()}
    assert [found[r.request_id].token_ids for r in requests] == expected
    first.close()
    assert second.generate(requests)
    second.close()
    assert [r.token_ids for r in MiiEngine(oracle_dam()).generate(requests)] == expected
    assert dict(os.environ) == environment
    assert not torch.distributed.is_initialized()


def test_weights_are_handed_over_and_not_kept_twice() -> None:
    dam = grouped_dam()
    before = sum(p.numel() for p in dam.llm.parameters())
    kept = MiiEngine(dam, keep_weights=True).generate([make_request(0)])[0]
    assert sum(p.numel() for p in dam.llm.parameters()) == before
    assert MiiEngine(dam).generate([make_request(0)])[0].token_ids == kept.token_ids
    assert sum(p.numel() for p in dam.llm.parameters()) == 0
    assert sum(p.numel() for p in dam.vision_tower.parameters()) > 0


def test_close_frees_the_cache_and_ends_the_engine() -> None:
    engine = MiiEngine(oracle_dam())
    assert isinstance(engine, Engine)
    engine.generate([make_request(0)])
    kept = [weakref.ref(engine._ragged), weakref.ref(engine._ragged._model)]
    engine.close()
    engine.close()
    assert [r() for r in kept] == [None, None]
    with pytest.raises(ValueError, match="was closed"):
        engine.submit([make_request(1)])


@pytest.mark.parametrize("largest", [40, 3])
def test_a_forward_that_does_not_fit_is_halved(largest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [make_request(i, Sampling(max_new_tokens=6)) for i in range(5)]
    dam = oracle_dam()
    expected = [reference_tokens(dam, r) for r in requests]
    engine = MiiEngine(dam, token_budget=256)
    real, sizes = engine._ragged._model.forward, []

    def forward(batch: object) -> torch.Tensor:
        sizes.append(batch.current_tokens)  # type: ignore[attr-defined]
        if sizes[-1] > largest:
            raise torch.OutOfMemoryError("not enough memory")
        logits: torch.Tensor = real(batch)
        return logits

    monkeypatch.setattr(engine._ragged._model, "forward", forward)
    assert [list(r.token_ids) for r in engine.generate(requests)] == expected
    assert 0 < sum(size > largest for size in sizes) == engine.stats.num_out_of_memory < 9
    assert_all_released(engine)


def test_views_that_do_not_fit_are_halved_and_a_hopeless_request_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    dam = oracle_dam()
    requests = [make_request(i, Sampling(max_new_tokens=4)) for i in range(5)] + [make_request(9, None, VIDEO, 3)]
    expected = [reference_tokens(dam, r) for r in requests]
    real = dam.encode

    def encode(views: torch.Tensor) -> torch.Tensor:
        if len(views) > 2:
            raise torch.OutOfMemoryError("not enough memory")
        return real(views)

    monkeypatch.setattr(dam, "encode", encode)
    engine = MiiEngine(dam)
    results = engine.generate(requests)
    assert [list(r.token_ids) for r in results[:5]] == expected[:5]
    assert (results[5].finish_reason, results[5].reason) == ("error", Reason.OUT_OF_MEMORY)
    assert engine.stats.num_out_of_memory >= 2
    assert_all_released(engine)


@pytest.mark.parametrize(
    ("error", "died"),
    [
        (RuntimeError("CUDA error: an illegal memory access was encountered"), True),
        (RuntimeError("shapes do not match"), False),
    ],
)
def test_a_lost_device_is_told_apart(error: RuntimeError, died: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = MiiEngine(oracle_dam(), startup_check=False)

    def forward(batch: object) -> torch.Tensor:
        raise error

    monkeypatch.setattr(engine._ragged._model, "forward", forward)
    with pytest.raises(RuntimeError) as caught:
        engine.generate([make_request(0)])
    assert isinstance(caught.value, EngineDied) == died
    with pytest.raises(EngineDied):
        engine.step()
    engine.cancel("r0")
    engine.close()


def test_running_out_of_memory_is_not_a_lost_device() -> None:
    assert not lost_device(torch.OutOfMemoryError("CUDA error: out of memory"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    engine = MiiEngine(grouped_dam().to(dtype), token_budget=64)
    assert engine.logit_difference is not None
    assert engine.logit_difference < 0.05
    results = engine.generate([make_request(i) for i in range(3)])
    assert all(r.finish_reason in ("length", "stop") for r in results)
