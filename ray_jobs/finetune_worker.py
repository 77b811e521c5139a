"""One worker of a training run: the same function runs alone in the driver's process and in each Ray Train worker.

    train(spec, World())                                  # plain, without Ray

A worker reads its share of the files (through Ray Data where Ray is there), makes steps with meddam_core.training, and
worker 0 writes: `checkpoints/step-000100.pt`, each whole or not at all, `curve.json`, and at the end `model/`, the
official layout. Whatever dies, the run goes on from the last checkpoint, with the batches it would have seen.
"""

from __future__ import annotations

import json
import logging
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meddam_core import storage
from meddam_core.training.order import File, Reading, dealt, readings, share
from ray_jobs.finetune_config import Config

if TYPE_CHECKING:
    from meddam_core.training.labels import LabelSet
    from meddam_core.training.strategies import Strategy

logger = logging.getLogger(__name__)

CHECKPOINTS, CURVE, MODEL = "checkpoints", "curve.json", "model"


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """What a worker is to do."""

    cfg: Config
    files: tuple[File, ...]
    size: int
    """Side of the views, pixels."""
    caption_files: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """A worker's place among the others; alone by default."""

    rank: int = 0
    num_workers: int = 1
    device: str = "cpu"
    read: Callable[[Iterator[Reading], Spec], Iterator[tuple[Reading, list[Any]]]] | None = None
    """How windows are read; by default in this process."""
    report: Callable[[dict[str, float]], None] = field(default=lambda metrics: None)


def train(spec: Spec, world: World) -> dict[str, Any]:
    """Trains to the last step, from the last checkpoint if there is one. Returns the last figures.

    Raises ValueError for settings that do not fit the data or the model, FloatingPointError where training diverges.
    """
    import torch

    cfg = spec.cfg
    if cfg.num_threads is not None:
        torch.set_num_threads(cfg.num_threads)
    dam = _start_model(spec, world)
    trainer = _make_trainer(dam, cfg, world)
    curve = _resume(trainer, cfg)
    collate = _collator(dam, spec)
    losses: list[float] = []
    started = time.monotonic()
    batches = _batches(spec, world, trainer.step * cfg.accumulate)
    while trainer.step < cfg.max_steps:
        micro = [next(batches) for _ in range(cfg.accumulate)]
        losses.append(trainer.train_step([collate(examples, epoch) for epoch, examples in micro]))
        last = trainer.step == cfg.max_steps
        if trainer.step % cfg.log_every == 0 or last:
            entry = {"step": trainer.step, "loss": round(sum(losses) / len(losses), 5), "epoch": micro[-1][0],
                     "seconds": round(time.monotonic() - started, 1)}  # fmt: skip
            curve.append(entry)
            losses = []
            world.report({k: float(v) for k, v in entry.items()})
            if world.rank == 0:
                logger.info("step %d of %d: loss %.3f", trainer.step, cfg.max_steps, entry["loss"])
        if cfg.eval_shards and (trainer.step % cfg.eval_every == 0 or last):
            whole = _whole(trainer, spec, world)
            if whole is not None:
                curve.append({"step": trainer.step, **_evaluated(whole, cfg)})
        if trainer.step % cfg.checkpoint_every == 0 or last:
            _checkpoint(trainer, cfg, curve, world)
    whole = _whole(trainer, spec, world)
    if whole is not None:
        _export(whole, cfg)
    return curve[-1] if curve else {}


def _start_model(spec: Spec, world: World) -> Any:
    import torch

    from meddam_core.dam.checkpoint import load_dam
    from meddam_core.training import tiny
    from meddam_core.training.adapt import adapt
    from meddam_core.training.labels import learn_labels

    cfg = spec.cfg
    if cfg.model == "tiny":
        dam = tiny.new_dam(tiny_captions(cfg), cfg.seed, open_gates=cfg.open_gates).to(world.device)
    else:
        dam = load_dam(cfg.model, device=world.device).train()
    torch.manual_seed(cfg.seed)  # of LoRA's first weights, and of heads
    adapt(dam, cfg.train, rank=cfg.lora_rank)
    if cfg.learn == "labels":
        learn_labels(dam, label_set(cfg))
    return dam


@cache
def label_set(cfg: Config) -> LabelSet:
    """What is learnt where labels are. Raises ValueError where there is nothing to learn."""
    from meddam_core.training.data import labels_of_shards
    from meddam_core.training.labels import LabelSet
    from ray_jobs.snapshot import shards_below

    uris = [o.uri for uri in cfg.shards for o in shards_below(uri)]
    return LabelSet.of(labels_of_shards(uris, cfg.split, 5000), cfg.labels)


def _whole(trainer: Any, spec: Spec, world: World) -> Any:
    """The model with all its weights, on worker 0; None on the others. Where weights are in shares it is a copy."""
    if trainer.strategy.whole:
        return trainer.dam if world.rank == 0 else None
    weights = {name: weight for name, weight in trainer.weights() if world.rank == 0}
    if world.rank != 0:
        return None
    dam = _start_model(spec, replace(world, num_workers=1))
    keys = dam.load_state_dict(weights, strict=False)
    tied = dam.config.llm.tie_word_embeddings  # a shared weight comes under one name
    assert not keys.unexpected_keys and keys.missing_keys in ([], ["llm.lm_head.weight"] if tied else [])
    return dam


def tiny_captions(cfg: Config) -> list[str]:
    """Captions of the first labelled regions, in every length: what the small model's tokenizer is made from."""
    import numpy as np

    from meddam_core.datasets.phantoms.captions import caption_of
    from meddam_core.prompts import LENGTHS
    from meddam_core.training.data import labels_of_shards
    from ray_jobs.snapshot import shards_below

    rng = np.random.default_rng(0)
    uris = [o.uri for uri in cfg.shards for o in shards_below(uri)]
    labels = [found for found in labels_of_shards(uris, cfg.split, 1500) if "kind" in found]
    if not labels:
        raise ValueError(
            "the small model learns from phantoms, and these shards hold none; use `meddam ingest phantoms`"
        )
    return [caption_of(found, rng, length) for found in labels for length in LENGTHS]


def _make_trainer(dam: Any, cfg: Config, world: World) -> Any:
    import torch

    from meddam_core.training.optim import Schedule
    from meddam_core.training.trainer import Settings, Trainer

    settings = Settings(
        schedule=Schedule(
            learning_rate=cfg.learning_rate, warmup_steps=cfg.warmup_steps, max_steps=cfg.max_steps,
            weight_decay=cfg.weight_decay, gate_scale=cfg.gate_rate,
        ),
        max_grad_norm=cfg.max_grad_norm, checkpointing=cfg.checkpointing,
        autocast=torch.bfloat16 if cfg.dtype == "bfloat16" else None,
    )  # fmt: skip
    return Trainer(dam, settings, _strategy(cfg, world.num_workers))


def _strategy(cfg: Config, num_workers: int) -> Strategy:
    from meddam_core.training.strategies import DataParallel, FullyShard, Strategy

    if num_workers == 1:
        return Strategy()  # there is nothing to share
    if cfg.strategy == "deepspeed":
        from meddam_core.training.deepspeed_zero import DeepSpeed

        return DeepSpeed(num_workers, stage=cfg.zero_stage, num_micro_batches=cfg.accumulate)
    if cfg.strategy == "fsdp":
        return FullyShard(num_workers)
    return DataParallel(num_workers, sharded=cfg.strategy == "zero1")


def _collator(dam: Any, spec: Spec) -> Any:
    from meddam_core.training.augment import Augmentation
    from meddam_core.training.batch import Collator
    from meddam_core.training.texts import Texts

    cfg = spec.cfg
    texts = Texts.of(cfg.prompts, "table" if spec.caption_files else "truth")
    return Collator(
        dam.tokenizer, dam.config.num_image_tokens, texts, Augmentation(cfg.augment), cfg.seed, swap=cfg.swap,
        look=cfg.view, max_length=dam.config.context_length,
        codes=label_set(cfg).codes if cfg.learn == "labels" else None,
    )  # fmt: skip


def _batches(spec: Spec, world: World, start: int) -> Iterator[tuple[int, list[Any]]]:
    """Endless (epoch, examples) of this worker from its batch number `start` on."""
    cfg = spec.cfg
    mine = share(spec.files, world.rank, world.num_workers)
    order = readings(mine, batch_size=cfg.batch_size, window=cfg.window, seed=cfg.seed, start=start)
    for reading, examples in (world.read or read_here)(order, spec):
        for chosen in dealt(reading, examples, cfg.batch_size, cfg.seed):
            yield reading.epoch, chosen


def read_here(order: Iterator[Reading], spec: Spec) -> Iterator[tuple[Reading, list[Any]]]:
    """Windows one after another, in this process."""
    read = reader(spec)
    for reading in order:
        yield reading, [e for file in reading.files for e in read(file)]


@cache
def _captions(uris: tuple[str, ...]) -> Any:
    """The caption table, once a process."""
    from meddam_core.training.data import CaptionTable

    return CaptionTable.read(uris)


def reader(spec: Spec) -> Callable[[File], list[Any]]:
    """What reads one file of the data."""
    from meddam_core.training.data import read_file

    captions = _captions(spec.caption_files) if spec.caption_files else None
    return partial(read_file, size=spec.size, split=spec.cfg.split, captions=captions)


# -- checkpoints ------------------------------------------------------------------------------------------------------


def checkpoints(out: str) -> list[tuple[int, str]]:
    """(step, URI) of every checkpoint, oldest first."""
    prefix = "s3://" if storage.is_s3(out) else ""
    files = storage.list_files(storage.join(out, CHECKPOINTS), ".pt")
    return [(int(f.base_name.removeprefix("step-").removesuffix(".pt")), prefix + f.path) for f in files]


def _resume(trainer: Any, cfg: Config) -> list[dict[str, Any]]:
    """Loads the last checkpoint, if there is one; returns the curve up to it."""
    found = checkpoints(cfg.out)
    if not found:
        return []
    step, uri = found[-1]
    trainer.load_state(storage.read_bytes(uri))
    logger.info("going on from step %d", step)
    where = storage.join(cfg.out, CURVE)
    curve: list[dict[str, Any]] = json.loads(storage.read_bytes(where)) if storage.exists(where) else []
    return [entry for entry in curve if entry["step"] <= step]


def _checkpoint(trainer: Any, cfg: Config, curve: Sequence[dict[str, Any]], world: World) -> None:
    document = trainer.state()  # by all workers, because some of it may be in shares
    if world.rank != 0:
        return
    storage.write_bytes(storage.join(cfg.out, CURVE), json.dumps(list(curve), indent=1).encode())
    storage.write_bytes(storage.join(cfg.out, CHECKPOINTS, f"step-{trainer.step:06d}.pt"), document)
    for _, uri in checkpoints(cfg.out)[: -cfg.keep_checkpoints]:
        storage.delete(uri)


def _export(dam: Any, cfg: Config) -> None:
    """Writes OUT/model in the official layout, ROOT/config.json last."""
    from meddam_core.dam.checkpoint import save_dam
    from meddam_core.training.adapt import merge_lora

    if cfg.train == "lora":  # what has none of it needs no peft
        merge_lora(dam)
    with tempfile.TemporaryDirectory() as folder:
        save_dam(dam, folder)
        files = sorted(p for p in Path(folder).rglob("*") if p.is_file())
        for file in sorted(files, key=lambda p: p == Path(folder) / "config.json"):
            name = file.relative_to(folder).as_posix()
            storage.write_bytes(storage.join(cfg.out, MODEL, name), file.read_bytes())


def _evaluated(dam: Any, cfg: Config) -> dict[str, float]:
    from ray_jobs.score_model import score_model

    training = dam.training
    score = score_model(dam.eval(), cfg.eval_shards, cfg.eval_regions, prompt=cfg.prompts[0], view=cfg.view)
    dam.train(training)
    logger.info("held out: MedDLC-score %.1f (strict, lexical judge)", 100 * score["average"])
    return {f"meddlc_{name}": round(value, 4) for name, value in score.items()}
