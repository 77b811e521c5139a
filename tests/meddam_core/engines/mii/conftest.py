"""DAMs and requests of the MII tests, and captions computed one at a time to compare with."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from meddam_core.dam.checkpoint import load_dam, random_dam
from meddam_core.dam.config import read_config
from meddam_core.dam.model import Dam
from meddam_core.dam.tokens import read_tokenizer
from meddam_core.engines.admission import admit
from meddam_core.engines.base import Request, Sampling
from meddam_core.engines.sampling import choose_tokens

HAS_MII = all(importlib.util.find_spec(name) is not None for name in ("deepspeed", "mii"))
collect_ignore_glob = [] if HAS_MII else ["test_*.py"]

CHECKPOINT = Path(__file__).parents[3] / "data" / "oracle" / "dam_tiny" / "checkpoint"
QUERY = "<image>\nDescribe the masked region in detail."
VIDEO = "Video: " + "<image>" * 3 + "\nDescribe it."


def pytest_report_header() -> str | None:
    return None if HAS_MII else "meddam_core/engines/mii: NOT TESTED, the mii extra is not installed"


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


def oracle_dam() -> Dam:
    """The oracle's checkpoint: 4 heads, no grouping."""
    return load_dam(CHECKPOINT)


def grouped_dam(seed: int = 3, *, heads: int = 8, kv_heads: int = 2, layers: int = 3, head_dim: int = 16) -> Dam:
    """Random weights with grouped-query attention; embedding and output layer are one where the seed is even."""
    config = read_config(CHECKPOINT)
    llm = replace(
        config.llm, hidden_size=heads * head_dim, num_heads=heads, num_kv_heads=kv_heads, num_layers=layers,
        intermediate_size=5 * head_dim * heads // 2, rope_theta=50000.0, rms_norm_eps=1e-6,
        tie_word_embeddings=seed % 2 == 0, max_position_embeddings=512, tokenizer_model_max_length=480,
    )  # fmt: skip
    return random_dam(replace(config, llm=llm), seed, read_tokenizer(CHECKPOINT / "llm"))


def make_request(number: int, sampling: Sampling | None = None, query: str = QUERY, num_views: int = 1) -> Request:
    """Request number `number`; its views are random, the same in every call."""
    views = np.random.default_rng(number).integers(0, 256, (num_views, 8, 112, 112), dtype=np.uint8)
    return Request(
        request_id=f"r{number}", views_N8SS=views, query=query, sampling=sampling or Sampling(max_new_tokens=16)
    )


@torch.inference_mode()
def reference_tokens(dam: Dam, request: Request) -> list[int]:
    """The request's tokens by the plain network, one sequence at a time."""
    prompt = admit(request, dam.config, dam.tokenizer)
    tokens_NTD = dam.encode(torch.from_numpy(request.views_N8SS))
    rows = dam.merge(dam.tokenizer.encode_prompt(request.query), tokens_NTD)
    tokens: list[int] = []
    past = None
    while len(tokens) < prompt.num_new_tokens:
        hidden, past = dam.llm(rows[None], past)
        token = choose_tokens(dam.llm.logits(hidden[0, -1:]), [request.sampling], [len(tokens)]).token_ids[0]
        if token in dam.config.llm.eos_token_ids:
            break
        tokens.append(token)
        rows = dam.llm.embed(torch.tensor([token]))
    return tokens
