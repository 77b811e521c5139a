"""As a new user would: the commands of the README and the docs, as they are written, from a bucket to a served model.

Only names are replaced: buckets are on an S3 server on loopback, the weights are the small model's, and `lab/chest`
holds synthetic films. Commands are taken from the pages; one that is reworded there is run as it is worded then, and
one that is gone fails here.
"""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import boto3
import numpy as np
import pytest
from PIL import Image as PILImage

from meddam_core import storage
from meddam_core.models import default_model
from tests.cluster.head import free_ports
from tests.conftest import s3_environment
from tests.test_docs import FENCE, ROOT

pytestmark = [pytest.mark.slow, pytest.mark.s3]
PREPARED = "meddam ingest phantoms --count 6 --size 512 --out s3://lab/chest"


class Reader:
    """A person with an empty folder, a bucket, and the docs."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder, self.environment = folder, environment

    def written(self, page: str, start: str) -> str:
        """The command of a page that begins so, on one line."""
        text = (ROOT / page).read_text()
        lines = [line.strip() for _, block in FENCE.findall(text) for line in block.replace("\\\n", " ").splitlines()]
        found = [re.sub(r"\s+", " ", line.partition("  #")[0]) for line in lines if line.startswith(start)]
        assert found, f"{page} has no command that begins with {start!r}"
        return found[0]

    def types(self, command: str, *, code: int = 0) -> str:
        """Runs it; what it printed."""
        here = re.sub(r"(?<!\w)/weights/DAM-3B", str(default_model()), command)  # not the key in a bucket
        here = here.replace("/secure/", f"{self.folder}/")
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", here], cwd=self.folder, env=self.environment, capture_output=True,
            text=True, check=False, timeout=1200,
        )  # fmt: skip
        assert done.returncode == code, f"{here}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done.stdout + done.stderr

    def follows(self, page: str, *starts: str) -> str:
        """Types commands of a page, in this order; what the last one printed."""
        return [self.types(self.written(page, start)) for start in starts][-1]


@pytest.fixture(scope="module")
def reader(s3_endpoint: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reader]:
    folder = tmp_path_factory.mktemp("reader")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3_environment(s3_endpoint).items():
            patch.setenv(name, value)
        for bucket in ("lab", "bucket"):
            boto3.client("s3").create_bucket(Bucket=bucket)
        yield Reader(folder, os.environ | {"PATH": path, "HOME": str(folder)})


@pytest.fixture(scope="module")
def films(reader: Reader) -> None:
    """A manifest of a few pictures of two patients, as a lab would have one: as CSV and as JSONL."""
    rows = []
    for i in range(4):
        picture = np.random.default_rng(i).integers(0, 255, (96, 96, 3), np.uint8)
        PILImage.fromarray(picture).save(reader.folder / f"film-{i}.png")
        rows.append({"image": f"film-{i}.png", "box": [8, 8, 60, 60], "label": "nodule", "patient_id": f"P{i % 2}",
                     "study_id": f"S{i}"})  # fmt: skip
    with (reader.folder / "regions.csv").open("w", newline="") as stream:
        table = csv.DictWriter(stream, rows[0])
        table.writeheader()
        table.writerows(rows)
    (reader.folder / "list.jsonl").write_text("\n".join(json.dumps(row) for row in rows))


def test_the_readmes_own_steps(reader: Reader, films: None) -> None:
    caption = "meddam caption s3://lab/chest --out s3://lab/runs/one --model /weights/DAM-3B"
    said = reader.follows("README.md", "meddam ingest manifest", caption + " --dry-run")
    assert "4 images" in said and not storage.list_objects("s3://lab/runs/one/")
    assert "complete: 4 images, 4 regions, 4 captions" in reader.types(caption)
    assert "clean" in reader.follows("README.md", "meddam audit")
    reader.follows("README.md", "meddam report")
    assert "film-" not in (reader.folder / "one.html").read_text()
    reader.follows("docs/cluster.md", "meddam report s3://lab/runs/one")
    assert storage.exists("s3://lab/runs/one/report.html")


def test_a_patient_can_be_found_and_withdrawn(reader: Reader, films: None) -> None:
    told = reader.follows("docs/security.md", "mkdir -p ~/.meddam", "meddam ingest manifest")
    assert "crosswalk: 2 patients, 4 studies" in told
    assert (reader.folder / "crosswalk.csv").stat().st_mode & 0o777 == 0o600
    secret = reader.written("docs/security.md", "export MEDDAM_SECRET=")
    reader.types("meddam caption s3://lab/films --out s3://lab/runs/films --model /weights/DAM-3B")
    withdraw = secret + "; meddam withdraw s3://lab/films s3://lab/runs/films --patient-id P1"
    assert reader.written("docs/security.md", "meddam withdraw").startswith(
        "meddam withdraw s3://lab/vindr s3://lab/runs"
    )
    assert "2 images of the patient" in reader.types(withdraw)
    assert "clean: 2 images" in reader.types("meddam audit s3://lab/runs/films")


def test_from_captions_to_scores_and_training_data(reader: Reader) -> None:
    for place in ("chest", "runs", "questions"):
        for o in storage.list_objects(f"s3://lab/{place}/"):
            storage.delete(o.uri)
    reader.types(PREPARED)
    reader.follows("docs/training.md", "meddam caption s3://lab/chest --num-samples 4")
    reader.follows("docs/judging.md", "meddam qa build s3://lab/chest")
    said = reader.follows("docs/judging.md", "meddam judge s3://lab/runs/one --questions s3://lab/questions")
    assert "MedDLC-score" in said
    reader.follows(
        "docs/training.md", "meddam judge s3://lab/runs/one", "meddam curate s3://lab/runs/one --min-logprob"
    )
    assert storage.exists("s3://lab/sets/one/curation.json")
    reader.follows("docs/benchmark.md", "meddam check claims", "meddam adjudicate sheets", "meddam grounded")
    reader.types("meddam judge s3://lab/runs/one --questions s3://lab/questions --name second")
    reader.follows("docs/benchmark.md", "meddam check judges")
    assert (reader.folder / "sheets/reader-1.html").exists() and (reader.folder / "reports/report.html").exists()
    variants = reader.written("docs/benchmark.md", "meddam check variants").replace("s3://lab/vindr", "s3://lab/chest")
    reader.types(variants)
    for name in ("moved", "blanked", "normal"):
        reader.types(f"meddam caption s3://lab/variants/{name} --out s3://lab/runs/{name} --model /weights/DAM-3B")
    reader.follows("docs/benchmark.md", "meddam check grounding")
    reader.types("meddam export s3://lab/sets/one --format llava --out llava")


def test_files_are_moved_and_merged(reader: Reader) -> None:
    weights = Path(default_model())
    for file in sorted(weights.rglob("*")):
        if file.is_file():
            storage.write_bytes(f"s3://lab/weights/DAM-3B/{file.relative_to(weights)}", file.read_bytes())
    fetch = reader.written("docs/cluster.md", "meddam fetch-weights s3://lab/weights/DAM-3B /weights/DAM-3B")
    reader.types(" ".join([*fetch.split()[:-1], "here"]))
    assert (reader.folder / "here/config.json").is_file()
    reader.types("meddam ingest phantoms --count 6 --size 512 --images-per-shard 2 --out s3://bucket/lidc")
    assert "3 files into 1: 6 rows" in reader.follows("docs/runs.md", "meddam compact s3://bucket/lidc")
    (reader.folder / "run.yaml").write_text("max_new_tokens: 8\nimages_per_batch: 4\n")
    reader.follows("docs/runs.md", "meddam caption s3://bucket/lidc")
    assert "complete" in reader.types("meddam status s3://bucket/runs/lidc")


def test_the_model_is_served(reader: Reader) -> None:
    (port,) = free_ports(1)
    serve = reader.written("docs/cluster.md", "meddam serve").replace("/weights/DAM-3B", str(default_model()))
    command = ["bash", "-c", f"exec {serve} --port {port}"]
    process = subprocess.Popen(command, cwd=reader.folder, env=reader.environment, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        said = next(line for line in process.stderr if "serving on" in line)
        assert f":{port}" in said
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=60) as page:
            assert "text/html" in page.headers["Content-Type"]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=60) as models:
            assert json.load(models)["data"]
    finally:
        process.terminate()
        assert process.wait(timeout=120) == 0
