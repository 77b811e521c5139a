"""Every job as a cluster gets it: `ray job submit ... -- python -m ray_jobs.X`, with a token, one after another.

What is planted in the data (a patient, words of captions and prompts) must be in no log of the cluster: neither what
jobs print nor what Ray keeps on the nodes.
"""

from __future__ import annotations

import csv
import json
import subprocess
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image as PILImage

from meddam_core.models import default_model
from tests.cluster.head import SUBMIT, Head, free_ports

PATIENT, STUDY = "Wunderlich-471100", "Accession-20610307"
FILE = "edeltraud_wunderlich_thorax"
IN_PROMPT = "vermilion trapezoid"
IN_CAPTION = "cobalt dodecahedron"
SECRET = "a long random text of this test"
PLANTED = (PATIENT, STUDY, FILE, IN_PROMPT, IN_CAPTION, SECRET)

pytestmark = pytest.mark.slow


@dataclass(frozen=True, kw_only=True)
class Places:
    """What jobs read and write."""

    folder: Path
    secret: Path
    prompt: Path

    def at(self, *names: str) -> str:
        return str(self.folder.joinpath(*names))

    def json(self, *names: str) -> Any:
        return json.loads(self.folder.joinpath(*names).read_text())


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Places:
    """Eight pictures of four patients in a manifest; their names stand in the manifest and its files only."""
    folder = tmp_path_factory.mktemp("jobs")
    lines = []
    for i in range(8):
        picture = np.random.default_rng(i).integers(0, 255, (64, 64, 3), np.uint8)
        PILImage.fromarray(picture).save(folder / f"{FILE}_{i}.png")
        lines.append({"image": f"{FILE}_{i}.png", "box": [8, 8, 40, 40], "label": "nodule", "split": "train",
                      "patient_id": f"{PATIENT}-{i % 4}", "study_id": f"{STUDY}-{i}"})  # fmt: skip
    (folder / "manifest.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    (folder / "secret").write_text(SECRET)
    (folder / "prompt.txt").write_text(f"<image>\nDescribe the {IN_PROMPT}.")
    return Places(folder=folder, secret=folder / "secret", prompt=folder / "prompt.txt")


def done(job: subprocess.CompletedProcess[str], says: str = "") -> None:
    assert job.returncode == 0, job.stdout[-4000:] + job.stderr[-2000:]
    assert says in job.stdout, job.stdout[-4000:]


def _caption(places: Places) -> tuple[str, ...]:
    return (
        "ray_jobs.caption", places.at("set"), "--out", places.at("run"), "--model", str(default_model()), "--prompt",
        str(places.prompt), "--max-new-tokens", "16",
    )  # fmt: skip


def test_from_a_manifest_to_a_report(head: Head, places: Places) -> None:
    at, model = places.at, str(default_model())
    done(head.job("ray_jobs.doctor", "--model", model, "--bucket", at("runs")), "RAY_AUTH_MODE=token")
    done(
        head.job(
            "ray_jobs.ingest", "manifest", at("manifest.jsonl"), "--out", at("set"), "--secret-file",
            str(places.secret), "--licence", "CC0-1.0", "--egress", "open", "--pixels-cleared",
        ), "8 images with 8 regions",
    )  # fmt: skip
    done(head.job("ray_jobs.cost", at("set"), "--captions-per-s", "2"), "8 regions")
    done(head.job("ray_jobs.stage_profile", at("set"), "--num-images", "2", "--size", "112"), "read")
    done(head.job(*_caption(places)), "complete: 8 images, 8 regions, 8 captions")
    done(head.job("ray_jobs.status", at("run")), "8 captions published")
    done(head.job("ray_jobs.audit", at("run")), "clean: 8 images")
    done(head.job("ray_jobs.retry", at("run")), "complete")
    done(head.job("ray_jobs.report", at("run"), "--out", at("run.html")))
    assert (places.folder / "run.html").stat().st_size > 10_000
    done(head.job("ray_jobs.grounded", at("run"), "--out", at("grounded")))
    done(head.job("ray_jobs.check_claims", at("run")))
    image = ("ray_jobs.describe", at("film.png"), "--box", "8,8,40,40", "--max-new-tokens", "4")
    PILImage.open(places.folder / f"{FILE}_0.png").save(places.folder / "film.png")
    done(head.job(*image))
    done(head.job("ray_jobs.fetch_weights", model, at("weights")))
    assert (places.folder / "weights/config.json").is_file()


def test_from_captions_to_judgement_training_and_exports(head: Head, places: Places) -> None:
    at = places.at
    done(head.job("ray_jobs.ingest", "phantoms", "--count", "6", "--size", "512", "--out", at("phantoms")), "6 images")
    done(head.job("ray_jobs.captions_import", "list", at("phantoms"), "--out", at("regions.csv")))
    with (places.folder / "regions.csv").open() as read, (places.folder / "table.csv").open("w") as write:
        rows = csv.writer(write)
        rows.writerow(["region_id", "caption"])
        rows.writerows(
            (r["region_id"], f"A {IN_CAPTION} with a smooth margin, number {i}.")
            for i, r in enumerate(csv.DictReader(read))
        )
    done(
        head.job(
            "ray_jobs.captions_import", "import", at("table.csv"), "--shard", at("phantoms"), "--out", at("given"),
            "--model", "another-system",
        )
    )  # fmt: skip
    done(head.job("ray_jobs.qa", "build", at("phantoms"), "--out", at("questions")))
    done(head.job("ray_jobs.judge", at("given"), "--questions", at("questions")), "MedDLC-score")
    done(head.job("ray_jobs.leaderboard", at("given"), "--out", at("board")))
    done(head.job("ray_jobs.judge", at("given"), "--questions", at("questions"), "--name", "second"))
    done(head.job("ray_jobs.check_judges", at("given")), "second")
    second = ("--judging", "second")
    done(head.job("ray_jobs.adjudicate", "sheets", at("given"), "--out", at("sheets"), "--num", "4", *second))
    done(head.job("ray_jobs.curate", at("given"), "--out", at("chosen")))
    done(head.job("ray_jobs.export", at("chosen"), "--out", at("llava"), "--format", "llava"))
    trained = ("--max-steps", "2", "--batch-size", "2", "--dtype", "float32", "--num-threads", "1")
    done(
        head.job(
            "ray_jobs.finetune", at("phantoms"), "--caption", at("chosen"), "--model", str(default_model()), "--out",
            at("tuned"), *trained,
        )
    )  # fmt: skip
    assert (places.folder / "tuned/model/config.json").is_file()
    grid = {
        "datasets": {"phantoms": at("phantoms")}, "models": {"given": {"captions": {"phantoms": at("table.csv")}}},
        "prompts": ["dam-default"],
    }  # fmt: skip
    (places.folder / "grid.yaml").write_text(yaml.safe_dump(grid))
    done(head.job("ray_jobs.benchmark", "--config", at("grid.yaml"), "--out", at("bench")))
    done(head.job("ray_jobs.check_grounding", "variants", at("phantoms"), "--out", at("variants")))
    done(head.job("ray_jobs.check_pairs", at("phantoms"), "--model", str(default_model()), "--out", at("pairs.json"),
                  "--num-images", "1", "--pairs-per-region", "1"))  # fmt: skip


def test_a_patient_is_withdrawn_by_a_job(head: Head, places: Places) -> None:
    (shard,) = (places.folder / "set/shards").glob("*.parquet")
    key = pq.read_table(shard, columns=["patient_key"])["patient_key"][0].as_py()
    withdrawn = head.job("ray_jobs.withdraw", places.at("set"), places.at("run"), "--patient-key", key)
    done(withdrawn, "2 images of the patient")
    done(head.job("ray_jobs.audit", places.at("run")), "clean: 6 images")
    done(head.job(*_caption(places)), "complete: 6 images")


def test_the_endpoint_is_a_job_too_and_ends_when_it_is_stopped(head: Head) -> None:
    (port,) = free_ports(1)
    job = ("python", "-m", "ray_jobs.serve.job", "--port", str(port), "--host", "127.0.0.1")
    assert head.ray(*SUBMIT, "--no-wait", "--submission-id", "endpoint", "--", *job).returncode == 0
    deadline = time.monotonic() + 200
    while True:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=10) as answer:
                assert json.load(answer)["data"]
            break
        except OSError:
            assert time.monotonic() < deadline, head.ray("job", "logs", "endpoint").stdout[-3000:]
            time.sleep(0.5)
    assert head.ray("job", "stop", "endpoint").returncode == 0
    assert "draining" in head.ray("job", "logs", "endpoint").stdout


@pytest.mark.parametrize(
    ("module", "words", "code", "says"),
    [
        ("ray_jobs.judge", ["{nothing}", "--questions", "{nothing}"], 2, "holds no finished question table"),
        ("ray_jobs.audit", ["{nothing}"], 2, "is not a run directory"),
        ("ray_jobs.report", ["--no-such-option", "{nothing}"], 2, "No such option"),
        ("ray_jobs.ingest", ["manifest", "{broken}", "--out", "{out}"], 3, "no image could be read"),
    ],
)
def test_a_job_that_fails_says_so_and_ends_with_its_code(
    head: Head, tmp_path: Path, module: str, words: list[str], code: int, says: str
) -> None:
    (tmp_path / "broken.jsonl").write_text('{"image": "absent.png", "box": [1, 2, 30, 40]}')
    named = {"nothing": str(tmp_path), "broken": str(tmp_path / "broken.jsonl"), "out": str(tmp_path / "out")}
    failed = head.job(module, *[w.format(**named) for w in words])
    text = failed.stdout + failed.stderr
    assert failed.returncode != 0 and says in text, text[-3000:]
    assert f"exit code {code}" in text, text[-3000:]


def test_no_log_of_the_cluster_holds_a_payload(head: Head, places: Places) -> None:
    """The last of this file: after all jobs."""
    tables = [pq.read_table(f) for f in (places.folder / "run/captions").rglob("*.parquet")]
    captions = [text for table in tables for text in table["text"].to_pylist() if text and len(text) > 12]
    assert captions
    searched = [*PLANTED, *captions]
    texts = {p.name: p.read_bytes().decode(errors="replace") for p in head.logs.rglob("*") if p.is_file()}
    assert sum(name.startswith("job-driver-") for name in texts) > 20
    assert [(name, word) for name, text in texts.items() for word in searched if word in text] == []
