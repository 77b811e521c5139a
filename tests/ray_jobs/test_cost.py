"""`meddam plan`: counts are exact, rates are measured, prices come from a table, and what is none of these is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from ray_jobs.cost import PRICES, Config, run
from ray_jobs.run_directory import SUMMARY, RunDirectory
from ray_jobs.snapshot import snapshot
from tests.ray_jobs.made_shards import make_shards
from tests.ray_jobs.test_report import publish

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_shards(str(tmp_path_factory.mktemp("set")), 2, 20)


@pytest.fixture
def trial(tmp_path: Path, shards: str) -> RunDirectory:
    """A published run with two captioners."""
    directory = RunDirectory(str(tmp_path / "trial"))
    publish(directory, shards)
    session = {"regions_per_s": 8.0, "busy_share": 0.8, "num_captioners": 2}
    facts = {"num_captions": 68, "num_regions": 68, "num_tokens": 680, "session": session}
    directory.write_json((directory.read_json(SUMMARY) or {}) | facts, SUMMARY)
    return directory


def test_hours_and_dollars_follow_from_a_measured_rate(shards: str) -> None:
    found = run(Config(shards=(shards,), gpus=4, gpu="a10g", captions_per_s=0.5, busy_share=1.0, captions_per_region=2))
    regions = sum(s.num_regions for s in snapshot([shards]))
    assert (found.num_regions, found.num_captions) == (regions, 2 * regions)
    assert found.gpu_hours == pytest.approx(2 * regions / 0.5 / 3600)
    assert found.seconds == pytest.approx(found.gpu_hours * 3600 / 4)
    assert found.cost_gpus == pytest.approx(found.gpu_hours * 1.006) == pytest.approx(found.cost)
    assert found.caption_gb is None and any("size of captions" in line for line in found.assumed)


def test_what_a_bill_has_besides_is_counted_or_named(shards: str) -> None:
    without = run(Config(shards=(shards,), gpus=32, gpu="l4", captions_per_s=0.5))
    (said,) = (line for line in without.lines() if "not in it:" in line)
    assert all(what in said for what in ("starting nodes", "the head", "requests", "taken away"))
    found = run(Config(shards=(shards,), gpus=32, gpu="l4", captions_per_s=0.5, startup_minutes=15))
    assert found.startup_gpu_hours == pytest.approx(8) and found.cost_startup == pytest.approx(8 * 4.6016 / 4)
    assert found.cost == pytest.approx(without.cost + 8 * 4.6016 / 4) and found.seconds == without.seconds
    assert "starting nodes" not in found.lines()[-1]
    assert "8.00  GPU hours before the first caption  9.20 USD" in "\n".join(found.lines())
    unknown = run(Config(shards=(shards,), gpu="tpu", captions_per_s=0.5, startup_minutes=15))
    assert unknown.cost == 0 and unknown.cost_startup is None


def test_the_clusters_that_are_shipped_have_a_price() -> None:
    """Each kind of GPU that `cluster/aws` starts on its own, by the day and on the spot market."""
    table = yaml.safe_load(PRICES.read_text())["gpu_hour"]
    cluster = (ROOT / "cluster/aws/cluster.yaml").read_text()
    assert "4 x L4" in cluster and 0 < table["l4-spot"] < table["l4"]


def test_a_trial_gives_rates_sizes_and_tokens(shards: str, trial: RunDirectory) -> None:
    cfg = Config(shards=(shards,), gpus=2, gpu="own", like=trial.uri, judge="gpt-4o-mini", questions_per_region=8)
    found = run(cfg)
    assert found.captions_per_s == pytest.approx(8.0 / 2 / 0.8), "of one captioner, while it works"
    assert found.gpu_hours == pytest.approx(found.num_captions / 4.0 / 3600)
    assert found.tokens_per_caption == 10 and found.caption_gb
    assert found.judge_calls == 8 * found.num_captions
    assert found.cost_judge == pytest.approx(found.judge_calls * (230 * 0.15 + 15 * 0.60) / 1e6)
    text = "\n".join(found.lines())
    assert "GPU hours" in text and "0.00 USD" in text and "calls of the judge" in text


def test_what_has_no_price_is_not_invented(shards: str) -> None:
    found = run(Config(shards=(shards,), gpu="tpu", captions_per_s=1.0, judge="nobody"))
    assert found.cost_gpus is None and found.cost_judge is None and found.cost == 0
    assert "\n".join(found.lines()).count("(no price in the table)") == 2


def test_what_cannot_be_planned_is_said(shards: str, trial: RunDirectory, tmp_path: Path) -> None:
    for rates in ({}, {"like": "x", "captions_per_s": 1.0}):
        settings: dict[str, Any] = {"shards": (shards,), **rates}
        with pytest.raises(ValidationError, match="one measured rate"):
            Config(**settings)
    with pytest.raises(ValueError, match="says no rate"):
        run(Config(shards=(shards,), like=str(tmp_path)))
    with pytest.raises(ValueError, match="no price table"):
        run(Config(shards=(shards,), captions_per_s=1.0, prices=tmp_path / "none.yaml"))
    (tmp_path / "bad.yaml").write_text("currency: EUR\n")
    with pytest.raises(ValueError, match="lacks gpu_hour"):
        run(Config(shards=(shards,), captions_per_s=1.0, prices=tmp_path / "bad.yaml"))


def test_each_price_says_where_it_comes_from() -> None:
    table = yaml.safe_load(PRICES.read_text())
    lines = [line for line in PRICES.read_text().splitlines() if line.startswith("  ")]
    assert len(lines) == len(table["gpu_hour"]) + len(table["judge_million_tokens"])
    assert all("#" in line for line in lines if "own" not in line)
