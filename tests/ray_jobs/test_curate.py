"""`meddam curate` and `meddam export`: each caption is chosen or dropped with a reason; what is chosen can be used."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from ray_jobs import curate, export
from ray_jobs.finetune import caption_files
from tests.ray_jobs.made_shards import make_shards
from tests.ray_jobs.test_captions_import import all_regions, imported


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A run over made pictures: of each five captions one hedges and one is too short."""
    folder = tmp_path_factory.mktemp("curate")
    shards = make_shards(str(folder / "set"), 2, 6)
    texts = ["Possibly a square lies here.", "Square."] + [f"A square of kind {k} lies in the middle." for k in "abc"]
    with (folder / "captions.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["region_id", "caption"])
        writer.writerows((r, texts[i % 5]) for i, r in enumerate(all_regions(shards, folder)))
    imported(shards, folder / "captions.csv", folder / "run")
    return str(folder / "run")


def test_every_caption_is_chosen_or_dropped_with_a_reason(run: str, tmp_path: Path) -> None:
    summary = curate.run(curate.Config(runs=(run,), out=str(tmp_path / "set")))
    kept = pq.read_table(tmp_path / "set" / "captions").to_pylist()
    dropped = pq.read_table(tmp_path / "set" / "dropped").to_pylist()
    assert len(kept) == summary.num_kept > 0
    assert len(kept) + len(dropped) == summary.num_captions
    assert not {r["region_id"] for r in kept} & {r["region_id"] for r in dropped}
    assert set(summary.dropped) == {"hedging", "length"} == {r["filter"] for r in dropped}
    assert all(r["why"] for r in dropped)
    assert {r["run"] for r in kept} == {run} and {r["licence"] for r in kept} == {"CC0-1.0"}
    assert "Possibly a square" in (tmp_path / "set" / "yield.html").read_text()
    assert json.loads((tmp_path / "set" / "curation.json").read_text())["runs"][0]["uri"] == run
    assert curate.run(curate.Config(runs=(run,), out=str(tmp_path / "set"))) == summary


def test_a_set_can_be_learnt_from(run: str, tmp_path: Path) -> None:
    from meddam_core.training.data import CaptionTable

    summary = curate.run(curate.Config(runs=(run,), out=str(tmp_path / "set")))
    table = CaptionTable.read(caption_files(str(tmp_path / "set")))
    assert len(table.texts) == summary.num_kept  # what was dropped lies beside, and is not read


def test_a_set_is_exported_with_its_pictures(run: str, tmp_path: Path) -> None:
    summary = curate.run(curate.Config(runs=(run,), out=str(tmp_path / "set")))
    found = export.run(export.Config(source=str(tmp_path / "set"), out=tmp_path / "coco", format="coco"))
    assert found.num_captions == summary.num_kept
    assert list((tmp_path / "coco" / "images").glob("*.png"))
    with pytest.raises(ValueError, match="not empty"):
        export.run(export.Config(source=str(tmp_path / "set"), out=tmp_path / "coco", format="coco"))
    with pytest.raises(ValueError, match="would break a licence"):
        export.run(export.Config(source=run, out=tmp_path / "sold", purpose="commercial"))


def test_what_a_rule_needs_is_said(run: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--min-verdicts needs --judging"):
        curate.run(curate.Config(runs=(run,), out=str(tmp_path), min_verdicts=0.5))
    with pytest.raises(ValueError, match="no judging 'mine'"):
        curate.run(curate.Config(runs=(run,), out=str(tmp_path), judging="mine"))
    with pytest.raises(ValueError, match="not published"):
        curate.run(curate.Config(runs=(str(tmp_path / "none"),), out=str(tmp_path)))
