"""`meddam profile`: each step of a stage has its time, and the captioner's need for cores follows."""

from __future__ import annotations

from pathlib import Path

import pytest

from ray_jobs.stage_profile import STEPS, Config, run
from tests.ray_jobs.made_shards import make_shards

MODEL = str(Path(__file__).parents[1] / "data/oracle/dam_tiny/checkpoint")


def test_preparing_step_by_step(tmp_path: Path) -> None:
    shards = make_shards(str(tmp_path / "set"), 1, 12, side_px=512)
    found = run(Config(shards=(shards,), num_images=6))
    assert (found.num_images, found.num_failed) == (6, 0) and found.num_regions == 2 + 3 + 1 + 2 + 3 + 1
    assert tuple(found.ms) == STEPS and all(ms > 0 for name, ms in found.ms.items() if name != "views")
    assert found.regions_per_s == pytest.approx(found.images_per_s * found.num_regions / 6)
    assert found.captioner_regions_per_s is None and "one core prepares" in found.lines()[-1]


def test_with_a_captioner(tmp_path: Path) -> None:
    shards = make_shards(str(tmp_path / "set"), 1, 5)
    cfg = Config(shards=(shards,), num_images=4, model=MODEL, engine="benchmarks.waiting_engine:WaitingEngine")
    found = run(cfg)
    assert found.captioner_regions_per_s and 0 < found.captioner_regions_per_s <= 200
    assert found.cores_per_captioner and "in front keep it busy" in found.lines()[-1]


def test_nothing_to_measure(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no image shards"):
        run(Config(shards=(str(tmp_path),)))
