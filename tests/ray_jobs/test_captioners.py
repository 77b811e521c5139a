"""How a run finds out what its workers caption with, on a cluster that has no room for it yet."""

from __future__ import annotations

import logging
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from ray_jobs import captioners
from ray_jobs.caption_config import Config

MODEL = "tests/data/oracle/dam_tiny/checkpoint"


def test_a_full_cluster_is_waited_for_and_the_wait_is_told(
    ray_session: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A driver on a cluster whose nodes are dead or not yet there seemed to hang."""
    import ray

    monkeypatch.setattr(captioners, "SAY_EVERY_S", 0.1)
    caplog.set_level(logging.INFO, captioners.__name__)
    holder = ray.remote(_Holder).options(num_cpus=2).remote()
    ray.get(holder.ready.remote())
    cfg = Config(shards=("set",), out="run", model=MODEL, engine="torch")
    with ThreadPoolExecutor(1) as pool:
        spec = pool.submit(captioners.resolve, cfg, (), None)
        deadline = time.monotonic() + 60
        while "waiting for a worker" not in caplog.text and time.monotonic() < deadline:
            time.sleep(0.05)
        ray.kill(holder)
        assert spec.result(timeout=120).facts == {"engine": "torch", "kernels": "torch", "dtype": "float32"}
    assert "needs 0.25 CPU, 0 GPU; free in the cluster: 0 CPU" in caplog.text


class _Holder:
    def ready(self) -> None:
        pass
