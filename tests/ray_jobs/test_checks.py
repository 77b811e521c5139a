"""`meddam check claims` and `meddam check pairs`: checks of captions and models without a judge."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from ray_jobs import captions_import, check_claims, check_pairs
from ray_jobs.cli import main
from tests.meddam_core.dam.small import CHECKPOINT
from tests.ray_jobs.made_lidc_rows import make_nodule_shards, truths, write_table


@pytest.fixture
def run(tmp_path: Path) -> str:
    """Eight nodules: true captions, but one at odds with itself, one of nothing known, and one missing."""
    captions = truths(make_nodule_shards(tmp_path / "set", 4))
    first, second, third = sorted(captions)[:3]
    captions[first] = "A sharp margin. The margin is poorly defined. It grew since last year."
    captions[second] = "Follow-up is advised by the radiologist."
    del captions[third]
    table = write_table(tmp_path / "captions.csv", captions)
    cfg = captions_import.Config(table=table, shards=(str(tmp_path / "set"),), out=str(tmp_path / "run"), model="m")
    captions_import.run(cfg)
    return str(tmp_path / "run")


def test_claims_are_counted_and_written(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as code:
        main(["check", "claims", run, "--json"])
    assert code.value.code == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["num_captions"], found["num_without_text"]) == (7, 1)
    assert found["by_verdict"]["contradicted"] >= 1
    assert found["by_verdict"]["unverifiable"] >= 2
    assert found["num_contradicted_captions"] == 1
    assert 0.9 < found["precision"] < 1
    assert found["recall"] == pytest.approx(5 / 7, abs=0.1)
    assert json.loads((Path(run) / "checks/claims.json").read_text())["num_claims"] == found["num_claims"]
    rows = pq.read_table(Path(run) / "checks/claims").to_pylist()
    assert len(rows) == found["num_claims"]
    assert {r["text"] for r in rows if r["attribute"] == ""} >= {"follow up is advised by the radiologist"}


def test_a_run_that_is_not_complete_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a complete run"):
        check_claims.run(check_claims.Config(run=str(tmp_path)))


def test_pairs_of_a_checkpoint_that_has_seen_nothing_are_about_chance(tmp_path: Path) -> None:
    make_nodule_shards(tmp_path / "set", 10)
    cfg = check_pairs.Config(
        shards=(str(tmp_path / "set"),), model=str(CHECKPOINT), out=str(tmp_path / "pairs.json"), num_images=6,
        pairs_per_region=3, device="cpu",
    )  # fmt: skip
    found = check_pairs.run(cfg)
    assert (found.num_images, found.num_pairs) == (6, 36)
    assert found.seen is not None
    assert 0.1 < found.seen[0] < 0.9
    assert found.seen[1] <= found.seen[0] <= found.seen[2]
    written = json.loads((tmp_path / "pairs.json").read_text())
    assert len(written["pairs"]) == 36
    assert all(p["gain"] != p["blank_gain"] for p in written["pairs"])
    again = check_pairs.run(cfg)
    assert again == found
    assert "the true caption is likelier" in "\n".join(found.lines())
