"""`meddam report` on a published run: its figures, its pictures, and what happens when a shard is gone."""

from __future__ import annotations

import base64
import dataclasses
import io
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image as PILImage

from meddam_core.captioner import RegionPreparer, ViewRules
from meddam_core.records import Caption, Image, Status, arrow_schema, to_row
from meddam_core.shards import read_shard
from ray_jobs import report
from ray_jobs.run_directory import MANIFEST, RUN, SUMMARY, RunDirectory
from ray_jobs.snapshot import snapshot
from tests.ray_jobs.made_shards import make_shards

VIEWS = {"size": 56, "aspect": None, "margin": 0.25, "window": None}


def captions_of(image: Image) -> list[Caption]:
    """A caption for each region; that of every fourth image failed."""
    failed = image.image_id % 4 == 3
    shared = {
        f.name: getattr(image, f.name)
        for f in dataclasses.fields(Caption)
        if f.name in {g.name for g in dataclasses.fields(Image)} and f.name != "labels"
    }
    return [
        Caption(
            region_id=r.region_id, prompt_id="p", sample=0, text=None if failed else f"caption of {r.region_id}",
            num_tokens=0 if failed else 5, mean_logprob=None if failed else -0.5,
            finish_reason=None if failed else "stop", status=Status.FAILED if failed else Status.OK,
            reason="corrupt" if failed else None, detail="the pixels end too soon" if failed else None, box=r.box,
            mask=None, source=r.source, confidence=None, labels=[], attempt=1, model="m", engine="torch",
            kernels="torch", **shared,
        )
        for r in image.regions
    ]  # fmt: skip


def publish(directory: RunDirectory, shards: str) -> list[Image]:
    """A run directory as `meddam caption` leaves it, a caption file a shard; returns the images."""
    inputs = snapshot([shards])
    images, files = [], []
    for i, shard in enumerate(inputs):
        held = list(read_shard(shard.uri))
        images += held
        rows = [to_row(c) for image in held for c in captions_of(image)]
        target = Path(directory.generation(1)) / f"captions-{i:06d}.parquet"
        target.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows, schema=arrow_schema(Caption)), target)
        files.append({"name": target.name})
    directory.write_inputs(inputs)
    engine = {"engine": "torch", "kernels": "torch", "dtype": "float32"}
    sampling = {"max_new_tokens": 9, "temperature": 0.0, "top_p": 1.0, "top_k": 0, "seed": 0}
    fingerprint = {
        "inputs": "a" * 64, "weights": "b" * 64, "prompts": {"p": "v"}, "num_samples": 1, "sampling": sampling,
        "views": VIEWS, "engine": engine,
    }  # fmt: skip
    described = {
        "meddam": "0.1.0", "model": "dam@0123", "fingerprint": fingerprint, "prompt_texts": {"p": "<image> What?"},
        "versions": {"torch": "2", "deepspeed": None}, "licence": "captions inherit licences",
    }  # fmt: skip
    directory.write_json(described, RUN)
    directory.write_json({"files": files}, "captions", "gen=1", MANIFEST)
    summary = {"state": "complete", "generation": 1, "attempt": 1, "session": {"seconds": 3.5}, "audit": None}
    directory.write_json(summary, SUMMARY)
    return images


@pytest.fixture
def run(tmp_path: Path) -> tuple[RunDirectory, list[Image]]:
    directory = RunDirectory(str(tmp_path / "run"))
    return directory, publish(directory, make_shards(str(tmp_path / "set"), 2, 12))


def test_a_report_of_a_run(run: tuple[RunDirectory, list[Image]]) -> None:
    directory, images = run
    found = report.run(report.Config(run=directory.uri, num_regions=6))
    num_captions = sum(len(i.regions) for i in images)
    assert (found.num_captions, found.num_without_picture, found.exit_code) == (num_captions, 0, 0)
    assert found.num_shown == 6 + report.FAILED_IN_GALLERY
    html = Path(directory.at("report.html")).read_text()
    assert html.count("<article>") == found.num_shown
    assert html.count("the pixels end too soon") >= report.FAILED_IN_GALLERY
    assert "dam@0123" in html
    assert "greedy, at most 9 tokens" in html
    assert directory.uri in html


def test_a_card_shows_its_own_region_as_the_model_saw_it(run: tuple[RunDirectory, list[Image]]) -> None:
    directory, images = run
    image = next(i for i in images if len(i.regions) == 3)
    caption = captions_of(image)[1]
    (entry,) = report.pictured([caption], directory.inputs(), RegionPreparer(ViewRules(**VIEWS)))
    assert image.image.bytes is not None
    pixels = np.asarray(PILImage.open(io.BytesIO(image.image.bytes)))
    assert np.array_equal(entry.full_HWC, pixels)
    x0, y0, x1, y1 = caption.box
    assert entry.prompt_box is not None
    px0, py0, px1, py1 = entry.prompt_box
    assert px0 <= x0 - 7 or px0 == 0
    assert px1 >= x1 + 7 or px1 == image.width
    assert (py0 <= y0, py1 >= y1) == (True, True)
    assert entry.mask_HW is None
    assert entry.crop_HWC.shape[0] >= min(py1 - py0, image.height)


def test_the_picture_in_the_page_is_that_of_its_caption(run: tuple[RunDirectory, list[Image]]) -> None:
    directory, images = run
    report.run(report.Config(run=directory.uri, num_regions=3))
    html = Path(directory.at("report.html")).read_text()
    by_key = {i.image_id: i for i in images}
    for card in re.findall(r"<article>.*?</article>", html, flags=re.DOTALL)[:3]:
        region = int(re.search(r"caption of (\d+)", card)[1])  # type: ignore[index]
        encoded = re.search(r'<image href="data:image/jpeg;base64,([^"]+)"', card)
        assert encoded
        shown = np.asarray(PILImage.open(io.BytesIO(base64.b64decode(encoded[1])))).astype(int)
        stored = by_key[region >> 4].image.bytes
        assert stored is not None
        pixels = np.asarray(PILImage.open(io.BytesIO(stored))).astype(int)
        assert np.abs(shown - pixels).mean() < 30


def test_a_shard_that_is_gone_costs_its_pictures_only(run: tuple[RunDirectory, list[Image]]) -> None:
    directory, _ = run
    Path(directory.inputs()[0].uri).unlink()
    found = report.run(report.Config(run=directory.uri, num_regions=200, num_failures=0))
    assert found.num_without_picture > 0
    assert found.num_shown > 0
    assert "no picture can be had" in "\n".join(found.lines())


@pytest.mark.s3
def test_a_report_on_s3(s3_bucket: str, run: tuple[RunDirectory, list[Image]]) -> None:
    directory, _ = run
    found = report.run(report.Config(run=directory.uri, out=f"{s3_bucket}/reports/one.html", num_regions=2))
    assert found.out == f"{s3_bucket}/reports/one.html"
    from meddam_core import storage

    assert storage.read_bytes(found.out).startswith(b"<!doctype html>")


def test_a_run_that_is_not_published_has_no_report(run: tuple[RunDirectory, list[Image]]) -> None:
    directory, _ = run
    Path(directory.at(SUMMARY)).unlink()
    with pytest.raises(ValueError, match="is not complete: run the same `meddam caption` again"):
        report.run(report.Config(run=directory.uri))
