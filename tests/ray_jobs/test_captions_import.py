"""Captions of other systems: which tables are taken, what is missing in them, and that a run's tools accept them."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from meddam_core.datasets.phantoms import make_phantom
from meddam_core.judging.controls import LabelledRegion, truth_captions
from meddam_core.records import EncodedImage, Image, Label, Region, Rescale, image_id, region_id
from meddam_core.shards import write_shard
from qa_library import load_library
from ray_jobs import captions_import, report
from ray_jobs.audit import audit
from ray_jobs.cli import main
from ray_jobs.run_directory import RunDirectory
from tests.ray_jobs.made_shards import make_shards


def truth_table(folder: Path, num_images: int, shard: int = 0) -> tuple[str, str]:
    """(shards of phantoms' labels without pixels, a table of captions made from their truth)."""
    images = [_labelled(shard, row) for row in range(num_images)]
    uri = str(folder / "phantoms")
    write_shard(f"{uri}/shards/shard-{shard:06d}.parquet", images)
    regions = [LabelledRegion(r.region_id, i.dataset, i.modality, r.labels) for i in images for r in i.regions]
    table = folder / "truth.csv"
    with table.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["region_id", "caption"])
        writer.writerows(truth_captions(regions, load_library()).items())
    return uri, str(table)


def _labelled(shard: int, row: int) -> Image:
    kind = ("chest", "ct", "skin")[row % 3]
    phantom = make_phantom(kind, seed=0, index=row)  # type: ignore[arg-type]
    ident = image_id(shard, row)
    modality = {"chest": "DX", "ct": "CT", "skin": "XC"}[kind]
    return Image(
        image_id=ident, image_key=f"key-{ident}", dataset="phantoms", recipe=f"phantom-{kind}", modality=modality,
        image=EncodedImage(bytes=b"none"), preview=EncodedImage(bytes=b""), width=512, height=512, rescale=Rescale(),
        licence="CC0-1.0", egress="open", regions=[
            Region(region_id=region_id(ident, i), box=(40 * i, 10, 40 * i + 20, 30), labels=r.labels())
            for i, r in enumerate(phantom.regions[:8])
        ],
    )  # fmt: skip


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_shards(str(tmp_path_factory.mktemp("made") / "set"), 2, 6)


def all_regions(shards: str, tmp_path: Path) -> list[int]:
    listed = captions_import.list_regions(
        captions_import.ListConfig(shards=(shards,), out=str(tmp_path / "regions.csv"))
    )
    with (tmp_path / "regions.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == listed.num_regions
    assert all(int(r["x0"]) < int(r["x1"]) for r in rows)
    return [int(r["region_id"]) for r in rows]


def imported(shards: str, table: Path, out: Path) -> captions_import.Summary:
    return captions_import.run(
        captions_import.Config(table=str(table), shards=(shards,), out=str(out), model="Other-VLM")
    )


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_every_form_of_table_becomes_a_run_that_audits_clean(shards: str, tmp_path: Path, kind: str) -> None:
    regions = all_regions(shards, tmp_path)
    rows = [{"region_id": r, "text": f'A "quoted", two-line\ncaption of {r}.'} for r in reversed(regions)]
    table = tmp_path / f"table.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), table)
    elif kind == "jsonl":
        table.write_text("".join(json.dumps({**r, "region_id": str(r["region_id"])}) + "\n" for r in rows))
    else:
        with table.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, ["region_id", "text"])
            writer.writeheader()
            writer.writerows(rows)
    summary = imported(shards, table, tmp_path / "run")
    assert (summary.state, summary.num_captions, summary.by_reason) == ("complete", len(regions), {})
    run = RunDirectory(str(tmp_path / "run"))
    assert audit(run).clean
    files = run.published()
    assert files is not None
    found = pa.concat_tables([pq.read_table(f, partitioning=None) for f in files])
    assert dict(zip(found["region_id"].to_pylist(), found["text"].to_pylist(), strict=True)) == {
        r: f'A "quoted", two-line\ncaption of {r}.' for r in regions
    }
    assert set(found["model"].to_pylist()) == {"Other-VLM"}


def test_missing_captions_are_failed_rows_and_unknown_regions_are_named(shards: str, tmp_path: Path) -> None:
    regions = all_regions(shards, tmp_path)
    table = tmp_path / "table.csv"
    known = "".join(f"{r},something\n" for r in regions[3:])
    table.write_text("region_id,text\n" + known + "12345,elsewhere\n12345678,elsewhere\n")
    summary = imported(shards, table, tmp_path / "run")
    assert summary.by_reason == {"not_found": 3}
    assert (summary.num_unknown, summary.unknown_regions) == (2, ("12345", "12345678"))
    assert audit(RunDirectory(str(tmp_path / "run"))).clean
    assert "2  rows left out" in "\n".join(summary.lines())
    page = report.run(report.Config(run=str(tmp_path / "run"), num_regions=4))
    assert page.num_captions == len(regions)
    assert page.num_shown >= 4
    assert "Other-VLM" in (tmp_path / "run/report.html").read_text()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("region_id,text\n", "holds no caption"),
        ("region,text\n1,x\n", "needs the columns region_id and text"),
        ("region_id,text\none,x\n", "whole numbers"),
        ("region_id,text\n5,x\n5,y\n", "occur twice, such as that of region 5"),
        ("region_id,text\n5,x\n", "has no caption of a region"),
        ("region_id,text,sample\n5,x,-1\n", "counts a region's captions from 0"),
    ],
)
def test_what_is_no_such_table_is_refused(
    shards: str, tmp_path: Path, text: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "table.csv"
    table.write_text(text)
    args = ["captions", "import", str(table), "--shard", shards, "--out", str(tmp_path / "run"), "--model", "x"]
    with pytest.raises(SystemExit) as ended:
        main(args)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_samples_and_prompts_keep_their_places(shards: str, tmp_path: Path) -> None:
    regions = all_regions(shards, tmp_path)
    lines = [f"{r},{p},{s},{p}{s}" for r in regions for p in ("short", "long") for s in (0, 1)]
    table = tmp_path / "table.csv"
    table.write_text("region_id,prompt_id,sample,text\n" + "\n".join(lines) + "\n")
    summary = imported(shards, table, tmp_path / "run")
    assert (summary.num_captions, summary.by_status) == (4 * len(regions), {"ok": 4 * len(regions)})
    with pytest.raises(ValueError, match="holds a run already"):
        imported(shards, table, tmp_path / "run")


def test_labels_travel_with_the_captions(tmp_path: Path) -> None:
    shards, table = truth_table(tmp_path, num_images=3)
    imported(shards, Path(table), tmp_path / "run")
    files = RunDirectory(str(tmp_path / "run")).published()
    assert files is not None
    labels = pq.read_table(files[0], partitioning=None)["labels"].to_pylist()
    assert all(Label(**row[0]).name for row in labels)
