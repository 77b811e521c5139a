"""`meddam finetune`: one process and Ray Train learn the same, kills lose nothing, and the result is a checkpoint."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from typer.testing import CliRunner

from meddam_core.dam.checkpoint import load_dam
from meddam_core.dam.model import Dam
from meddam_core.datasets.phantoms import Options, Phantoms
from meddam_core.shards import write_shard
from meddam_core.training.adapt import adapt
from ray_jobs import finetune
from ray_jobs.cli import app
from ray_jobs.finetune_config import Config
from ray_jobs.finetune_worker import World, _batches, _collator, _export, _make_trainer, checkpoints
from ray_jobs.score_model import score_model
from tests.meddam_core.datasets.run_source import rows_from
from tests.meddam_core.training.made import CHECKPOINT, small_dam
from tests.meddam_core.training.plain_loop import RATE, plain_losses
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


def test_a_folder_named_twice_comes_twice_as_often(data: tuple[str, str], tmp_path: Path) -> None:
    once, twice = (
        finetune._open(config(data, out, shards=shards), finetune.RunDirectory(str(out))).files
        for out, shards in ((tmp_path / "1", (data[0],)), (tmp_path / "2", (data[0], data[0])))
    )
    assert sorted(twice, key=str) == sorted([*once, *once], key=str)


def test_a_ray_worker_learns_the_same(data: tuple[str, str], plain: Path, tmp_path: Path, ray_session: None) -> None:
    finetune.run(config(data, tmp_path / "ray", num_workers=1))
    assert losses(tmp_path / "ray") == pytest.approx(losses(plain), abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_workers", "strategy"),
    [(0, "ddp"), (1, "ddp"), (2, "ddp"), (2, "zero1"), (2, "fsdp"), (2, "deepspeed")],
)
def test_twenty_steps_equal_a_plain_loop(
    data: tuple[str, str], tmp_path: Path, ray_session: None, num_workers: int, strategy: str
) -> None:
    """The judged form: float32, the same seed, two micro-batches a step, each worker's own or one worker's both."""
    if strategy == "deepspeed":
        pytest.importorskip("deepspeed")
    cfg = config(data, tmp_path / "run", num_workers=num_workers, strategy=strategy, max_steps=20, learning_rate=RATE,
                 warmup_steps=4, accumulate=1 if num_workers == 2 else 2, checkpoint_every=20)  # fmt: skip
    finetune.run(cfg)
    dam = small_dam()
    adapt(dam, "full")
    spec = finetune._open(
        cfg.model_copy(update={"out": str(tmp_path / "one")}), finetune.RunDirectory(str(tmp_path / "one"))
    )
    collate, alone = _collator(dam, spec), max(num_workers, 1)
    streams = [_batches(spec, World(rank=rank, num_workers=alone), 0) for rank in range(alone)]
    given = [collate(examples, epoch) for epoch, examples in itertools.islice(_in_turn(streams), 40)]
    expected = plain_losses(dam, given, 20)
    largest = max(abs(a - b) for a, b in zip(losses(tmp_path / "run"), expected, strict=True))
    print(f"{num_workers} workers, {strategy}: largest difference of 20 losses {largest:.1e}")
    assert largest < 1e-4
    assert expected[-1] < expected[0] - 0.5


def _in_turn(streams: Sequence[Iterator[Any]]) -> Iterator[Any]:
    while True:
        for stream in streams:
            yield next(stream)


@pytest.mark.slow
def test_a_killed_run_goes_on_with_the_same_curve(data: tuple[str, str], plain: Path, tmp_path: Path) -> None:
    """kill -9 in the middle, twice, by the command line; the second time with another strategy named."""
    out, settings = tmp_path / "out", tmp_path / "settings.yaml"
    cfg = config(data, out, max_steps=60, checkpoint_every=1)
    settings.write_text(json.dumps(cfg.model_dump(mode="json")))
    command = [sys.executable, "-m", "ray_jobs.cli", "finetune", "--config", str(settings)]
    for least in (2, 8):
        job = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while job.poll() is None and (not checkpoints(str(out)) or checkpoints(str(out))[-1][0] < least):
            time.sleep(0.02)
        job.kill()
        assert job.wait() == -signal.SIGKILL
        assert not (out / "model" / "config.json").exists()
    subprocess.run([*command, "--strategy", "fsdp"], check=True, capture_output=True)
    finetune.run(config(data, tmp_path / "whole", max_steps=60))
    assert losses(out) == losses(tmp_path / "whole")


@pytest.mark.slow
def test_a_lost_worker_is_replaced_and_the_curve_goes_on(
    data: tuple[str, str], tmp_path: Path, ray_session: None
) -> None:
    out = tmp_path / "out"
    cfg = config(data, out, num_workers=2, strategy="fsdp", max_steps=30, checkpoint_every=2, learning_rate=RATE)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(finetune.run, cfg)
        while not running.done() and len(checkpoints(str(out))) < 2:
            time.sleep(0.02)
        killed = checkpoints(str(out))[-1][0]
        os.kill(_train_workers()[-1], signal.SIGKILL)
        assert running.result().num_steps == 30
    assert killed < 26
    finetune.run(cfg.model_copy(update={"out": str(tmp_path / "whole")}))
    assert losses(out) == pytest.approx(losses(tmp_path / "whole"), abs=1e-4)


def _train_workers() -> list[int]:
    """Process ids of Ray Train's workers in this test's own session."""
    import psutil

    return [p.pid for p in psutil.Process().children(recursive=True) if "RayTrainWorker" in " ".join(p.cmdline())]


def test_what_is_written_passes_meddam_verify(data: tuple[str, str], tmp_path: Path) -> None:
    """Activations saved before writing, compared by the command line after; gates that started at zero have moved."""
    dam = small_dam()
    adapt(dam, "full")
    gates = [p for n, p in dam.named_parameters() if n.endswith("_factor") and p.requires_grad]
    with torch.no_grad():
        for gate in gates:
            gate.zero_()
    cfg = config(data, tmp_path / "out")
    spec = finetune._open(cfg, finetune.RunDirectory(cfg.out))
    trainer, collate = _make_trainer(dam, cfg, World()), _collator(dam, spec)
    for epoch, examples in itertools.islice(_batches(spec, World(), 0), 3):
        trainer.train_step([collate(examples, epoch)])
    assert all(float(gate.detach()) != 0 for gate in gates)
    (tmp_path / "oracle" / "cases").mkdir(parents=True)
    for name in ("c0_ellipse_640x480", "c3_Lshape_420x300"):
        np.savez(tmp_path / "oracle" / "cases" / f"{name}.npz", **_activations(dam.eval(), name))
    _export(dam, cfg)
    verify = ["verify", "--checkpoint", f"{cfg.out}/model", "--oracle", str(tmp_path / "oracle")]
    ended = CliRunner().invoke(app, verify)
    assert ended.exit_code == 0 and "PASSED: 32 of 32" in ended.output, ended.output
    ended = CliRunner().invoke(app, [*verify[:2], str(CHECKPOINT), *verify[3:]])  # as it was before training
    assert ended.exit_code != 0 and "FAILED" in ended.output


def _activations(dam: Dam, name: str) -> dict[str, Any]:
    """An oracle case of this model: the inputs of a shipped one, every stage, and six tokens, greedily."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from meddam_core.dam.verify import _language, _vision

    with np.load(CHECKPOINT.parent / "cases" / f"{name}.npz", allow_pickle=False) as arrays:
        case = {k: arrays[k] for k in ("image", "mask", "query")}
    dam.requires_grad_(False)
    with sdpa_kernel(SDPBackend.MATH):
        seen = _vision(dam, case)
        tokens: list[int] = []
        for _ in range(6):
            said = _language(dam, {**case, "tokens": np.array([*tokens, 0])}, seen["proj_out"])
            tokens = [int(t) for t in said["tokens"]]
    return {**case, **seen, **said}


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two shards of small phantoms, without captions."""
    folder = tmp_path_factory.mktemp("phantoms")
    images, _ = rows_from(Phantoms(count=4, kinds=("ct", "skin"), options=Options(size=512, max_lesions=2)))
    for number in range(2):
        write_shard(str(folder / "shards" / f"shard-{number:06d}.parquet"), images[2 * number : 2 * number + 2])
    return str(folder)


@pytest.mark.parametrize(("num_workers", "strategy"), [(0, "ddp"), pytest.param(2, "fsdp", marks=pytest.mark.slow)])
def test_held_out_regions_are_scored_during_training(
    phantoms: str, tmp_path: Path, request: pytest.FixtureRequest, num_workers: int, strategy: str
) -> None:
    """By the model as it is then: the last score is that of the written model, also where weights are in shares."""
    if num_workers:
        request.getfixturevalue("ray_session")
    lengths = ("meddam-v1", "meddam-v1+sentence", "meddam-v1+keyword")
    cfg = config((phantoms, ""), tmp_path, captions=(), prompts=lengths, max_steps=4, batch_size=1, eval_every=2,
                 eval_shards=(phantoms,), eval_regions=3, num_workers=num_workers, strategy=strategy)  # fmt: skip
    summary = finetune.run(cfg)
    scores = [e for e in json.loads((tmp_path / "curve.json").read_text()) if "meddlc_average" in e]
    assert [e["step"] for e in scores] == [2, 4] and summary.meddlc == scores[-1]["meddlc_average"]
    written = score_model(load_dam(tmp_path / "model"), cfg.eval_shards, 3, prompt=lengths[0])
    assert scores[-1]["meddlc_average"] == pytest.approx(written["average"], abs=1e-4)
    assert "MedDLC-score on held-out regions" in (tmp_path / "report.html").read_text()


def test_everything_may_lie_on_s3(data: tuple[str, str], plain: Path, s3_bucket: str) -> None:
    cfg = config(data, Path("unused"), max_steps=2).model_copy(update={"out": f"{s3_bucket}/ft"})
    finetune.run(cfg)
    summary = finetune.run(cfg.model_copy(update={"max_steps": 4}))  # goes on from step 2
    assert summary.model == f"{s3_bucket}/ft/model"
    assert [step for step, _ in checkpoints(cfg.out)] == [2, 4]


def test_only_lora_needs_peft_and_says_so_before_anything_is_begun(
    data: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("peft", "peft.tuners.lora"):  # as where it is not installed
        monkeypatch.setitem(sys.modules, name, None)
    finetune.run(config(data, tmp_path / "whole", max_steps=1))
    assert (tmp_path / "whole/model/config.json").is_file()
    with pytest.raises(ValueError, match=r"needs peft: pip install 'meddam\[train\]'"):
        finetune.run(config(data, tmp_path / "lora", train="lora", num_workers=1))
    assert not (tmp_path / "lora/run.json").exists()


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
