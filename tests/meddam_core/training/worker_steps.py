"""Two workers of the trainer in processes of their own, by torch alone: every strategy's losses and states, in files.

python -m tests.meddam_core.training.worker_steps RANK PORT FOLDER STRATEGY...
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from meddam_core.dam.model import Dam
from meddam_core.training.adapt import adapt
from meddam_core.training.batch import Batch
from meddam_core.training.optim import Schedule
from meddam_core.training.strategies import DataParallel, FullyShard, Strategy
from meddam_core.training.trainer import Settings, Trainer
from tests.meddam_core.training.made import collator, examples, small_dam

NUM_WORKERS, NUM_STEPS, NUM_MICRO, SAVED_AFTER = 2, 4, 2, 2
SETTINGS = Settings(schedule=Schedule(learning_rate=1e-4, warmup_steps=2, max_steps=20), max_grad_norm=0.5)
"""Gradients are longer than that, so the norm over all shares counts."""


def trainer_of(strategy: Strategy, settings: Settings = SETTINGS, mode: str = "full") -> Trainer:
    torch.manual_seed(0)
    dam = small_dam()
    adapt(dam, mode)  # type: ignore[arg-type]
    return Trainer(dam, settings, strategy)


def micro_batches(dam: Dam, step: int, rank: int) -> list[Batch]:
    """Two of one worker; worker 1's last has no crop that differs from its full view, and rows of another length."""
    shown = examples(NUM_STEPS * NUM_WORKERS * NUM_MICRO * 2, dam.config.view_size)
    first = 2 * NUM_MICRO * (step * NUM_WORKERS + rank)
    collate = collator(dam)
    found = [collate(shown[first + 2 * i : first + 2 * i + 2 - rank * i], 0) for i in range(NUM_MICRO)]
    for batch in found[rank:] if rank == 0 else []:
        batch.views_B8SS[:, 5] ^= 64  # worker 0's adapters run for all of its rows
    return found


def strategy_of(name: str) -> Strategy:
    if name.startswith("zero") and name != "zero1":
        from meddam_core.training.deepspeed_zero import DeepSpeed

        return DeepSpeed(NUM_WORKERS, stage=int(name[-1]), num_micro_batches=NUM_MICRO)  # type: ignore[arg-type]
    return FullyShard(NUM_WORKERS) if name == "fsdp" else DataParallel(NUM_WORKERS, sharded=name == "zero1")


def steps(trainer: Trainer, rank: int, first: int, last: int) -> list[float]:
    return [trainer.train_step(micro_batches(trainer.dam, s, rank)) for s in range(first, last)]


def run(rank: int, folder: Path, names: list[str]) -> dict[str, Any]:
    """Losses of each strategy, and of going on from the state that the one before it wrote."""
    found: dict[str, Any] = {}
    for name in names:
        trainer = trainer_of(strategy_of(name))
        losses = steps(trainer, rank, 0, SAVED_AFTER)
        document = trainer.state()
        if rank == 0:
            (folder / f"{name}.pt").write_bytes(document)
        losses += steps(trainer, rank, SAVED_AFTER, NUM_STEPS)
        found[name] = losses
        total = {n: float(w.double().sum()) for n, w in trainer.weights()}
        found[f"{name} weights"] = total
    torch.distributed.barrier()
    for source, name in zip(names, [*names[1:], names[0]], strict=True):
        trainer = trainer_of(strategy_of(name))
        trainer.load_state((folder / f"{source}.pt").read_bytes())
        found[f"{source} then {name}"] = steps(trainer, rank, SAVED_AFTER, NUM_STEPS)
        again = trainer.state()
        if rank == 0:
            (folder / f"{source}-{name}.pt").write_bytes(again)
    for name in names if len(names) > 1 else []:  # bfloat16, layers computed again, LoRA
        settings = Settings(schedule=SETTINGS.schedule, checkpointing=True, autocast=torch.bfloat16)
        found[f"{name} lora"] = steps(trainer_of(strategy_of(name), settings, "lora"), rank, 0, 2)
    return found


def main() -> None:
    rank, port, folder, names = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), sys.argv[4:]
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(NUM_WORKERS), MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=port)  # fmt: skip
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    found = run(rank, folder, names)
    if rank == 0:
        (folder / "found.json").write_text(json.dumps(found))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
