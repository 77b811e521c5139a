"""`meddam judge` end to end on Ray: lexical and model judges, controls, resume, and what bad input gets."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from meddam_core import storage
from meddam_core.judging.llm_score import FACTORS
from meddam_core.records import image_id, region_id
from ray_jobs import captions_import, judge, qa
from ray_jobs.judge_config import Config
from ray_jobs.judge_estimate import Estimate
from ray_jobs.judge_summary import Summary
from ray_jobs.judging_directory import Judging, list_judgings
from ray_jobs.question_files import open_questions
from ray_jobs.run_directory import RunDirectory
from tests.faults.judge_quota import Made, make_run
from tests.faults.quota_server import Quota, QuotaServer, paid_more_than_once
from tests.ray_jobs.test_captions_import import truth_table

IMAGES = 8


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make_run(tmp_path_factory.mktemp("made"), IMAGES)


def judged(made: Made, **settings: object) -> Summary:
    found = judge.run(Config(run=made.run, questions=made.questions, **settings))  # type: ignore[arg-type]
    assert isinstance(found, Summary)
    return found


def named(made: Made, name: str) -> Judging:
    return next(j for j in list_judgings(RunDirectory(made.run)) if j.name == name)


def model(server: QuotaServer, **settings: object) -> dict[str, object]:
    return {"judge": "llm", "models": ("m",), "base_urls": (server.url,), "retention": "inside",
            "timeout_s": 5.0, **settings}  # fmt: skip


@pytest.mark.s3
def test_truth_scores_100_blank_0_and_shuffled_as_the_majority(
    ray_session: None, s3_bucket: str, tmp_path: Path
) -> None:
    """The whole way on phantoms, in a bucket: questions, captions made from the truth, verdicts, scores."""
    shards, table = truth_table(tmp_path, num_images=9)
    captions_import.run(captions_import.Config(table=table, shards=(shards,), out=f"{s3_bucket}/run", model="truth"))
    qa.run(qa.Config(shards=(shards,), out=f"{s3_bucket}/q", num_cpus=1))
    cfg = Config(run=f"{s3_bucket}/run", questions=f"{s3_bucket}/q")
    summary = judge.run(cfg)
    assert isinstance(summary, Summary)
    assert judge.run(cfg) == summary
    assert (summary.state, summary.exit_code) == ("complete", 0)
    for variant in ("paper", "strict"):
        sets = summary.scores[variant]
        values = {of: s.average.value for of, s in sets.items()}
        assert values["run"] == values["truth"] == pytest.approx(1.0, abs=0.02)
        assert sets["run"].normalised == pytest.approx(1.0, abs=0.05)
        shuffled, majority = sets["shuffled"].average, sets["majority"].average
        assert shuffled.low is not None and majority.high is not None
        assert shuffled.low <= majority.high
    assert summary.scores["strict"]["blank"].average.value == 0
    assert summary.scores["paper"]["blank"].positive.value == 0
    assert any("omission" in a for a in summary.assumptions)
    assert "MedDLC-score, strict" in "\n".join(summary.lines())
    assert json.loads(summary.model_dump_json())["scores"]["strict"]["run"]["average"]["value"] > 0.98


def test_one_row_a_caption_one_verdict_a_question_and_a_second_run_changes_nothing(
    ray_session: None, made: Made
) -> None:
    summary = judged(made, name="lexical", controls=("blank",), captions_per_file=5)
    rows = list(named(made, "lexical").rows())
    expected = [region_id(image_id(0, row), i) for row in range(IMAGES) for i in (0, 1)]
    assert [r.region_id for r in rows] == expected
    assert Counter(v.question_id for r in rows for v in r.verdicts) == Counter(
        q.question_id for q in open_questions(made.questions).all()
    )
    assert (summary.num_captions, summary.num_verdicts) == (2 * IMAGES, made.num_questions)
    files = {f: storage.read_bytes(f) for f in named(made, "lexical").verdict_files()}
    assert len(files) == 4
    assert judged(made, name="lexical", controls=("blank",), captions_per_file=5) == summary
    storage.delete(named(made, "lexical").at("summary.json"))
    storage.delete(sorted(files)[1])
    judged(made, name="lexical", controls=("blank",), captions_per_file=5)
    assert {f: storage.read_bytes(f) for f in named(made, "lexical").verdict_files()} == files
    with pytest.raises(ValueError, match="is another judging"):
        judged(made, name="lexical", controls=("blank",), captions_per_file=8)


def test_a_model_judge_through_faults_its_budget_and_to_the_end(ray_session: None, made: Made) -> None:
    shares = {"error": 0.06, "prose": 0.05, "letter": 0.03, "lie": 0.1, "close": 0.04}
    with QuotaServer(Quota(None, latency_s=(0.0, 0.02), shares=shares, seed=1)) as server:
        settings = model(server, name="model", controls=("none",), price_prompt=100.0, captions_per_file=8)
        dry = judge.run(Config(run=made.run, questions=made.questions, dry_run=True, **settings))  # type: ignore[arg-type]
        assert isinstance(dry, Estimate)
        assert (dry.num_calls, dry.num_verdicts) == (made.num_questions, made.num_questions)
        assert not server.seen
        stopped = judged(made, max_usd=dry.usd * 0.3, **settings)
        assert (stopped.state, stopped.exit_code) == ("stopped", 3)
        assert "max_usd is reached" in (stopped.why or "")
        assert stopped.calls["spent_usd"] <= dry.usd * 0.3
        assert stopped.scores == {}, "what is not judged to the end is not scored"
        paid = len(server.seen)
        summary = judged(made, **settings)
        assert summary.state == "complete"
        assert paid_more_than_once(server.seen) == 0
        assert summary.calls["num_calls"] == len(server.seen) > paid > 0
        unscored = sum(summary.unscored.values())
        assert 0 < unscored == summary.by_outcome["unscored"]
        assert set(summary.unscored) <= {"unparsable", "call_failed"}
        assert summary.scores["paper"]["run"].average.value is not None
        before = len(server.seen)
        server.quota.shares.clear()
        asked_again = judged(made, retry_unscored=True, **settings)
        assert (asked_again.unscored, len(server.seen) - before) == ({}, unscored)


def test_a_panel_says_how_far_its_members_agree(ray_session: None, made: Made) -> None:
    with QuotaServer(Quota(None, latency_s=(0.0, 0.0))) as server:
        settings = model(server) | {"judge": "panel", "models": ("a", "b"), "controls": ("none",), "name": "panel"}
        summary = judged(made, retest=True, control_regions=6, **settings)
        asked = len(server.seen)
    assert summary.judge.startswith("panel(")
    assert summary.agreement["num_questions"] == made.num_questions
    row = next(named(made, "panel").rows())
    assert [len(v) for v in row.votes] == [3] * row.num_questions
    assert 0 < summary.retest["num_questions"] < made.num_questions
    assert asked == 2 * (made.num_questions + summary.retest["num_questions"] + summary.retest["num_unscored"])
    assert summary.retest["same"] == 1.0, "this server answers by what it is asked, whatever the seed"
    assert set(summary.scores["paper"]) == {"run"}


def test_llm_score_rates_each_factor_and_stands_apart_from_verdicts(ray_session: None, made: Made) -> None:
    with QuotaServer(Quota(None, latency_s=(0.0, 0.0), shares={"prose": 0.1}, seed=6)) as server:
        settings = model(server) | {"judge": "llm-score", "name": "rated"}
        dry = judge.run(Config(run=made.run, questions=made.questions, dry_run=True, **settings))  # type: ignore[arg-type]
        assert isinstance(dry, Estimate)
        summary = judged(made, **settings)
        assert dry.num_calls == len(server.seen) == summary.num_verdicts == 4 * 2 * IMAGES
        prose = sum(s.outcome == "prose" for s in server.seen)
    assert summary.unscored == {"unparsable": prose}
    rows = list(Judging(RunDirectory(made.run), "rated", "ratings").rows())
    rated = [float(v.choice) for r in rows for v in r.verdicts if v.choice is not None]
    assert len(rated) == summary.num_verdicts - prose
    factors = [summary.llm_score[f].value for f in FACTORS]
    assert summary.llm_score["score"].value == pytest.approx(sum(f or 0.0 for f in factors) / 4, abs=1e-5)
    assert "saw no image" in (summary.basis or "")
    assert "rated" not in {j.name for j in list_judgings(RunDirectory(made.run))}


def test_no_byte_leaves_where_the_policy_forbids_it(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    with pytest.raises(ValueError, match=r"no caption may go to judge.example.*lidc-idri \(deny\)"):
        judged(made, judge="llm", models=("m",), base_urls=("https://judge.example/v1",))
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(ValueError, match="holds no key"):
        judged(made, judge="llm", models=("m",), base_urls=("https://judge.example/v1",))
    with pytest.raises(ValueError, match="needs https"):
        judged(made, judge="llm", models=("m",), base_urls=("http://judge.example/v1",))


def test_a_table_about_other_regions_is_refused_and_gaps_are_named(
    ray_session: None, made: Made, tmp_path: Path
) -> None:
    other = make_run(tmp_path / "other", IMAGES + 6)
    summary = judged(Made(made.run, other.questions, 0), name="gaps", controls=("none",))
    assert summary.coverage["num_without_captions"] == 12
    assert summary.coverage["without_captions"][0] == str(region_id(image_id(0, IMAGES), 0))
    fewer = judged(Made(other.run, made.questions, 0), name="fewer", controls=("none",))
    assert fewer.coverage["num_without_questions"] == 12
    assert sum(r.num_questions == 0 for r in named(other, "fewer").rows()) == 12
    assert "12  captioned regions without a question" in "\n".join(fewer.lines())
    far = tmp_path / "far"
    qa.run(qa.Config(shards=(truth_table(far, num_images=3, shard=9)[0],), out=str(far / "q"), num_cpus=1))
    with pytest.raises(ValueError, match="the table belongs to other shards"):
        judged(Made(made.run, str(far / "q"), 0))
    with pytest.raises(ValueError, match="is not a complete run"):
        judged(Made(str(tmp_path / "nothing"), made.questions, 0))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"judge": "llm"}, "needs --model and --base-url"),
        ({"models": ("m",)}, "the lexical judge uses no model"),
        ({"retest": True}, "is for models"),
        ({"controls": ("blnk",)}, "no control blnk"),
        ({"judge": "llm", "models": ("a", "b"), "base_urls": ("http://h/v1",)}, "takes one --model"),
        ({"judge": "panel", "models": ("a",), "base_urls": ("http://h/v1",), "lexical_member": False}, "at least two"),
        ({"judge": "llm", "models": ("a",), "base_urls": ("http://h/v1",), "max_usd": 1.0}, "needs --price-prompt"),
        ({"judge": "llm", "models": ("a",), "base_urls": ("h/v1",)}, "must begin with http"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Config(run="r", questions="q", **{"retention": "inside", **settings})  # type: ignore[arg-type]
