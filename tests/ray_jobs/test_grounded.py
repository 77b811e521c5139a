"""`meddam grounded`: reports of images whose every phrase leads to a place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ray_jobs import captions_import, grounded
from ray_jobs.cli import main
from tests.ray_jobs.made_lidc_rows import make_nodule_shards, truths, write_table


@pytest.fixture
def run(tmp_path: Path) -> tuple[str, list[int]]:
    images = make_nodule_shards(tmp_path / "set", 5)
    captions = truths(images)
    captions[images[0].regions[0].region_id] = "A <b>spiculated</b> nodule, no lobulation."
    table = write_table(tmp_path / "captions.csv", captions)
    captions_import.run(
        captions_import.Config(table=table, shards=(str(tmp_path / "set"),), out=str(tmp_path / "run"), model="m")
    )
    return str(tmp_path / "run"), [i.image_id for i in images]


def test_a_report_for_each_image_and_a_page(run: tuple[str, list[int]], tmp_path: Path) -> None:
    uri, ids = run
    with pytest.raises(SystemExit) as code:
        main(["grounded", uri, "--out", str(tmp_path / "out"), "--title", "Five slices"])
    assert code.value.code == 0
    page = (tmp_path / "out/report.html").read_text()
    assert "Five slices" in page
    assert "VividMed" in page
    assert "<b>spiculated</b>" not in page
    assert page.count("<article ") == page.count('<g class="region"') == 10
    assert "http" not in page.split("</head>")[1]
    for ident in ids:
        report = json.loads((tmp_path / f"out/{ident}.json").read_text())
        assert report["image_id"] == str(ident)
        assert [r["number"] for r in report["regions"]] == [1, 2]
        for region in report["regions"]:
            assert f"Region {region['number']}. {region['text']}" in report["text"]
            assert len(region["box"]) == 4
            assert region["phrases"]
            for phrase in region["phrases"]:
                assert region["text"][phrase["start"] : phrase["end"]] == phrase["text"]
    first = json.loads((tmp_path / f"out/{ids[0]}.json").read_text())["regions"][0]
    assert [(p["value"], p["status"]) for p in first["phrases"]] == [
        ("spiculated", "stated"), ("lidc_idri", "stated"), ("lobulated", "denied")
    ]  # fmt: skip


def test_chosen_images_and_what_is_not_there(run: tuple[str, list[int]], tmp_path: Path) -> None:
    uri, ids = run
    out = str(tmp_path / "out")
    found = grounded.run(grounded.Config(run=uri, out=out, images=(ids[2],)))
    assert (found.num_images, found.num_regions) == (1, 2)
    with pytest.raises(ValueError, match="no captions of the image 999"):
        grounded.run(grounded.Config(run=uri, out=out, images=(999,)))
    with pytest.raises(ValueError, match="by the prompt other"):
        grounded.run(grounded.Config(run=uri, out=out, prompt_id="other"))
    (tmp_path / "set/shards/shard-000000.parquet").unlink()
    gone = grounded.run(grounded.Config(run=uri, out=out))
    assert (gone.num_images, gone.num_without_picture, gone.exit_code) == (0, 5, 3)
