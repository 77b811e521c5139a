"""Miniature copies of datasets through the real ingest, splits dealt on Ray, and SkinCon on to its captions."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image as PilImage

from meddam_core import storage
from meddam_core.datasets.phantoms import Options, make_phantom
from meddam_core.records import Image
from meddam_core.shards import read_shard
from ray_jobs import caption
from ray_jobs.audit import audit
from ray_jobs.ingest import run
from ray_jobs.ingest_config import Config, ManifestConfig
from ray_jobs.ingest_sources import (
    DicomSegConfig,
    IdridConfig,
    MasksConfig,
    NiftiLabelsConfig,
    NuInsSegConfig,
    PanNukeConfig,
    RtStructConfig,
    SkinConConfig,
    SlidesConfig,
    WebDatasetConfig,
)
from ray_jobs.report import Config as ReportConfig
from ray_jobs.report import run as report
from ray_jobs.run_directory import RunDirectory
from ray_jobs.summary import Summary
from tests.faults.kill_and_resume import MODEL, captions
from tests.meddam_core.datasets import miniatures
from tests.meddam_core.regions.test_promptable import make_sam

pytestmark = pytest.mark.usefixtures("ray_session")


def _images(out: str) -> list[Image]:
    return [i for o in storage.list_objects(storage.join(out, "shards") + "/") for i in read_shard(o.uri)]


def test_skincon_from_tables_to_captions_of_detected_regions(tmp_path: Path) -> None:
    table, fitzpatrick, photographs = miniatures.skincon(tmp_path / "in")
    cfg = SkinConConfig(
        annotations=str(table), images=str(photographs), fitzpatrick=str(fitzpatrick), out=str(tmp_path / "set"),
        images_per_shard=4,
    )  # fmt: skip
    summary = run(cfg)
    assert (summary.num_images, summary.rejected_images) == (6, {"excluded": 1, "not_found": 1})  # type: ignore[union-attr]
    images = _images(cfg.out)
    assert not any(i.regions for i in images) and {i.egress for i in images} == {"deny"}

    job = caption.Config(
        shards=(cfg.out,), out=str(tmp_path / "run"), model=MODEL, engine="benchmarks.waiting_engine:WaitingEngine",
        prompts=("dam-default", "meddam-v1"), max_new_tokens=12,
    )  # fmt: skip
    done = caption.run(job)
    assert isinstance(done, Summary) and done.exit_code == 0
    rows = captions(job.out).to_pylist()
    assert {r["image_id"] for r in rows} == {i.image_id for i in images}
    assert {r["source"] for r in rows} == {"detected"} and all(0 < r["confidence"] <= 1 for r in rows)
    assert done.num_captions == len(rows) == 2 * done.num_regions
    first = next(r for r in rows if r["region_id"] == images[0].image_id << 4)
    labels = {label["name"]: label["value"] for label in first["labels"]}
    assert labels["Vesicle"] == "present" and labels["fitzpatrick_skin_type"] == "1"
    assert labels["roi"] in ("lesion", "central", "whole")
    found = audit(RunDirectory(job.out))
    assert found.clean and found.num_images_without_regions == 6
    assert (found.num_regions, found.num_expected, found.num_missing) == (done.num_regions, len(rows), 0)
    (file,) = RunDirectory(job.out).published() or []
    written = pq.read_table(file, partitioning=None)
    pq.write_table(pa.concat_tables([written.slice(1), written.slice(len(rows) - 1)]), tmp_path / "cut.parquet")
    cut = audit(RunDirectory(job.out), [str(tmp_path / "cut.parquet")])
    assert (cut.num_missing, cut.num_duplicated, cut.clean) == (1, 1, False), "detected regions are audited too"
    estimate: Any = caption.run(job.model_copy(update={"out": str(tmp_path / "dry"), "dry_run": True}))
    assert estimate.num_captions == pytest.approx(len(rows), abs=2)
    report(ReportConfig(run=job.out, out=str(tmp_path / "report.html")))
    assert "Vesicle" in (tmp_path / "report.html").read_text()


def _made(name: str, folder: Path) -> tuple[Config, int, int]:
    """(config, images, regions) of one miniature."""
    out: dict[str, Any] = {"out": str(folder / "out")}
    if name == "idrid":
        return IdridConfig(path=str(miniatures.idrid(folder / "in")), **out), 3, 12
    if name == "pannuke":
        return PanNukeConfig(path=str(miniatures.pannuke(folder / "in")), **out), 4, 4
    if name == "nuinsseg":
        return NuInsSegConfig(path=str(miniatures.nuinsseg(folder / "in")), **out), 2, 2
    if name == "nifti-labels":
        labels, volumes, names = miniatures.nifti_labels(folder / "in")
        return NiftiLabelsConfig(path=str(labels), images=str(volumes), names=str(names), slices="all", **out), 2, 3
    if name == "webdataset":
        return WebDatasetConfig(path=str(miniatures.webdataset(folder / "in/a.tar").parent), **out), 3, 2
    if name == "masks":
        miniatures.save(folder / "in/images/a.png", np.full((40, 60, 3), 99, np.uint8))
        miniatures.save(folder / "in/masks/a_polyp.png", miniatures.disc((60, 40), (20, 20), 8))
        return MasksConfig(path=str(folder / "in/masks"), images=str(folder / "in/images"), **out), 1, 1
    if name == "slides":
        tissue = np.full((600, 800, 3), 240, np.uint8)
        tissue[100:500, 100:700] = np.random.default_rng(0).integers(90, 200, (400, 600, 3), np.uint8)
        miniatures.tiled_tiff(folder / "in/a.tif", tissue, mpp=0.5)
        return SlidesConfig(path=str(folder / "in"), tile_px=128, max_tiles=3, **out), 3, 3
    series = miniatures.ct_series(folder / "in/ct")
    if name == "dicom-seg":
        masks = [miniatures.disc((64, 48), (20, 20), r) for r in (3, 5, 8, 4, 2)]
        miniatures.seg_object(folder / "in/objects/a.dcm", series, masks, ["Liver"])
        return DicomSegConfig(path=str(folder / "in/objects"), images=str(folder / "in/ct"), slices="all", **out), 5, 5
    contour = np.array([(9.5, 9.5), (29.5, 9.5), (29.5, 19.5)])
    miniatures.rtstruct(folder / "in/objects/a.dcm", series, {"GTV": {2: [contour]}})
    return RtStructConfig(path=str(folder / "in/objects"), images=str(folder / "in/ct"), **out), 1, 1


SOURCES = ["idrid", "pannuke", "nuinsseg", "slides", "nifti-labels", "webdataset", "masks", "dicom-seg", "rtstruct"]


@pytest.fixture(scope="module")
def ingested(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Config, Any, int, int]]:
    """Each miniature's (config, summary, images, regions), ingested when first asked for; its shards have numbers of
    their own, so that all of them can be captioned in one run."""

    @cache
    def made(name: str) -> tuple[Config, Any, int, int]:
        cfg, num_images, num_regions = _made(name, tmp_path_factory.mktemp(name))
        cfg = cfg.model_copy(update={"first_shard": 10 * SOURCES.index(name)})
        return cfg, run(cfg), num_images, num_regions

    return made


@pytest.mark.parametrize("name", SOURCES)
def test_a_miniature_goes_through_ingest(
    name: str, ingested: Callable[[str], tuple[Config, Any, int, int]], capfd: pytest.CaptureFixture[str]
) -> None:
    cfg, summary, num_images, num_regions = ingested(name)
    assert (summary.num_images, summary.num_regions) == (num_images, num_regions)
    images = _images(cfg.out)
    assert {i.dataset for i in images} == {cfg.source().dataset}
    assert min(i.image_id for i in images) == cfg.first_shard << 24
    page = report(ReportConfig(run=cfg.out, num_regions=2))
    assert (page.num_regions, page.num_shown) == (num_regions, min(2, num_regions))
    written = b"".join(storage.read_bytes(o.uri) for o in storage.list_objects(cfg.out + "/"))
    said = "".join(capfd.readouterr())
    assert page.out.encode() and b"MedDAM dataset" in written
    assert not [w for w in miniatures.planted() if w.encode() in written or w in said]


def test_all_miniatures_are_captioned_in_one_run(
    ingested: Callable[[str], tuple[Config, Any, int, int]], tmp_path: Path
) -> None:
    made = [ingested(name) for name in SOURCES]
    job = caption.Config(
        shards=tuple(cfg.out for cfg, *_ in made), out=str(tmp_path / "run"), model=MODEL,
        engine="benchmarks.waiting_engine:WaitingEngine", max_new_tokens=12,
    )  # fmt: skip
    done = caption.run(job)
    assert isinstance(done, Summary) and done.exit_code == 0
    num_regions = sum(num for *_, num in made)
    assert (done.num_regions, done.num_captions) == (num_regions, num_regions)
    assert done.by_reason == {}, "every region of every source can be captioned"
    assert audit(RunDirectory(job.out)).clean
    page = report(ReportConfig(run=job.out))
    html = Path(page.out).read_text()
    assert page.num_shown == num_regions
    assert all(f">{cfg.source().dataset}<" in html for cfg, *_ in made)
    assert not [w for w in miniatures.planted() if w in html]


def test_two_datasets_with_the_same_numbers_are_not_mixed(
    ingested: Callable[[str], tuple[Config, Any, int, int]], tmp_path: Path
) -> None:
    cfg, *_ = ingested("masks")
    again = cfg.model_copy(update={"out": str(tmp_path / "again")})
    run(again)
    job = caption.Config(shards=(cfg.out, again.out), out=str(tmp_path / "run"), model=MODEL)
    free = cfg.first_shard + 1
    with pytest.raises(ValueError, match=f"meddam ingest ... --first-shard {free}"):
        caption.run(job)


@pytest.mark.s3
def test_a_source_in_a_bucket(s3_bucket: str, tmp_path: Path) -> None:
    for kind in ("pannuke", "masks"):
        cfg, num_images, num_regions = _made(kind, tmp_path / kind)
        for file in (tmp_path / kind / "in").rglob("*"):
            if file.is_file():
                storage.write_bytes(f"{s3_bucket}/{kind}/{file.relative_to(tmp_path / kind / 'in')}", file.read_bytes())
        moved = {"path": f"{s3_bucket}/{kind}", "out": f"{s3_bucket}/out-{kind}"}
        if kind == "masks":
            moved = {**moved, "path": f"{s3_bucket}/masks/masks", "images": f"{s3_bucket}/masks/images"}
        summary: Any = run(cfg.model_copy(update=moved))
        assert (summary.num_images, summary.num_regions) == (num_images, num_regions)


def test_splits_are_dealt_by_patient_and_look_and_survive_a_resume(tmp_path: Path) -> None:
    lines = ["image,box,patient_id,split"]
    for number in range(24):
        pixels = make_phantom("skin", 3, number % 18, Options(size=512)).stored
        patient = f"P{number // 3}" if number < 9 else ""
        sink = io.BytesIO()
        PilImage.fromarray(pixels).save(sink, "JPEG", quality=95 if number < 18 else 70)  # 18 to 23 repeat 0 to 5
        (tmp_path / f"{number}.jpg").write_bytes(sink.getvalue())
        lines.append(f'{number}.jpg,"10,10,90,90",{patient},given')
    lines.append('absent.jpg,"1,1,9,9",,given')
    (tmp_path / "list.csv").write_text("\n".join(lines))
    cfg = ManifestConfig(
        path=str(tmp_path / "list.csv"), out=str(tmp_path / "out"), splits="train=0.6,test=0.4", images_per_shard=7
    )
    summary: Any = run(cfg)
    assert summary.num_images == 24 and sum(summary.splits.values()) == 24 and set(summary.splits) == {"train", "test"}
    assert 8 <= summary.splits["train"] <= 19
    splits = [i.split for i in _images(cfg.out)]
    groups = [(0, 1, 2, 18, 19, 20), (3, 4, 5, 21, 22, 23), (6, 7, 8)]
    for group in groups:
        assert len({splits[n] for n in group}) == 1, group
    again: Any = run(cfg.model_copy(update={"out": str(tmp_path / "again"), "images_per_shard": 5}))
    assert [i.split for i in _images(str(tmp_path / "again"))] == splits and again.splits == summary.splits
    with pytest.raises(ValueError, match="sum to 1"):
        ManifestConfig(path="x.csv", out="y", splits="train=0.6,test=0.6")


def test_boxes_get_masks_from_a_promptable_model(tmp_path: Path) -> None:
    folder = make_sam(tmp_path / "sam")
    picture = np.kron(np.random.default_rng(0).integers(0, 256, (6, 9, 3), np.uint8), np.ones((9, 9, 1), np.uint8))
    miniatures.save(tmp_path / "a.png", picture)
    lines = ["image,box,mask", 'a.png,"10,10,50,40",', 'a.png,"12,9,70,45",', 'a.png,,"[1,1,9,1,9,9]"']
    (tmp_path / "list.csv").write_text("\n".join(lines))
    cfg = ManifestConfig(path=str(tmp_path / "list.csv"), out=str(tmp_path / "out"), segmenter=str(folder))
    run(cfg)
    (image,) = _images(cfg.out)
    *boxed, drawn = image.regions
    assert len(boxed) == 2
    assert all(r.mask is not None and r.source == "prompted" and r.confidence is not None for r in boxed)
    assert [r.box for r in boxed] == [(10, 10, 50, 40), (12, 9, 70, 45)]
    assert drawn.source == "annotation" and drawn.mask is not None
    with pytest.raises(ValueError, match=r"no config\.json"):
        run(cfg.model_copy(update={"segmenter": str(tmp_path), "out": str(tmp_path / "other")}))
