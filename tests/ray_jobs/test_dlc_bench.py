"""`meddam dlc-bench` on a folder of the benchmark's form: captions, a real judge server, scores, and verify."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as PilImage

from meddam_core.dam.checkpoint import load_dam
from meddam_core.engines.likelihood import caption_likelihoods
from meddam_core.judging.dlc_bench import write_predictions
from meddam_core.judging.dlc_bench_images import QUERY, bench_regions, verify
from meddam_core.judging.dlc_bench_rules import JUDGE_MODEL
from ray_jobs import dlc_bench
from ray_jobs.cli import main
from tests.faults.kill_and_resume import MODEL
from tests.faults.quota_server import Quota, QuotaServer, Seen

NUM = 6
PUBLISHED = Path(__file__).parents[3] / "shared/data/dlc_bench/dam_3b_v1_eval.json"


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six annotations on three pictures, with questions, as the benchmark lays them out."""
    folder = tmp_path_factory.mktemp("bench")
    (folder / "images").mkdir()
    images, annotations, qa, names = [], [], {}, {}
    for i in range(NUM // 2):
        picture = np.random.default_rng(i).integers(0, 255, (12, 16, 3), np.uint8)
        PilImage.fromarray(np.kron(picture, np.ones((16, 16, 1), np.uint8))).save(folder / f"images/{i}.png")
        images.append({"id": i, "file_name": f"{i}.png", "width": 256, "height": 192})
        for j in range(2):
            key = 100 + 2 * i + j
            x = 20 + 110 * j
            annotations.append(
                {"id": key, "image_id": i, "segmentation": [[x, 30, x + 80, 30, x + 80, 120, x, 120]],
                 "bbox": [x, 30, 80, 90], "category_id": 1}
            )  # fmt: skip
            qa[str(key)] = [
                {"question": "What colour is it?", "choices": [["Red", 1], ["Blue", 0], ["Not said", 0], ["Green", -1]],
                 "type": "positive"},
                {"question": "Has it wheels?", "choices": [["Yes", -1], ["No", 1]], "type": "negative",
                 "subtype": "salient negative"},
            ]  # fmt: skip
            names[str(key)] = "apple"
    (folder / "annotations.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    (folder / "qa.json").write_text(json.dumps(qa))
    (folder / "class_names.json").write_text(json.dumps(names))
    return folder


class Judge(QuotaServer):
    """Recognises everything, finds it red and without wheels; now and then a fault."""

    def text(self, asked: dict[str, Any], seen: Seen) -> str:
        message = asked["messages"][0]["content"]
        assert asked["max_tokens"] == 300
        return "A. Yes" if "likely" in message else "A. Red" if "colour" in message else "B"


def run_config(bench: Path, out: Path, server: QuotaServer, **settings: Any) -> dlc_bench.RunConfig:
    return dlc_bench.RunConfig(bench=str(bench), out=str(out), base_url=server.url, retention="inside", **settings)


def test_captions_judge_and_scores_and_a_resume_asks_nothing(bench: Path, tmp_path: Path) -> None:
    with Judge(Quota(None, latency_s=(0, 0.01), shares={"error": 0.06, "limited": 0.02}, seed=4)) as server:
        cfg = run_config(bench, tmp_path / "out", server, model=MODEL, max_new_tokens=8, engine="torch", device="cpu")
        scores = dlc_bench.run(cfg)
        assert (scores.avg_pos, scores.avg_neg, scores.avg, scores.num_keys) == (1.0, 1.0, 1.0, NUM)
        assert scores.judge == JUDGE_MODEL and scores.note is None
        asked = len(server.seen)
        assert asked > 3 * NUM, "the faults must have come"
        assert dlc_bench.run(cfg) == scores
        assert len(server.seen) == asked
        other = cfg.model_copy(update={"judge_model": "another", "out": str(tmp_path / "other"), "model": None,
                                       "predictions": str(tmp_path / "out/predictions.json")})  # fmt: skip
        assert "not comparable" in (dlc_bench.run(other).note or "")
    captions = json.loads((tmp_path / "out/predictions.json").read_text())
    assert captions.pop("query") == QUERY
    assert len(set(captions.values())) > 1, "each region must be shown to the model"
    again = dlc_bench.score(dlc_bench.ScoreConfig(answers=str(tmp_path / "out/evaluation.json")))
    assert (again.avg_pos, again.avg_neg, again.avg) == (1.0, 1.0, 1.0)


def test_verify_passes_for_captions_of_what_is_shown_and_for_no_others(bench: Path) -> None:
    """A "model" that knows how bright a region's crop is, so that the right views must reach it."""
    regions = list(bench_regions(bench))
    brightness = {r.key: float(r.views(64)[0, 4:7].mean()) for r in regions}
    assert len({round(b, 3) for b in brightness.values()}) == NUM

    def likelihoods(views: Any, texts: Any) -> list[float]:
        return [-abs(float(views[0, 4:7].mean()) - float(t)) for t in texts]

    own = {k: str(b) for k, b in brightness.items()}
    found = verify(regions, own, likelihoods, 64)
    assert (found.passed, found.num_likelier, found.mean_own) == (True, NUM, 0.0)
    keys = sorted(own)
    moved = {k: own[keys[(i + 1) % NUM]] for i, k in enumerate(keys)}
    assert not verify(regions, moved, likelihoods, 64).passed
    with pytest.raises(ValueError, match="at least two regions"):
        verify(regions, {keys[0]: "1"}, likelihoods, 64)


def test_verify_asks_the_checkpoint(bench: Path, tmp_path: Path) -> None:
    captions = {r.key: f"A thing of kind {i}." for i, r in enumerate(bench_regions(bench))}
    write_predictions(tmp_path / "some.json", captions, QUERY)
    cfg = dlc_bench.VerifyConfig(bench=str(bench), model=MODEL, predictions=str(tmp_path / "some.json"), device="cpu")
    found = dlc_bench.verify_checkpoint(cfg)
    dam, regions = load_dam(MODEL), list(bench_regions(bench))
    own = [caption_likelihoods(dam, r.views(dam.config.view_size), QUERY, [captions[r.key]])[0].mean for r in regions]
    assert found.mean_logprob_own == pytest.approx(sum(own) / NUM, abs=1e-4)
    assert (found.passed, found.exit_code) == (False, 1), "random weights know nothing of these captions"
    assert "NOT passed" in found.lines()[0]


def test_folders_and_files_that_do_not_fit_are_named(bench: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no annotations"):
        list(bench_regions(tmp_path))
    with pytest.raises(ValueError, match="1 regions are not in"):
        list(bench_regions(bench, ["9"]))
    with pytest.raises(ValueError, match="either --model, or --predictions"):
        dlc_bench.RunConfig(bench=str(bench), out="o", base_url="http://h/v1")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "there is no file"),
        ("[1]", "holds no object"),
        ('{"1": {"details_positives": [{}]}}', "no evaluation file"),
    ],
)
def test_what_is_no_evaluation_file_is_refused(
    tmp_path: Path, text: str | None, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "answers.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(SystemExit) as ended:
        main(["dlc-bench", "score", "--answers", str(file)])
    assert ended.value.code == 2
    printed = capsys.readouterr().err
    assert said in printed
    assert len(printed.splitlines()) == 1


@pytest.mark.skipif(not PUBLISHED.is_file(), reason="the published replies are not beside the repository")
def test_the_published_replies_give_the_published_figures(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["dlc-bench", "score", "--answers", str(PUBLISHED), "--json"])
    assert not ended.value.code
    found = json.loads(capsys.readouterr().out)
    assert [round(found[k], 4) for k in ("avg_pos", "avg_neg", "avg")] == [0.5102, 0.83, 0.6701]
    stored = json.loads(PUBLISHED.read_text())
    for key, entry in found["per_key"].items():
        assert [entry[k] for k in ("score_pos", "score_neg", "score")] == pytest.approx(
            [stored[key][k] for k in ("score_pos", "score_neg", "score")]
        )
