"""`meddam benchmark` and `meddam leaderboard`: a grid from shards to a page, resumed, and held to its controls."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from meddam_core.shards import read_shard
from ray_jobs import adjudicate, benchmark, captions_import, check_judges, ingest, judge, leaderboard, qa
from ray_jobs.cli import main
from ray_jobs.ingest_config import PhantomsConfig
from ray_jobs.judge_config import Config as JudgeConfig
from ray_jobs.judge_summary import Summary as JudgeSummary
from ray_jobs.options import build
from ray_jobs.run_directory import SUMMARY
from tests.faults.quota_server import Quota, QuotaServer
from tests.meddam_core.dam.small import CHECKPOINT
from tests.ray_jobs.made_lidc_rows import make_nodule_shards, truths, write_table

pytestmark = pytest.mark.usefixtures("ray_session")
Files = dict[str, tuple[int, bytes]]


def grid(folder: Path, **changes: Any) -> benchmark.Config:
    """One model run here with boxes made wider, and two systems whose captions are given."""
    images = make_nodule_shards(folder / "nodules", 14)
    whole = truths(images)
    first = {r: text.partition(". ")[0] + "." for r, text in whole.items()}
    tables = {n: write_table(folder / f"{n}.csv", t) for n, t in (("whole", whole), ("first", first))}
    values = {
        "datasets": {"nodules": str(folder / "nodules")},
        "models": {
            "tiny": {"model": str(CHECKPOINT), "max_new_tokens": 6},
            **{name: {"captions": {"nodules": table}} for name, table in tables.items()},
        },
        "prompts": ["dam-default"],
        "views": {"wide": {"margin": 0.5}},
    }
    (folder / "grid.yaml").write_text(yaml.safe_dump(values | changes, sort_keys=False))
    return build(benchmark.Config, {"out": str(folder / "out")}, folder / "grid.yaml")  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def done(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[benchmark.Config, benchmark.Summary]:
    cfg = grid(tmp_path_factory.mktemp("benchmark"))
    return cfg, benchmark.run(cfg)


def test_a_grid_is_captioned_judged_and_ranked(done: tuple[benchmark.Config, benchmark.Summary]) -> None:
    cfg, summary = done
    assert summary.exit_code == 0
    assert [(c.model, c.prompt, c.view) for c in summary.cells] == [
        ("tiny", "dam-default", "wide"), ("whole", "imported", "as-given"),
        ("first", "imported", "as-given"),
    ]  # fmt: skip
    assert summary.board is not None
    scores = {s.name: s for s in summary.board.systems}
    assert set(scores) == {
        "whole", "first", "tiny, dam-default", "control:blank", "control:majority", "control:truth"
    }  # fmt: skip
    assert scores["whole"].strict == 100
    assert scores["whole"].rank == (1, 1)
    assert scores["control:blank"].strict == 0
    assert scores["control:blank"].paper == 50
    assert scores["tiny, dam-default"].strict == 0
    assert summary.board.datasets == ("nodules",)
    board = Path(cfg.out) / "leaderboard"
    assert "margin 0.5" in (board / "leaderboard.html").read_text()
    rows = list(csv.DictReader((board / "leaderboard.csv").open()))
    assert {r["system"] for r in rows} == set(scores)
    assert len(list((board / "eval_results").glob("*.yaml"))) == 3
    noted = json.loads((Path(cfg.out) / "benchmark.json").read_text())
    assert {c["state"] for c in noted["cells"]} == {"judged"}


def test_finished_cells_are_not_done_again(
    done: tuple[benchmark.Config, benchmark.Summary], monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg, summary = done
    before = _files(cfg.out)

    def refuse(*_: object) -> None:
        raise AssertionError("a finished cell was done again")

    for module in (benchmark.caption, benchmark.judge, benchmark.captions_import):
        monkeypatch.setattr(module, "run", refuse)
    again = benchmark.run(cfg)
    assert again.cells == summary.cells
    assert again.board is not None
    assert summary.board is not None
    assert again.board.systems == summary.board.systems
    unchanged = {p: f for p, f in _files(cfg.out).items() if "/leaderboard/" not in p and "benchmark.json" not in p}
    assert unchanged == {p: f for p, f in before.items() if p in unchanged}
    assert len(unchanged) > 20


def test_half_done_cells_go_on_and_new_ones_are_added(done: tuple[benchmark.Config, benchmark.Summary]) -> None:
    cfg, summary = done
    cell = next(c for c in summary.cells if c.model == "first")
    (judging,) = (Path(cell.run) / "judging").glob("benchmark-*")
    (judging / SUMMARY).unlink()  # as a kill between the last verdict and the summary
    captions = json.loads((Path(cfg.out) / "benchmark.json").read_text())["grid"]["models"]["whole"]
    more = cfg.model_copy(update={"models": {**cfg.models, "copy": captions}})
    assert [c.state for c in benchmark.run(more.model_copy(update={"dry_run": True})).cells] == [
        "judged",
        "judged",
        "captioned",
        "to do",
    ]
    found = benchmark.run(more)
    assert found.exit_code == 0
    assert found.board is not None
    ranks = {s.name: s.rank for s in found.board.systems if s.role == "model"}
    assert ranks["copy"] == ranks["whole"] == (1, 2)


def test_a_model_rates_the_captions_too(done: tuple[benchmark.Config, benchmark.Summary]) -> None:
    cfg, _ = done
    given = {name: spec for name, spec in cfg.models.items() if "captions" in spec}
    with QuotaServer(Quota(None, latency_s=(0.0, 0.0), shares={"prose": 0.1}, seed=6)) as server:
        rating = {"models": ["rater"], "base_urls": [server.url], "retention": "inside", "api_key_env": "NONE"}
        rated = cfg.model_copy(update={"models": given, "llm_score": rating})
        assert {c.state for c in benchmark.run(rated.model_copy(update={"dry_run": True})).cells} == {"captioned"}
        found = benchmark.run(rated)
        assert found.exit_code == 0
        asked = len(server.seen)
        assert benchmark.run(rated).exit_code == 0
        assert len(server.seen) == asked
    page = (Path(cfg.out) / "leaderboard/leaderboard.html").read_text()
    section = page.partition("<h2>LLM-score</h2>")[2].partition("<h2>")[0]
    assert "saw no image" in section
    assert all(f"<td>{name}</td>" in section for name in given)
    assert "clinical plausibility" in section


def test_another_judge_leaves_the_verdicts_of_the_first_where_they_are(
    done: tuple[benchmark.Config, benchmark.Summary],
) -> None:
    cfg, _ = done
    other = cfg.model_copy(update={"judge": {"control_regions": 5}, "dry_run": True})
    assert {c.state for c in benchmark.run(other).cells} == {"captioned"}
    slower = cfg.model_copy(update={"judge": {"max_concurrent": 2, "max_usd": 1.0}, "dry_run": True})
    assert {c.state for c in benchmark.run(slower).cells} == {"judged"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"models": {"x": {"captions": {"elsewhere": "t.csv"}}}}, "no dataset of the grid"),
        ({"models": {"x": {"model": "m", "modell": "n"}}}, "modell"),
        ({"models": {"x": {"model": "m", "out": "n"}}}, "the grid itself decides out"),
        ({"judge": {"judge": "oracle"}}, "judge"),
        ({"llm_score": {"models": ["m"]}}, "needs --model and --base-url"),
        ({"prompts": ["a b", "a-b"], "models": {"x": {"model": "m"}}}, "same folder"),
    ],
)
def test_a_grid_that_cannot_work_is_refused_before_anything_is_done(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        grid(tmp_path, **changes)
    assert not (tmp_path / "out").exists()


def test_leaderboard_of_runs_names_what_is_missing(
    done: tuple[benchmark.Config, benchmark.Summary], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg, summary = done
    run = summary.cells[1].run
    with pytest.raises(SystemExit) as code:
        main(["leaderboard", run, summary.cells[2].run, "--out", str(tmp_path / "board"), "--title", "By hand"])
    assert code.value.code == 0
    assert "By hand" in (tmp_path / "board/leaderboard.html").read_text()
    with pytest.raises(ValueError, match="judged twice"):
        leaderboard.run(leaderboard.Config(runs=(run, run), out=str(tmp_path / "twice")))
    with pytest.raises(ValueError, match="is not judged under the name llm"):
        leaderboard.run(leaderboard.Config(runs=(run,), out=str(tmp_path / "x"), judging="llm"))
    with pytest.raises(ValueError, match="not a run directory"):
        leaderboard.run(leaderboard.Config(runs=(cfg.out,), out=str(tmp_path / "x")))


def test_two_judges_of_a_run(done: tuple[benchmark.Config, benchmark.Summary]) -> None:
    run = next(c.run for c in done[1].cells if c.model == "first")
    with pytest.raises(ValueError, match="has 1 finished judgings"):
        check_judges.run(check_judges.Config(run=run))
    questions = str(Path(done[0].out) / "questions/nodules")
    with QuotaServer(Quota(None, latency_s=(0.0, 0.0), seed=3)) as server:
        second = JudgeConfig(
            run=run, questions=questions, judge="llm", models=("m",), base_urls=(server.url,), retention="inside",
            controls=("none",), name="model",
        )  # fmt: skip
        judge.run(second)
    found = check_judges.run(check_judges.Config(run=run))
    (pair,) = found.pairs
    assert (pair.first.partition("-")[0], pair.second) == ("benchmark", "model")
    assert pair.num_both + pair.num_unscored > 100
    assert 0 < pair.same[0] < 1  # the made server answers without reading
    assert pair.alpha is not None
    assert abs(pair.alpha) < 0.4
    with pytest.raises(ValueError, match="judged more than once"):
        leaderboard.run(leaderboard.Config(runs=(run,), out=str(Path(done[0].out) / "x")))


def test_two_readers_and_a_judge(done: tuple[benchmark.Config, benchmark.Summary], tmp_path: Path) -> None:
    sheets = tmp_path / "sheets"
    run = next(c.run for c in done[1].cells if c.model == "first")
    cfg_sheets = adjudicate.SheetsConfig(run=run, judging="benchmark", out=str(sheets), num=40)
    out = adjudicate.write_sheets(cfg_sheets)
    assert (out.num_items, out.num_judged_right) == (40, 20)
    items = {i["item_id"]: i for i in json.loads((sheets / "items.json").read_text())["items"]}
    for reader in ("reader-1", "reader-2"):
        rows = list(csv.DictReader((sheets / f"{reader}.csv").open()))
        assert not {"judge", "verdict", "expected"} & set(rows[0])
        with (sheets / f"{reader}-answers.csv").open("w", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow(["item", "answer"])
            for row in rows:
                question = items[row["item"]]["question"]
                options = [o["id"] for o in question["options"]]
                right = [i for i, o in enumerate(options) if o in question["expected"]]
                wrong = [i for i, o in enumerate(options) if o not in question["expected"]]
                agreed = right if items[row["item"]]["judged_right"] else wrong
                writer.writerow([row["item"], "ABCDEFGH"[agreed[0]]])
        assert "Save the answers" in (sheets / f"{reader}.html").read_text()
    cfg = adjudicate.ScoreConfig(
        sheets=str(sheets), first=str(sheets / "reader-1-answers.csv"), second=str(sheets / "reader-2-answers.csv")
    )
    found = adjudicate.score(cfg)
    assert (found.sensitivity[0], found.specificity[0], found.agreement[0]) == (1, 1, 1)
    assert found.num_reference == 40
    for both in found.scores.values():
        assert both["apparent"][0] == pytest.approx(both["corrected"][0])
    (sheets / "reader-2-answers.csv").write_text("item;answer\n")
    with pytest.raises(ValueError, match="needs the columns item and answer"):
        adjudicate.score(cfg)


def test_phantom_shards_put_truth_blank_and_shuffled_captions_in_their_places(tmp_path: Path) -> None:
    shards = str(tmp_path / "phantoms")
    ingest.run(PhantomsConfig(out=shards, count=12, size=512, images_per_shard=6, num_cpus=2))
    files = sorted((tmp_path / "phantoms/shards").glob("*.parquet"))
    whole = truths(image for file in files for image in read_shard(str(file)))
    captions_import.run(
        captions_import.Config(
            table=write_table(tmp_path / "truth.csv", whole), shards=(shards,), out=str(tmp_path / "run"), model="truth"
        )
    )
    qa.run(qa.Config(shards=(shards,), out=str(tmp_path / "q"), num_cpus=1))
    found = judge.run(JudgeConfig(run=str(tmp_path / "run"), questions=str(tmp_path / "q"), num_cpus=2))
    assert isinstance(found, JudgeSummary)
    strict, paper = found.scores["strict"], found.scores["paper"]
    for sets in (strict, paper):
        assert min(sets["run"].positive.value or 0, sets["run"].negative.value or 0) >= 0.98
        shuffled, majority = sets["shuffled"].average, sets["majority"].average
        assert None not in (shuffled.low, shuffled.high, majority.low, majority.high)
        assert (shuffled.low or 0) <= (majority.high or 0)
        assert (majority.low or 0) <= (shuffled.high or 0)
        assert (shuffled.value or 1) < 0.85
    assert strict["blank"].average.value == strict["blank"].negative.value == 0
    assert (paper["blank"].positive.value, paper["blank"].negative.value) == (0, 1)
    board = leaderboard.run(leaderboard.Config(runs=(str(tmp_path / "run"),), out=str(tmp_path / "board")))
    assert board.systems[0].normalised == pytest.approx(100, abs=3)
    page = (tmp_path / "board/leaderboard.html").read_text()
    assert "dealt out at random among regions of the same kind it scores" in page


def _files(folder: str) -> Files:
    """Every file with its time and content."""
    wanted: Callable[[Path], bool] = Path.is_file
    return {str(p): (p.stat().st_mtime_ns, p.read_bytes()) for p in Path(folder).rglob("*") if wanted(p)}
