"""Two processes that share a language model, on a CPU over gloo."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys

import pytest

from meddam_core.engines.base import Sampling
from meddam_core.engines.mii.engine import MiiEngine
from tests.meddam_core.engines.mii.conftest import grouped_dam, make_request

RANK = """
import os, json, torch
torch.set_num_threads(1)
from meddam_core.engines.mii.engine import MiiEngine
from meddam_core.engines.mii.follower import follow
from tests.meddam_core.engines.mii.test_tensor_parallel import the_dam, the_requests
if os.environ["RANK"] == "0":
    engine = MiiEngine(the_dam(), tp_size=2, token_budget=200, num_blocks=20)
    found = [r.token_ids for r in engine.generate(the_requests())]
    assert engine.scheduler.counts.num_preemptions > 0
    assert engine.scheduler.num_free_blocks == engine.num_blocks
    engine.close()
    print(json.dumps([engine.logit_difference, found]), flush=True)
else:
    follow(the_dam(), tp_size=2)
assert not torch.distributed.is_initialized()
"""


def the_dam():  # type: ignore[no-untyped-def]
    """Every layer can be cut in two: 8 heads, 4 key-value heads, an MLP of 320, a vocabulary of 1000."""
    return grouped_dam(5, heads=8, kv_heads=4, layers=2)


def the_requests():  # type: ignore[no-untyped-def]
    return [make_request(i, Sampling(max_new_tokens=26, temperature=0.5 * (i % 2), seed=i)) for i in range(3)]


@pytest.mark.slow
def test_two_ranks_make_the_captions_of_one() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = dict(os.environ, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE="2", LOCAL_SIZE="2")
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK],
            stdout=subprocess.PIPE,
            text=True,
            env=dict(environment, RANK=str(rank), LOCAL_RANK=str(rank)),
        )
        for rank in range(2)
    ]
    try:
        printed = [ranks[0].communicate(timeout=600)[0]]
        assert ranks[0].returncode == 0  # otherwise the other would wait for it
        printed.append(ranks[1].communicate(timeout=60)[0])
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0]
    difference, found = json.loads(printed[0])
    assert difference < 1e-4
    engine = MiiEngine(the_dam())
    assert found == [list(r.token_ids) for r in engine.generate(the_requests())]


def test_it_says_how_to_start(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match="start with torchrun"):
        MiiEngine(the_dam(), tp_size=2)
