"""`meddam finetune`: one process and Ray Train learn the same, kills lose nothing, and the result is a checkpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from meddam_core.dam.checkpoint import load_dam
from ray_jobs import finetune
from ray_jobs.finetune_config import Config
from ray_jobs.finetune_worker import checkpoints
from tests.meddam_core.training.made import CHECKPOINT
from tests.ray_jobs.made_shards import make_shards

NUM_STEPS = 6


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """(shards, captions) of a few made pictures."""
    folder = tmp_path_factory.mktemp("finetune")
    shards = make_shards(str(folder / "set"), num_shards=2, images_per_shard=6)
    ids = [r["region_id"] for path in sorted((folder / "set").rglob("*.parquet"))
           for row in pq.read_table(path, columns=["regions"]).to_pylist() for r in row["regions"]]  # fmt: skip
    rows = [{"region_id": i, "prompt_id": "dam-default", "text": f"A square, {'light' if i % 2 else 'dark'}.",
             "status": "ok"} for i in ids]  # fmt: skip
    (folder / "captions").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), folder / "captions" / "part.parquet")
    return shards, str(folder / "captions")


def config(data: tuple[str, str], out: Path, **changed: object) -> Config:
    fields = {
        "shards": (data[0],), "captions": (data[1],), "out": str(out), "model": str(CHECKPOINT), "max_steps": NUM_STEPS,
        "batch_size": 2, "num_workers": 0, "dtype": "float32", "log_every": 1, "checkpoint_every": 2, "num_threads": 1,
        "learning_rate": 1e-3, "warmup_steps": 2, "augment": 0.0, **changed,
    }  # fmt: skip
    return Config(**fields)  # type: ignore[arg-type]


def losses(out: Path) -> list[float]:
    return [e["loss"] for e in json.loads((out / "curve.json").read_text()) if "loss" in e]


@pytest.fixture(scope="module")
def plain(data: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in one process, without Ray."""
    out = tmp_path_factory.mktemp("plain")
    summary = finetune.run(config(data, out))
    assert summary.num_steps == NUM_STEPS and summary.exit_code == 0
    return out


def test_a_plain_run_writes_a_checkpoint_that_loads(plain: Path) -> None:
    assert len(losses(plain)) == NUM_STEPS
    assert losses(plain)[-1] < losses(plain)[0]
    assert [step for step, _ in checkpoints(str(plain))] == [4, 6]
    load_dam(plain / "model")
    assert "MedDAM training report" in (plain / "report.html").read_text()
    assert json.loads((plain / "run.json").read_text())["lineage"]["images"] == ["CC0-1.0"]


def test_a_run_goes_on_from_its_last_checkpoint(data: tuple[str, str], plain: Path, tmp_path: Path) -> None:
    out = tmp_path / "killed"
    shutil.copytree(plain, out)
    (out / "checkpoints" / "step-000006.pt").unlink()  # as if it was killed between steps 4 and 6
    shutil.rmtree(out / "model")
    finetune.run(config(data, out))
    assert losses(out) == losses(plain)
    load_dam(out / "model")


def test_what_decides_the_result_cannot_change(data: tuple[str, str], plain: Path) -> None:
    with pytest.raises(ValueError, match=r"begun with other settings: config.seed: 0 -> 1"):
        finetune.run(config(data, plain, seed=1))
    with pytest.raises(ValueError, match="no region is left to learn from"):
        finetune.run(config(data, plain.parent / "none", split="nowhere"))


def test_a_ray_worker_learns_the_same(data: tuple[str, str], plain: Path, tmp_path: Path, ray_session: None) -> None:
    finetune.run(config(data, tmp_path / "ray", num_workers=1))
    assert losses(tmp_path / "ray") == pytest.approx(losses(plain), abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "zero1"])
def test_two_workers_learn_as_one_loop_over_both_shares(
    data: tuple[str, str], tmp_path: Path, ray_session: None, strategy: str
) -> None:
    from itertools import islice

    from meddam_core.dam.checkpoint import load_dam
    from meddam_core.training.adapt import adapt
    from ray_jobs.finetune_worker import World, _batches, _collator, _make_trainer

    cfg = config(data, tmp_path / "two", num_workers=2, strategy=strategy)
    finetune.run(cfg)
    dam = load_dam(CHECKPOINT).train()
    adapt(dam, "full")
    spec = finetune._open(
        cfg.model_copy(update={"out": str(tmp_path / "one")}), finetune.RunDirectory(str(tmp_path / "one"))
    )
    trainer, collate = _make_trainer(dam, cfg, World()), _collator(dam, spec)
    streams = [_batches(spec, World(rank=r, num_workers=2), 0) for r in range(2)]
    expected = [
        trainer.train_step([collate(examples, epoch) for epoch, examples in both])
        for both in islice(zip(*streams, strict=True), NUM_STEPS)
    ]
    assert losses(tmp_path / "two") == pytest.approx(expected, abs=1e-4)


def test_everything_may_lie_on_s3(data: tuple[str, str], plain: Path, s3_bucket: str) -> None:
    cfg = config(data, Path("unused"), max_steps=2).model_copy(update={"out": f"{s3_bucket}/ft"})
    finetune.run(cfg)
    summary = finetune.run(cfg.model_copy(update={"max_steps": 4}))  # goes on from step 2
    assert summary.model == f"{s3_bucket}/ft/model"
    assert [step for step, _ in checkpoints(cfg.out)] == [2, 4]


@pytest.mark.parametrize("train", ["lora", "language", "projector"])
def test_parts_of_a_model_are_trained_and_written_whole(data: tuple[str, str], tmp_path: Path, train: str) -> None:
    finetune.run(config(data, tmp_path / "out", train=train, max_steps=2, dtype="bfloat16", accumulate=2))
    trained, before = load_dam(tmp_path / "out" / "model"), load_dam(CHECKPOINT)
    assert [n for n, _ in trained.named_parameters()] == [n for n, _ in before.named_parameters()]
    same = bool(
        (
            trained.llm.model.layers[0].self_attn.q_proj.weight == before.llm.model.layers[0].self_attn.q_proj.weight
        ).all()
    )
    assert same == (train == "projector")
