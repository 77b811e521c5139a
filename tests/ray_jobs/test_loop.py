"""`meddam loop`: sets stay apart, the test stays locked, rounds end when development says so, kills lose nothing."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pyarrow.parquet as pq
import pytest
import yaml

from meddam_core.models import default_model
from meddam_core.shards import read_shard
from ray_jobs import ingest, loop, loop_stages
from ray_jobs.ingest_config import PhantomsConfig
from ray_jobs.loop_config import Arm, Config
from ray_jobs.loop_sets import check_apart, write_truth_captions
from ray_jobs.loop_state import LOOP, ArmState, LoopState, Reading, Round, Score
from ray_jobs.options import build
from ray_jobs.run_directory import RunDirectory
from tests.faults.processes import descendants, kill
from tests.ray_jobs.made_shards import make_shards


def config(place: Path, **changed: Any) -> Config:
    values = {
        "out": str(place), "model": "m", "labelled": ["a"], "unlabelled": ["b"], "development": ["c"], "test": ["d"],
        "same_judge": True, **changed,
    }  # fmt: skip
    return build(Config, values)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"same_judge": False}, "another judge than the one that curates"),
        ({"model": "tiny"}, "knows nothing to begin with"),
        ({"caption": {"num_samples": 1}}, "needs verdicts on unlabelled regions"),
        ({"caption": {"num_samples": 2, "model": "x"}}, "the loop itself decides model"),
        ({"finetune": {"steps": 3}}, "finetune: steps"),
        ({"curate": {"min_truth": 0.5}}, "--hide-truth hides"),
        ({"arms": ["curated", "curated"]}, "each arm once"),
        ({"out": "s3://b/x"}, "--weights"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_anything_is_done(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        config(tmp_path / "out", **changes)


def test_another_judge_may_read_the_test(tmp_path: Path) -> None:
    llm = {"judge": "llm", "models": ["m"], "base_urls": ["http://judge/v1"], "retention": "inside"}
    cfg = config(tmp_path, same_judge=False, test_judge=llm)
    assert loop._remarks(cfg) == []
    assert "One judge both curated" in loop._remarks(config(tmp_path))[0]
    test = cfg.scoring("out", {"start": "m"}, test=True)
    assert test.questions == {"seed": 1, "wording": "held-out", "num_cpus": 1}
    assert test.judge == llm


def test_sets_that_share_a_picture_or_a_patient_are_refused(tmp_path: Path) -> None:
    one, two = (make_shards(str(tmp_path / n), 1, 4, seed=s) for n, s in (("one", 1), ("two", 2)))
    with pytest.raises(ValueError, match="the labelled and the test shards share 4 pictures"):
        check_apart({"labelled": [one], "test": [one]})
    with pytest.raises(ValueError, match="share 4 pictures"):  # made_shards give the same keys to other pictures
        check_apart({"unlabelled": [one], "test": [two]})
    ingest_one, again = (str(tmp_path / n) for n in ("p1", "p2"))
    settings: dict[str, Any] = {"count": 2, "size": 512, "kinds": ("skin",), "num_cpus": 2}
    for uri, first_shard in ((ingest_one, 0), (again, 50)):  # other ids, and other secrets for the keys
        ingest.run(PhantomsConfig(out=uri, first_shard=first_shard, **settings))
    with pytest.raises(ValueError, match="share 2 pictures"):
        check_apart({"labelled": [ingest_one], "development": [again]})
    other = str(tmp_path / "p3")
    ingest.run(PhantomsConfig(out=other, first=2, labels=False, **settings))
    assert check_apart({"labelled": [ingest_one], "test": [other]}) == {"labelled": 2, "test": 2}
    _nothing_known(other)
    assert write_truth_captions([ingest_one], str(tmp_path / "truth"), "meddam-v1", 3, seed=0) % 3 == 0
    with pytest.raises(ValueError, match="only phantoms tell their own captions"):
        write_truth_captions([other], str(tmp_path / "none"), "meddam-v1", 3, seed=0)


def _nothing_known(uri: str) -> None:
    for file in sorted((Path(uri) / "shards").glob("*.parquet")):
        for image in read_shard(str(file)):
            assert image.labels == []
            assert image.regions
            assert all(r.labels == [] for r in image.regions)


@pytest.mark.parametrize(
    ("scores", "patience", "min_gain", "ended"),
    [
        ([50], 1, 0, None),
        ([50, 52], 1, 0, None),
        ([50, 50], 1, 0, "has not risen for 1 round"),
        ([50, 52, 51], 2, 0, None),
        ([50, 52, 51, 52], 2, 0, "has not risen for 2 rounds"),
        ([50, 51], 1, 2, "has not risen"),
        ([50, 51, 52, 53], 1, 0, "3 rounds were asked for"),
    ],
)
def test_an_arm_ends_when_development_stops_rising(
    tmp_path: Path, scores: list[float], patience: int, min_gain: float, ended: str | None
) -> None:
    cfg = config(tmp_path, patience=patience, min_gain=min_gain)
    found = loop._ended(cfg, [Score(value=s / 100) for s in scores])
    assert found is None if ended is None else ended in str(found)


def test_a_loop_whose_test_was_read_cannot_choose_again(tmp_path: Path) -> None:
    cfg = config(tmp_path)
    state = LoopState(
        fingerprint={k: v for k, v in cfg.model_dump(mode="json").items() if k not in loop.FREE},
        config=cfg.model_dump(mode="json"), num_images={}, judge="j", arms=[ArmState(name="curated")],
        test=Reading(opened_at="then", judge="j", models={"start": "m"}),
    )  # fmt: skip
    directory = RunDirectory(str(tmp_path))
    directory.write_json(state.model_dump(mode="json"), LOOP)
    with pytest.raises(ValueError, match="has been read"):
        loop.run(cfg.model_copy(update={"max_rounds": 9}))
    with pytest.raises(ValueError, match=r"begun with other settings: seed: 0 -> 3"):
        loop.run(cfg.model_copy(update={"seed": 3}))


# -- the whole, on phantoms and with the packaged model ----------------------------------------------------------------


@pytest.fixture(scope="module")
def sets(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder, found = tmp_path_factory.mktemp("sets"), {}
    for number, name in enumerate(("labelled", "unlabelled", "development", "test")):
        found[name] = str(folder / name)
        ingest.run(
            PhantomsConfig(
                out=found[name], count=3, first=3 * number, size=512, first_shard=10 * number, max_lesions=2,
                distractors=False, phantom_seed=5, labels=name != "unlabelled", num_cpus=2,
            )
        )  # fmt: skip
    return found


def whole(sets: dict[str, str], out: Path, **changed: Any) -> dict[str, Any]:
    return {
        "out": str(out), "model": str(default_model()), **{n: [uri] for n, uri in sets.items()},
        "arms": ["curated", "uncurated"], "max_rounds": 1, "same_judge": True, "num_cpus": 2,
        "caption": {"num_samples": 2, "temperature": 0.5, "max_new_tokens": 40}, "curate": {"min_verdicts": 0.01},
        "judge": {"controls": ["none"]}, "test_judge": {"controls": ["majority"]},
        "finetune": {"max_steps": 2, "batch_size": 2, "num_workers": 0, "num_threads": 1, "dtype": "float32",
                     "learning_rate": 1e-4, "warmup_steps": 1},
        **changed,
    }  # fmt: skip


@pytest.mark.slow
def test_a_loop_goes_on_where_it_was_killed(sets: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "loop"
    (tmp_path / "loop.yaml").write_text(yaml.safe_dump(whole(sets, out)))
    command = [sys.executable, "-m", "ray_jobs.cli", "loop", "--config", str(tmp_path / "loop.yaml")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as driver:
        assert driver.stderr is not None
        for line in driver.stderr:  # killed in round 1, as the set is chosen or the model trained
            if "step " in line:
                break
        below = descendants(driver.pid)
        driver.send_signal(signal.SIGKILL)
    for pid in below:
        kill(pid)
    noted = json.loads((out / LOOP).read_text())
    assert noted["test"] is None
    captions = {f: f.stat().st_mtime_ns for f in (out / "curated/round-1/captions").rglob("*.parquet")}
    summary = loop.run(build(Config, {}, tmp_path / "loop.yaml"))
    assert summary.exit_code == 0
    assert captions
    assert all(f.stat().st_mtime_ns == at for f, at in captions.items())
    _holds_what_it_promises(out, summary)
    _is_left_alone(out, tmp_path / "loop.yaml", summary)


def _holds_what_it_promises(out: Path, summary: loop.Summary) -> None:
    state = summary.state
    curated, uncurated = state.arms
    for arm in (curated, uncurated):
        assert [r.number for r in arm.rounds] == [1]
        assert arm.rounds[0].captions == str(out / "curated/round-1/captions")  # round 1 is shared
        assert (out / arm.name / "round-1/ft/model/config.json").exists()
    assert uncurated.rounds[0].num_kept > 0 and uncurated.rounds[0].dropped.keys() <= {"status"}  # cut at 40 tokens
    assert 0 < curated.rounds[0].num_kept < curated.rounds[0].num_captions
    kept = pq.read_table(out / "curated/round-1/set/captions").to_pylist()
    assert all(r["labels"] == [] and r["truth_share"] is None and r["verdict_share"] is not None for r in kept)
    assert state.test is not None
    assert "start" in state.test.scores and "majority" in state.test.scores
    assert state.test.models.keys() == {"start", "curated-round-1", "uncurated-round-1"}
    files = (out / "test/questions/test").rglob("*.parquet")
    questions = [row for file in files for row in pq.read_table(file).to_pylist()]
    assert questions and all(q["template_id"].endswith("+held-out") for q in questions)
    page = (out / "report.html").read_text()
    assert "One judge both curated and read the test" in page and "round 1" in page


def _is_left_alone(out: Path, settings: Path, summary: loop.Summary) -> None:
    before = {f: f.stat().st_mtime_ns for f in out.rglob("*.parquet")}
    assert loop.run(build(Config, {}, settings)).state.test == summary.state.test
    assert {f: f.stat().st_mtime_ns for f in out.rglob("*.parquet")} == before


def test_a_round_that_keeps_nothing_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Nothing:
        num_captions, num_kept, dropped = 7, 0, {"length": 7}

    work = loop._Loop(config(tmp_path), RunDirectory(str(tmp_path)), _state(tmp_path))
    for name, value in (("caption", None), ("judge", None), ("choose", Nothing())):
        monkeypatch.setattr(loop_stages.Stages, name, lambda *_, value=value: value)
    with pytest.raises(loop.Unfinished, match="kept none of 7 captions"):
        work._choose(work.state.arms[0], Round(number=1), "m")


def test_the_captions_of_labelled_phantoms_lie_in_no_arms_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An arm's folder holds further tables, which would be read as captions, too."""
    monkeypatch.setattr(loop_stages, "write_truth_captions", lambda *_: None)
    (folder,) = loop_stages.Stages(config(tmp_path)).labelled_captions()
    assert Path(folder).parent == tmp_path and Path(folder).name not in get_args(Arm)


def _state(out: Path) -> LoopState:
    cfg = config(out)
    return LoopState(fingerprint={}, config=cfg.model_dump(mode="json"), num_images={}, judge="j",
                     start_model="m", start=Score(value=0.5), arms=[ArmState(name="curated")])  # fmt: skip
