"""Every strategy makes the steps of one process over all its workers' batches, and goes on from any other's state."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from meddam_core.training.deepspeed_zero import engine_config
from meddam_core.training.strategies import FullyShard, Strategy
from meddam_core.training.trainer import Settings
from tests.meddam_core.training.made import small_dam
from tests.meddam_core.training.worker_steps import (
    NUM_STEPS,
    NUM_WORKERS,
    SAVED_AFTER,
    SETTINGS,
    micro_batches,
    trainer_of,
)

ALL = ("ddp", "zero1", "fsdp", "zero2", "zero3")
ROUNDING = 2e-5
"""Of a loss of about 10, whose sums are taken in another order."""


def together(folder: Path, names: Sequence[str]) -> dict[str, Any]:
    """What two processes found (see worker_steps)."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    module = "tests.meddam_core.training.worker_steps"
    workers = [
        subprocess.Popen(
            [sys.executable, "-m", module, str(rank), port, str(folder), *names],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(NUM_WORKERS)
    ]  # fmt: skip
    try:
        outputs = [w.communicate(timeout=3000)[0] for w in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [w.returncode for w in workers] == [0] * NUM_WORKERS, "\n".join(outputs)[-4000:]
    found: dict[str, Any] = json.loads((folder / "found.json").read_text())
    return found


def alone(settings: Settings = SETTINGS, mode: str = "full", num_steps: int = NUM_STEPS) -> tuple[list[float], Any]:
    """Losses and trainer of one process that is given both workers' micro-batches."""
    trainer = trainer_of(Strategy(), settings, mode)
    return [
        trainer.train_step([b for rank in range(NUM_WORKERS) for b in micro_batches(trainer.dam, s, rank)])
        for s in range(num_steps)
    ], trainer


def check(found: dict[str, Any], folder: Path, names: Sequence[str]) -> None:
    losses, trainer = alone()
    sums = {n: float(w.double().sum()) for n, w in trainer.weights()}
    shapes = {n: p.shape for n, p in trainer.trained_parameters().items()}
    for name, then in zip(names, [*names[1:], names[0]], strict=True):
        assert found[name] == pytest.approx(losses, abs=ROUNDING), name
        assert found[f"{name} then {then}"] == pytest.approx(losses[SAVED_AFTER:], abs=ROUNDING), (name, then)
        assert found[f"{name} weights"] == pytest.approx(sums, abs=1e-3), name
        state = torch.load(folder / f"{name}.pt", weights_only=True)
        assert state["step"] == SAVED_AFTER and {k: v.shape for k, v in state["weights"].items()} == shapes
        resumed = torch.load(folder / f"{name}-{then}.pt", weights_only=True)
        assert resumed["step"] == NUM_STEPS and {float(m["step"]) for m in resumed["moments"].values()} == {NUM_STEPS}
        plain = trainer_of(Strategy())
        plain.load_state((folder / f"{name}.pt").read_bytes())  # one process goes on from it, too
        given = [b for rank in range(NUM_WORKERS) for b in micro_batches(plain.dam, SAVED_AFTER, rank)]
        assert plain.train_step(given) == pytest.approx(losses[SAVED_AFTER], abs=ROUNDING), name


@pytest.fixture
def a_group_of_one(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_shares_of_one_are_gathered_dealt_and_learnt_from(a_group_of_one: None) -> None:
    """The short form, without processes: the same steps, and states that either strategy reads."""
    given = micro_batches(small_dam(), 0, 0)
    plain, shared = trainer_of(Strategy()), trainer_of(FullyShard(1))
    assert [shared.train_step(given) for _ in range(2)] == pytest.approx(
        [plain.train_step(given) for _ in range(2)], abs=ROUNDING
    )
    first, second = trainer_of(Strategy()), trainer_of(FullyShard(1))
    first.load_state(shared.state())
    second.load_state(plain.state())
    assert [t.train_step(given) for t in (first, second)] == pytest.approx([plain.train_step(given)] * 2, abs=ROUNDING)


@pytest.mark.slow
def test_two_workers_that_share_all_learn_as_one(tmp_path: Path) -> None:
    check(together(tmp_path, ["fsdp"]), tmp_path, ["fsdp"])


@pytest.mark.slow
def test_all_strategies_learn_as_one_and_read_each_others_states(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    found = together(tmp_path, ALL)
    check(found, tmp_path, ALL)
    rounded, _ = alone(
        Settings(schedule=SETTINGS.schedule, checkpointing=True, autocast=torch.bfloat16), "lora", num_steps=2
    )
    for name in ALL:  # stage 3 multiplies by a function of its own, which rounds bfloat16 elsewhere
        assert found[f"{name} lora"] == pytest.approx(rounded, abs=0.02), name


def test_deepspeed_is_told_what_the_trainer_does() -> None:
    config = engine_config(3, num_workers=4, num_micro_batches=2, max_grad_norm=0.5)
    assert config["zero_optimization"]["stage"] == 3 and config["gradient_clipping"] == 0.5
    assert config["train_batch_size"] == 8 and "bf16" not in config


def test_an_earlier_state_is_still_read() -> None:
    _, trainer = alone(num_steps=2)
    import io

    state = torch.load(io.BytesIO(trainer.state()), weights_only=True)
    old = {"version": 1, "step": 2, "num_shown": state["num_shown"], "weights": state["weights"],
           "optimizer": trainer.strategy.optimizer.state_dict()}  # fmt: skip
    sink = io.BytesIO()
    torch.save(old, sink)
    again = trainer_of(Strategy())
    again.load_state(sink.getvalue())
    given = micro_batches(again.dam, 2, 0)
    assert again.train_step(given) == trainer.train_step(given)
