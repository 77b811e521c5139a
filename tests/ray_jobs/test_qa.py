"""`meddam qa`: the question table of shards and of runs, and what it says about what was not asked."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from meddam_core.records import EncodedImage, Image, Label, Region, Rescale, Window, image_id, region_id
from meddam_core.shards import write_shard
from ray_jobs import qa
from ray_jobs.cli import main
from ray_jobs.question_files import open_questions

NODULE = [Label(name="calcification", value="6", trust=1.0), Label(name="margin", value="5", trust=1.0),
          Label(name="spiculation", value="1", trust=0.4)]  # fmt: skip


def labelled(
    shard: int, row: int, recipe: str = "ct", center: float | None = -600, regions: int = 2, dataset: str = "lidc-idri"
) -> Image:
    ident = image_id(shard, row)
    window = None if center is None else Window(center=center, width=400)
    return Image(
        image_id=ident, image_key=f"key-{ident}", dataset=dataset, recipe=recipe, modality="CT",
        image=EncodedImage(bytes=b"no picture is read"), preview=EncodedImage(bytes=b""), width=512, height=512,
        rescale=Rescale(), window=window, licence="CC BY 3.0", regions=[
            Region(region_id=region_id(ident, i), box=(100 * i, 10, 100 * i + 20, 30), labels=NODULE)
            for i in range(regions)
        ],
    )  # fmt: skip


def table(tmp_path: Path, *images: Image, **settings: object) -> qa.Summary:
    write_shard(str(tmp_path / "set/shards/shard-000000.parquet"), images)
    cfg = qa.Config(shards=(str(tmp_path / "set"),), out=str(tmp_path / "q"), num_cpus=1, **settings)  # type: ignore[arg-type]
    return qa.run(cfg)


@pytest.mark.parametrize(
    ("recipe", "center", "window", "asked"),
    [
        ("ct", -600, None, False),
        ("ct", 40, None, True),
        ("ct", None, None, False),
        ("ct", -600, "soft_tissue", True),
        ("ct", 40, "lung", False),
        ("lidc-idri", 40, None, False),
        ("lidc-idri-soft", -600, None, True),
        ("lidc-idri-three-window", -600, None, True),
    ],
)
def test_calcification_is_asked_only_where_the_rendering_can_show_it(
    tmp_path: Path, recipe: str, center: float | None, window: str | None, asked: bool
) -> None:
    summary = table(tmp_path, labelled(0, 0, recipe, center), window=window, max_positives=20)
    attributes = {q.attribute for q in open_questions(str(tmp_path / "q")).all()}
    assert ("calcification" in attributes) is asked
    assert any(reason == "not_shown" and what == "calcification" for reason, what, _ in summary.dropped) is not asked


def test_the_table_is_the_same_each_time_and_refuses_to_become_another(tmp_path: Path) -> None:
    first = table(tmp_path, *(labelled(0, row) for row in range(5)), seed=3)
    bytes_then = (tmp_path / "q/questions/questions-000000.parquet").read_bytes()
    (tmp_path / "q/summary.json").unlink()
    cfg = qa.Config(shards=(str(tmp_path / "set"),), out=str(tmp_path / "q"), num_cpus=1, seed=3)
    assert qa.run(cfg) == first
    assert (tmp_path / "q/questions/questions-000000.parquet").read_bytes() == bytes_then
    with pytest.raises(ValueError, match="seed: 3 -> 4"):
        qa.run(cfg.model_copy(update={"seed": 4}))


def test_what_was_not_asked_is_counted_by_reason(tmp_path: Path) -> None:
    summary = table(tmp_path, labelled(0, 0), labelled(0, 1, dataset="unheard-of"))
    dropped = {(reason, what): n for reason, what, n in summary.dropped}
    assert dropped["no_template_set", "unheard-of"] == 2
    assert dropped["not_shown", "calcification"] == 2
    assert summary.num_regions == 4
    assert "  no template set fits the dataset unheard-of" in "\n".join(summary.lines()).replace(
        "no_template_set: ", " "
    )


def test_questions_of_a_few_regions_are_found_in_a_large_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray_jobs.question_files.GROUP_QUESTIONS", 16)
    table(tmp_path, *(labelled(0, row) for row in range(40)))
    files = open_questions(str(tmp_path / "q"))
    assert len(files.groups) > 10
    everything = list(files.all())
    ids, counts = files.counts()
    assert (len(ids), counts.sum()) == (80, len(everything))
    some = [int(ids[3]), int(ids[50])]
    found = files.of([*some, 12345])
    assert {r: [q.question_id for q in qs] for r, qs in found.items()} == {
        r: [q.question_id for q in everything if q.region_id == r] for r in some
    }
    assert np.all(np.diff([q.region_id for q in everything]) >= 0)


def test_what_is_no_question_table_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="meddam qa build"):
        open_questions(str(tmp_path))
    write_shard(str(tmp_path / "x.parquet"), [labelled(0, 0)])
    with pytest.raises(ValueError, match="is no question table"):
        open_questions(str(tmp_path / "x.parquet"))


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_shard(str(tmp_path / "set/shards/shard-000000.parquet"), [labelled(0, 0)])
    for args, code, said in (
        (["qa", "lint"], 0, "no fault"),
        (["qa", "show"], 0, "lidc_idri"),
        (["qa", "show", "lidc_idri"], 0, "recognition:"),
        (["qa", "show", "lidc_idri", "margin"], 0, "poorly defined"),
        (["qa", "show", "lidc_idri", "colour"], 2, "has no attribute 'colour'"),
        (["qa", "build", str(tmp_path / "set"), "--out", str(tmp_path / "q"), "--num-cpus", "1"], 0, "2 regions"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(args)
        printed = capsys.readouterr()
        assert (ended.value.code or 0) == code
        assert said in printed.out + printed.err
    assert json.loads((tmp_path / "q/summary.json").read_text())["num_regions"] == 2
