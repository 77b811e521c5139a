"""On a GPU: the compiled kernels against torch. `pytest -m gpu tests/meddam_core/engines/mii/test_gpu.py`

The first run builds the kernels (minutes); they are kept in $MEDDAM_OPS_CACHE or a folder under the temporary one.
"""

from __future__ import annotations

import gc
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from meddam_core.dam.checkpoint import random_dam
from meddam_core.dam.config import DamConfig, read_config
from meddam_core.dam.documents import DAM_3B
from meddam_core.dam.model import Dam
from meddam_core.dam.tokens import read_tokenizer
from meddam_core.engines.base import Request, Sampling
from meddam_core.engines.mii.engine import MiiEngine
from meddam_core.engines.torch_engine import TorchEngine
from tests.meddam_core.engines.mii.conftest import CHECKPOINT, QUERY, make_request

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]

LOGIT_BOUND = 0.03
"""Largest relative difference of the logits of a position, ||kernels - torch|| / ||torch - mean||, in bfloat16."""
NEAR_TIE = 0.1
"""Two captions may part where the two likeliest tokens are this close, in standard deviations of the logits. Rounding
in bfloat16 moves a logit by 0.01 to 0.03 of them (measured on a CPU, 4 and 12 layers)."""


def gpu_dam(dtype: torch.dtype, *, heads: int = 8, kv_heads: int = 8, layers: int = 4, eps: float = 1e-5) -> Dam:
    """Random weights with heads of 128 over the oracle's vision dimensions."""
    config = read_config(CHECKPOINT)
    llm = replace(
        config.llm, hidden_size=heads * 128, num_heads=heads, num_kv_heads=kv_heads, num_layers=layers,
        intermediate_size=heads * 256, rms_norm_eps=eps, max_position_embeddings=1024, tokenizer_model_max_length=1024,
    )  # fmt: skip
    return random_dam(replace(config, llm=llm), 1, read_tokenizer(CHECKPOINT / "llm"), device="cuda", dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "kv_heads", "eps"), [(8, 8, 1e-5), (8, 2, 1e-6), (8, 1, 1e-5)])
def test_compiled_kernels_load_and_their_logits_agree(
    dtype: torch.dtype, heads: int, kv_heads: int, eps: float
) -> None:
    engine = MiiEngine(gpu_dam(dtype, heads=heads, kv_heads=kv_heads, eps=eps), kernels="cuda")
    assert engine.kernels == "cuda"
    assert engine.logit_difference is not None
    assert engine.logit_difference <= LOGIT_BOUND
    engine.close()


@pytest.mark.parametrize("kernels", ["cuda", "torch"])
@pytest.mark.parametrize(("token_budget", "max_sequences"), [(160, 16), (2048, 64)])
def test_captions_part_only_at_near_ties(kernels: str, token_budget: int, max_sequences: int) -> None:
    """Greedy captions equal the torch engine's in bfloat16 up to the first place where two tokens are as likely."""
    requests = [make_request(i, Sampling(max_new_tokens=40)) for i in range(24)]
    dam = gpu_dam(torch.bfloat16)
    engine = MiiEngine(
        dam, kernels=kernels, token_budget=token_budget, max_sequences=max_sequences, keep_weights=True, eos_ids=()
    )
    found = engine.generate(requests)
    assert engine.scheduler.num_free_blocks == engine.num_blocks
    engine.close()
    expected = TorchEngine(dam, eos_ids=()).generate(requests)
    for request, mine, theirs in zip(requests, found, expected, strict=True):
        parting = next(
            (i for i, (a, b) in enumerate(zip(mine.token_ids, theirs.token_ids, strict=False)) if a != b), None
        )
        if parting is not None:
            assert top_two_gap(dam, request, theirs.token_ids[:parting]) < NEAR_TIE


@torch.inference_mode()
def top_two_gap(dam: Dam, request: Request, tokens: tuple[int, ...]) -> float:
    """How far apart the two likeliest next tokens are after a prompt and these tokens, in deviations of the logits."""
    visual = dam.encode(torch.from_numpy(request.views_N8SS))
    rows = dam.merge(dam.tokenizer.encode_prompt(request.query), visual)
    rows = torch.cat((rows, dam.llm.embed(torch.tensor(tokens, device="cuda", dtype=torch.int64))))
    logits = dam.llm.logits(dam.llm(rows[None])[0][0, -1])
    best = logits.topk(2).values
    return float((best[0] - best[1]) / logits.std())


def test_float32_with_torch_kernels_equals_the_torch_engine() -> None:
    requests = [make_request(i, Sampling(max_new_tokens=20, temperature=0.5 * (i % 2), seed=i)) for i in range(12)]
    dam = gpu_dam(torch.float32, kv_heads=4)
    engine = MiiEngine(dam, kernels="torch", token_budget=96, keep_weights=True)
    found = [r.token_ids for r in engine.generate(requests)]
    engine.close()
    assert found == [r.token_ids for r in TorchEngine(dam).generate(requests)]


def test_close_gives_the_memory_back() -> None:
    MiiEngine(gpu_dam(torch.bfloat16), kernels="cuda").close()
    gc.collect()
    before = torch.cuda.memory_allocated()
    for _ in range(2):
        engine = MiiEngine(gpu_dam(torch.bfloat16), kernels="cuda", cache_bytes=1 << 30)
        engine.generate([make_request(i) for i in range(4)])
        assert torch.cuda.memory_allocated() > before + (1 << 29)
        engine.close()
        del engine
        gc.collect()
    assert torch.cuda.memory_allocated() <= before + (1 << 20)


def test_a_dead_context_is_recognised() -> None:
    """In a process of its own, which does not outlive it."""
    code = (
        "import torch\n"
        "from meddam_core.engines.base import EngineDied\n"
        "from tests.meddam_core.engines.mii.test_gpu import gpu_dam, make_request\n"
        "from meddam_core.engines.mii.engine import MiiEngine\n"
        "engine = MiiEngine(gpu_dam(torch.bfloat16), kernels='cuda')\n"
        "engine.submit([make_request(0)])\n"
        "torch.zeros(4, device='cuda')[torch.tensor([10 ** 6], device='cuda')]  # a device-side assertion\n"
        "try:\n"
        "    while engine.num_unfinished: engine.step()\n"
        "except EngineDied:\n"
        "    raise SystemExit(17)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=300).returncode == 17


def test_forty_times_the_one_at_a_time_loop() -> None:
    """DAM-3B's dimensions with random weights, 128 new tokens a region, against the plain network one at a time.

    The figures for the log come from benchmarks/engine.py; this holds the floor.
    """
    tokens, num = 128, 512
    dam = random_dam(DAM_3B, 0, padded_tokenizer(DAM_3B), device="cuda", dtype=torch.bfloat16)
    views = np.random.default_rng(0).integers(0, 256, (16, 1, 8, 384, 384), dtype=np.uint8)
    requests = [
        Request(request_id=str(i), views_N8SS=views[i % 16], query=QUERY, sampling=Sampling(max_new_tokens=tokens))
        for i in range(num)
    ]
    alone = time_one_at_a_time(dam, requests[:2], tokens)
    engine = MiiEngine(dam, kernels="cuda", eos_ids=())
    engine.generate(requests[:64])
    started = time.perf_counter()
    engine.generate(requests)
    rate = num / (time.perf_counter() - started)
    print(f"{rate:.1f} regions/s, one at a time {1 / alone:.2f}")
    assert rate * alone >= 40


@torch.inference_mode()
def time_one_at_a_time(dam: Dam, requests: list[Request], tokens: int) -> float:
    """Seconds a region: prefill, then one token at a time with cached keys and values; the better of the requests."""
    times = []
    for request in requests:
        torch.cuda.synchronize()
        started = time.perf_counter()
        visual = dam.encode(torch.from_numpy(request.views_N8SS))
        rows, past = dam.merge(dam.tokenizer.encode_prompt(request.query), visual), None
        for _ in range(tokens):
            hidden, past = dam.llm(rows[None], past)
            rows = dam.llm.embed(dam.llm.logits(hidden[0, -1:]).argmax(-1))
        torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return min(times)


def padded_tokenizer(config: DamConfig):  # type: ignore[no-untyped-def]
    """The oracle's tokenizer with as many pieces as the model's vocabulary; no text contains the added ones."""
    from sentencepiece import sentencepiece_model_pb2

    from meddam_core.dam.tokens import Tokenizer

    small = read_tokenizer(CHECKPOINT / "llm")
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(small.files["tokenizer.model"])
    for number in range(config.llm.vocab_size - len(proto.pieces)):
        proto.pieces.add(piece=f"\u2045{number}\u2046", score=-1e6)
    return Tokenizer({**small.files, "tokenizer.model": proto.SerializeToString()})
