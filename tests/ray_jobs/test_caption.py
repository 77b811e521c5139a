"""The caption job end to end, in one Ray session: what a user sees of it, and what each of its guards prevents."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from meddam_core.records import CaptionedImage, EncodedImage, from_row
from meddam_core.shards import read_shard, write_shard
from ray_jobs.audit import audit
from ray_jobs.caption import run
from ray_jobs.caption_config import Config
from ray_jobs.estimate import Estimate
from ray_jobs.run_directory import RunDirectory
from ray_jobs.summary import Summary
from tests.faults.engines import MENDED, POISON
from tests.faults.kill_and_resume import MODEL, captions
from tests.ray_jobs.made_shards import SIDE_PX, make_shards

WAITING = "benchmarks.waiting_engine:WaitingEngine"


def _config(shards: str, out: str, **settings: Any) -> Config:
    chosen = {"engine": WAITING, "prompts": ("dam-default",), "max_new_tokens": 12, "images_per_file": 10} | settings
    return Config(shards=(shards,), out=out, model=MODEL, **chosen)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_shards(str(tmp_path_factory.mktemp("made") / "set"), 2, 16)


@pytest.mark.s3
def test_from_a_bucket_and_back_into_it_with_the_real_engine(ray_session: None, s3_bucket: str) -> None:
    shards = make_shards(f"{s3_bucket}/set", 2, 8)
    cfg = _config(shards, f"{s3_bucket}/run", engine="auto")
    summary = run(cfg)
    assert (summary.state, summary.exit_code, summary.engine, summary.kernels) == ("complete", 0, "torch", "torch")
    assert (summary.num_images, summary.num_captions) == (16, summary.num_regions)
    rows = captions(cfg.out).to_pylist()
    regions = [r for uri in (0, 1) for i in read_shard(f"{shards}/shards/shard-{uri:06d}.parquet") for r in i.regions]
    assert [r["region_id"] for r in rows] == [r.region_id for r in regions]
    assert {r["status"] for r in rows} <= {"ok", "truncated"}
    assert all(r["text"] and r["num_tokens"] <= 12 and r["mean_logprob"] < 0 for r in rows)
    assert len({r["text"] for r in rows}) > len(rows) // 2, "captions must depend on their pixels"
    found = audit(RunDirectory(cfg.out))
    assert found.clean
    assert json.loads(json.dumps(found.to_json()))["num_missing"] == 0


def test_one_row_an_image_with_all_its_captions(ray_session: None, shards: str, tmp_path: Path) -> None:
    """Fails if the job fans out before the write, where Ray's resume loses the rest of an image (LOSS 1)."""
    cfg = _config(shards, str(tmp_path / "run"), prompts=("dam-default", "meddam-v1"), images_per_file=1)
    assert run(cfg).exit_code == 0
    ids = []
    for _, uri in RunDirectory(cfg.out).part_files():
        for row in pq.read_table(uri, partitioning=None).to_pylist():
            image = from_row(CaptionedImage, row)
            ids.append(image.image_id)
            assert len(image.captions) == 2 * len(image.regions)
    assert len(ids) == len(set(ids)) == 32


def test_a_finished_run_is_left_alone(shards: str, tmp_path: Path, ray_session: None) -> None:
    cfg = _config(shards, str(tmp_path / "run"))
    first = run(cfg)
    before = {p: p.stat().st_mtime_ns for p in Path(cfg.out).rglob("*") if p.name != "lease"}
    assert run(cfg) == first
    assert {p: p.stat().st_mtime_ns for p in Path(cfg.out).rglob("*") if p.name != "lease"} == before


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"prompts": ("meddam-v1",)}, "prompts.meddam-v1"),
        ({"max_new_tokens": 13}, "sampling.max_new_tokens: 12 -> 13"),
        ({"margin": 0.3}, "views.margin: None -> 0.3"),
        ({"window": "lung"}, "views.window"),
    ],
)
def test_a_run_is_not_resumed_with_other_settings(
    ray_session: None, shards: str, tmp_path_factory: pytest.TempPathFactory, change: dict[str, Any], field: str
) -> None:
    out = tmp_path_factory.getbasetemp() / "one-run"
    run(_config(shards, str(out)))
    with pytest.raises(ValueError, match="belongs to another run") as refused:
        run(_config(shards, str(out), **change))
    assert field in str(refused.value)


def test_a_run_is_not_resumed_over_changed_shards(ray_session: None, tmp_path: Path) -> None:
    shards = make_shards(str(tmp_path / "set"), 1, 4)
    run(_config(shards, str(tmp_path / "run")))
    make_shards(str(tmp_path / "set"), 1, 4, seed=1)
    with pytest.raises(ValueError, match="has other content"):
        run(_config(shards, str(tmp_path / "run")))


def test_a_broken_model_stops_the_run_and_publishes_nothing(ray_session: None, shards: str, tmp_path: Path) -> None:
    cfg = _config(shards, str(tmp_path / "run"), engine="tests.faults.engines:BrokenEngine")
    summary = run(cfg)
    assert (summary.state, summary.exit_code) == ("stopped", 3)
    assert summary.why is not None
    assert "images failed" in summary.why
    assert "engine_error" in summary.why
    assert RunDirectory(cfg.out).published() is None


def test_a_small_run_of_failures_is_no_success_either(ray_session: None, tmp_path: Path) -> None:
    shards = make_shards(str(tmp_path / "set"), 1, 3)
    summary = run(_config(shards, str(tmp_path / "run"), engine="tests.faults.engines:BrokenEngine"))
    assert summary.exit_code == 3
    assert "every caption failed" in str(summary.why)


@pytest.mark.slow  # the fault suite does it, too
@pytest.mark.parametrize("engine", ["KillingEngine", "BreakingEngine"])
def test_an_image_that_kills_its_process_is_one_failed_row(ray_session: None, tmp_path: Path, engine: str) -> None:
    def pixels(image: int) -> NDArray[np.uint8]:
        side = (SIDE_PX, SIDE_PX, 3)
        return np.full(side, POISON, np.uint8) if image == 5 else np.full(side, image, np.uint8)

    shards = make_shards(str(tmp_path / "set"), 1, 12, pixels=pixels)
    cfg = _config(
        shards, str(tmp_path / "run"), engine=f"tests.faults.engines:{engine}", images_per_batch=6,
        canary_images=50,
    )  # fmt: skip
    summary = run(cfg)
    assert summary.exit_code == 0
    assert summary.session["quarantined"] == ["5"]
    rows = captions(cfg.out).to_pylist()
    assert {r["image_id"] for r in rows if r["status"] == "failed"} == {5}
    assert {r["reason"] for r in rows if r["image_id"] == 5} == {"killed_process"}
    assert summary.by_reason == {"killed_process": sum(r["image_id"] == 5 for r in rows)}


def test_retry_captions_what_failed_and_publishes_a_further_generation(ray_session: None, tmp_path: Path) -> None:
    def pixels(image: int) -> NDArray[np.uint8]:
        return np.full((SIDE_PX, SIDE_PX, 3), POISON if image == 2 else image, np.uint8)

    shards = make_shards(str(tmp_path / "set"), 1, 12, pixels=pixels)
    cfg = _config(shards, str(tmp_path / "run"), engine="tests.faults.engines:RefusingEngine")
    with pytest.raises(ValueError, match="not complete yet"):
        run(cfg, retry=True)
    first = run(cfg)
    assert (first.generation, first.by_reason) == (1, {"engine_error": 3})
    MENDED.touch()
    try:
        again = run(cfg, retry=True)
    finally:
        MENDED.unlink()
    assert (again.state, again.attempt, again.generation, again.by_reason) == ("complete", 2, 2, {})
    assert again.session["num_images"] == 1, "only the failed image is captioned again"
    rows = captions(cfg.out).to_pylist()
    assert {r["image_id"]: r["attempt"] for r in rows if r["attempt"] == 2} == {2: 2}
    assert run(cfg, retry=True) == again, "nothing has failed any more"


def test_a_row_that_cannot_be_prepared_fails_alone(ray_session: None, tmp_path: Path) -> None:
    make_shards(str(tmp_path / "made"), 1, 8)
    images = list(read_shard(str(tmp_path / "made/shards/shard-000000.parquet")))
    images[1] = replace(images[1], image=EncodedImage(bytes=images[1].image.bytes[:100]))  # type: ignore[index]
    outside = replace(images[2].regions[0], box=(500, 500, 600, 600))
    images[2] = replace(images[2], regions=[outside, *images[2].regions[1:]])
    write_shard(str(tmp_path / "set/shard-000000.parquet"), images)
    cfg = _config(str(tmp_path / "set"), str(tmp_path / "run"))
    assert run(cfg).exit_code == 0
    reasons = {(r["image_id"], r["box"][0] == 500): r["reason"] for r in captions(cfg.out).to_pylist() if r["reason"]}
    assert reasons == {(1, False): "corrupt", (2, True): "box_outside"}


def test_sampled_captions_are_their_own_and_repeatable(ray_session: None, tmp_path: Path) -> None:
    shards = make_shards(str(tmp_path / "set"), 1, 3)
    settings = {"engine": "torch", "temperature": 1.0, "num_samples": 3}
    first, second = (_config(shards, str(tmp_path / name), **settings) for name in ("a", "b"))
    run(first)
    run(second)
    texts, again = captions(first.out).to_pylist(), captions(second.out).to_pylist()
    scores = [[row.pop("mean_logprob") for row in rows] for rows in (texts, again)]
    assert texts == again
    assert scores[0] == pytest.approx(scores[1], abs=1e-4)  # the last digits follow the batch, which follows the clock
    per_region: dict[int, set[str]] = {}
    for row in texts:
        per_region.setdefault(row["region_id"], set()).add(row["text"])
    assert all(len(own) == 3 for own in per_region.values())


def test_dry_run_counts_measures_and_writes_nothing(ray_session: None, shards: str, tmp_path: Path) -> None:
    found = run(_config(shards, str(tmp_path / "run"), engine="torch", dry_run=True))
    assert isinstance(found, Estimate)
    summary = run(_config(shards, str(tmp_path / "other")))
    assert isinstance(summary, Summary)
    assert (found.num_images, found.num_captions) == (32, summary.num_captions)
    assert found.seconds > 0
    assert found.output_bytes > 0
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"prompts": ("no-such-prompt",)}, "no prompt 'no-such-prompt'"),
        ({"num_samples": 2}, "give --temperature above 0"),
        ({"prompts": ("dam-video",)}, "video prompt"),
        ({"device": "cuda"}, "has no GPU"),
        ({"engine": "mii2"}, "no engine 'mii2'"),
    ],
)
def test_what_cannot_work_is_said_before_any_work(
    ray_session: None, shards: str, tmp_path: Path, settings: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        run(_config(shards, str(tmp_path / "run"), **settings))
    assert not (tmp_path / "run/parts").exists()


def test_a_checkpoint_of_another_shape_is_refused_before_any_work(
    ray_session: None, shards: str, tmp_path: Path
) -> None:
    shutil.copytree(MODEL, tmp_path / "model")
    path = tmp_path / "model/llm/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"intermediate_size": 192}))
    cfg = _config(shards, str(tmp_path / "run"), engine="torch").model_copy(update={"model": str(tmp_path / "model")})
    with pytest.raises(ValueError, match="mlp"):
        run(cfg)
