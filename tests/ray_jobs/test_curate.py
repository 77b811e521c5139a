"""`meddam curate` and `meddam export`: each caption is chosen or dropped with a reason; what is chosen can be used."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ray_jobs import curate, export, judge, qa
from ray_jobs.finetune import caption_files
from ray_jobs.judge_config import Config as JudgeConfig
from ray_jobs.question_files import open_questions
from tests.ray_jobs.made_lidc_rows import make_nodule_shards
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
    with pytest.raises(ValueError, match="no caption that is left has one"):  # imported captions have none
        curate.run(curate.Config(runs=(run,), out=str(tmp_path), keep_confident=0.5))
    with pytest.raises(ValueError, match="not published"):
        curate.run(curate.Config(runs=(str(tmp_path / "none"),), out=str(tmp_path)))


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Three captions a nodule: two agree; the labels, which say something else, must not matter."""
    folder = tmp_path_factory.mktemp("samples")
    images = make_nodule_shards(folder / "set", 4)
    said = ["A solid nodule with a sharp margin.", "A solid nodule with a sharp margin, round.", "A ground-glass mass."]
    with (folder / "captions.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["region_id", "sample", "text"])
        writer.writerows((r.region_id, s, text) for i in images for r in i.regions for s, text in enumerate(said))
    imported(str(folder / "set"), folder / "captions.csv", folder / "run")
    return str(folder / "run")


def test_without_labels_captions_are_held_against_what_most_of_them_say(
    samples: str, tmp_path: Path, ray_session: None
) -> None:
    table = str(tmp_path / "q")
    with pytest.raises(ValueError, match="give finished runs"):
        qa.run(qa.Config(shards=(str(Path(samples).parent / "set"),), out=table, consensus=True, num_cpus=1))
    asked = qa.run(qa.Config(shards=(samples,), out=table, consensus=True, num_cpus=1))
    assert asked.num_regions == 8
    facts = {(q.attribute, q.value) for q in open_questions(table).all() if q.polarity == "positive"}
    assert ("margin", "sharp") in facts  # density is not asked about a picture whose window is unknown
    assert not {a for a, _ in facts} & {"spiculation", "lobulation"}  # labels that no caption speaks of
    judge.run(JudgeConfig(run=samples, questions=table, name="agreed", controls=("none",), num_cpus=2))
    cfg = curate.Config(
        runs=(samples,), out=str(tmp_path / "set"), judging="agreed", min_verdicts=0.9, hide_truth=True,
        balance=("texture",), balance_ratio=1, max_same_text=5,
    )  # fmt: skip
    summary = curate.run(cfg)
    kept = pq.read_table(tmp_path / "set" / "captions").to_pylist()
    assert {r["sample"] for r in kept} <= {0, 1}
    assert all(r["labels"] == [] and r["truth_share"] is None for r in kept)
    assert summary.dropped == {"best_of_samples": 16, "same_text": 3, "balance": 1}  # by what captions state
    assert summary.num_kept == 4
    assert "right, where truth is known</th>" in (tmp_path / "set" / "yield.html").read_text()
    with pytest.raises(ValueError, match="--hide-truth hides"):
        curate.Config(runs=(samples,), out="x", hide_truth=True, min_truth=0.5)


def test_a_share_of_the_most_confident_is_kept(run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = curate._read

    def with_confidence(uri: str) -> pa.Table:
        table = read(uri)
        logprobs = pa.array([-0.01 * (i % 7) - 0.0001 * i for i in range(table.num_rows)], pa.float32())
        return table.set_column(table.schema.get_field_index("mean_logprob"), "mean_logprob", logprobs)

    monkeypatch.setattr(curate, "_read", with_confidence)
    found = {}
    for share in (1.0, 0.5, 0.01):
        curate.run(curate.Config(runs=(run,), out=str(tmp_path / str(share)), keep_confident=share))
        rows = pq.read_table(tmp_path / str(share) / "captions").to_pylist()
        found[share] = sorted(r["mean_logprob"] for r in rows)
    assert len(found[1.0]) > 6
    assert abs(2 * len(found[0.5]) - len(found[1.0])) <= 2
    assert found[0.5] == found[1.0][-len(found[0.5]) :]
    assert found[0.01] == found[1.0][-1:]
