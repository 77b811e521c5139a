"""The flat table from nested parts, and the audit that must see whatever is missing or twice."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from meddam_core.records import (
    Caption,
    CaptionedImage,
    Image,
    Label,
    RegionCaption,
    Rle,
    Status,
    arrow_schema,
    from_row,
    to_row,
)
from meddam_core.shards import read_shard, write_shard
from ray_jobs.audit import audit
from ray_jobs.publish import _flat_part, _superseded, flatten
from ray_jobs.run_directory import MANIFEST, RUN, SUMMARY, RunDirectory
from ray_jobs.snapshot import snapshot
from tests.ray_jobs.made_shards import make_shards


def _captioned(image: Image, prompts: tuple[str, ...] = ("p1",), attempt: int = 1) -> CaptionedImage:
    captions = [
        RegionCaption(region_id=r.region_id, prompt_id=p, text=f"{r.region_id} {p}", num_tokens=3, finish_reason="stop")
        for r in image.regions
        for p in prompts
    ]
    return CaptionedImage(
        image_id=image.image_id, image_key=image.image_key, dataset=image.dataset, split=image.split,
        recipe=image.recipe, modality=image.modality, width=image.width, height=image.height, licence=image.licence,
        egress=image.egress, regions=image.regions, captions=captions, attempt=attempt, model="m", engine="e",
        kernels="k",
    )  # fmt: skip


def _table(rows: list[CaptionedImage]) -> pa.Table:
    return pa.Table.from_pylist([to_row(r) for r in rows], schema=arrow_schema(CaptionedImage))


@pytest.fixture
def images(tmp_path: Path) -> list[Image]:
    make_shards(str(tmp_path / "set"), 1, 12)
    return list(read_shard(str(tmp_path / "set/shards/shard-000000.parquet")))


@pytest.fixture
def run(tmp_path: Path, images: list[Image]) -> RunDirectory:
    directory = RunDirectory(str(tmp_path / "run"))
    directory.write_inputs(snapshot([str(tmp_path / "set")]))
    directory.write_json({"fingerprint": {"prompts": {"p1": "v", "p2": "v"}, "num_samples": 1}}, RUN)
    return directory


def _published(run: RunDirectory, rows: list[CaptionedImage]) -> RunDirectory:
    return _announced(run, flatten(_table(rows)))


def _announced(run: RunDirectory, flat: pa.Table) -> RunDirectory:
    folder = Path(run.generation(1))
    folder.mkdir(parents=True)
    pq.write_table(flat, folder / "captions-000000.parquet")
    run.write_json({"files": [{"name": "captions-000000.parquet"}]}, "captions", "gen=1", MANIFEST)
    run.write_json({"generation": 1}, SUMMARY)
    return run


def test_every_caption_becomes_a_row_with_its_own_region_and_image(images: list[Image]) -> None:
    labelled = replace(
        images[2].regions[1], labels=[Label(name="finding", value="nodule", trust=0.5)],
        mask=Rle(size=(96, 96), counts="abc"), source="consensus", confidence=0.25,
    )  # fmt: skip
    images[2] = replace(images[2], regions=[images[2].regions[0], labelled, images[2].regions[2]])
    rows = [from_row(Caption, r) for r in flatten(_table([_captioned(i, ("p1", "p2")) for i in images])).to_pylist()]
    assert [(r.region_id, r.prompt_id) for r in rows] == [
        (r.region_id, p) for i in images for r in i.regions for p in ("p1", "p2")
    ]
    by_id = {r.region_id: (r, i) for i in images for r in i.regions}
    for row in rows:
        region, image = by_id[row.region_id]
        assert row.text == f"{region.region_id} {row.prompt_id}"
        assert (row.image_id, row.image_key, row.width) == (image.image_id, image.image_key, image.width)
        assert (row.box, row.mask, row.source, row.labels) == (region.box, region.mask, region.source, region.labels)
        assert row.confidence == region.confidence


def test_a_sliced_part_flattens_like_a_whole_one(images: list[Image]) -> None:
    table = _table([_captioned(i) for i in images])
    assert flatten(table.slice(3, 4)).equals(flatten(_table([_captioned(i) for i in images[3:7]])))


def test_the_audit_of_a_whole_run_is_clean(run: RunDirectory, images: list[Image]) -> None:
    found = audit(_published(run, [_captioned(i, ("p1", "p2")) for i in images]))
    assert found.clean
    assert (found.num_images, found.num_regions, found.num_expected, found.num_published) == (12, 23, 46, 46)
    assert found.num_images_without_regions == 1
    assert found.by_status == {"ok": 46}


def test_the_audit_sees_an_image_that_is_missing(run: RunDirectory, images: list[Image]) -> None:
    found = audit(_published(run, [_captioned(i, ("p1", "p2")) for i in images[1:]]))
    assert not found.clean
    assert (found.num_missing, found.missing_regions) == (2, [str(images[0].regions[0].region_id)])


def test_the_audit_sees_one_prompt_missing_and_another_twice(run: RunDirectory, images: list[Image]) -> None:
    rows = [_captioned(i, ("p1", "p2")) for i in images]
    rows[1] = replace(rows[1], captions=[*rows[1].captions[:-1], rows[1].captions[0]])
    found = audit(_published(run, rows))
    assert (found.num_missing, found.num_duplicated, found.num_unexpected) == (1, 1, 0)


def test_the_audit_sees_captions_that_nobody_asked_for(run: RunDirectory, images: list[Image]) -> None:
    rows = [_captioned(i, ("p1", "p2")) for i in images]
    stranger = replace(rows[0], image_id=99, regions=[replace(r, region_id=99 << 4) for r in rows[0].regions],
                       captions=[replace(c, region_id=99 << 4) for c in rows[0].captions])  # fmt: skip
    found = audit(_published(run, [*rows, stranger]))
    assert (found.num_missing, found.num_unexpected) == (0, 2)


def test_an_unpublished_run_is_missing_everything(run: RunDirectory) -> None:
    found = audit(run)
    assert (found.published, found.num_missing, found.clean) == (False, 46, False)


def _failing(image: CaptionedImage, num: int) -> CaptionedImage:
    """With its first captions failed."""
    failed = [replace(c, status=Status.FAILED, reason="endpoint", text=None) for c in image.captions[:num]]
    return replace(image, captions=[*failed, *image.captions[num:]])


def _part(run: Path, attempt: int, name: str, rows: list[CaptionedImage]) -> tuple[int, str]:
    path = run / f"parts/attempt={attempt}/{name}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(_table([replace(r, attempt=attempt) for r in rows]), path)
    return attempt, str(path)


def test_of_equal_attempts_the_latest_wins_and_then_the_first_file(tmp_path: Path, images: list[Image]) -> None:
    rows = [_captioned(i) for i in images]
    parts = [_part(tmp_path, 1, "a", rows[:3]), _part(tmp_path, 1, "b", rows[2:6])]
    parts += [_part(tmp_path, 2, "c", [rows[4], rows[0]])]
    assert _superseded(parts) == {parts[0][1]: [0], parts[1][1]: [0, 2]}
    assert _superseded(parts[:1]) == {} and _superseded([]) == {}


def test_the_attempt_that_failed_least_wins(run: RunDirectory, images: list[Image]) -> None:
    """A retry captions an image again as a whole, good captions too, and may meet a bad endpoint again."""
    rows = [_captioned(i, ("p1", "p2")) for i in images]
    one, all_of_them = 1, 99
    parts = [
        _part(Path(run.uri), 1, "a", [_failing(r, one) for r in rows[:4]] + rows[4:]),
        _part(Path(run.uri), 2, "b", [_failing(rows[0], all_of_them), rows[1], _failing(rows[2], one)]),
        _part(Path(run.uri), 3, "c", [_failing(rows[1], one), _failing(rows[3], all_of_them)]),
    ]
    dropped = _superseded(parts)
    assert dropped == {parts[0][1]: [1, 2], parts[1][1]: [0], parts[2][1]: [0, 1]}
    found = audit(_announced(run, pa.concat_tables(_flat_part(uri, dropped.get(uri, [])) for _, uri in parts)))
    assert found.clean and found.by_status == {"ok": 43, "failed": 3}, "one each of the images 0, 2 and 3"


def test_shards_of_another_schema_version_are_refused(tmp_path: Path, images: list[Image]) -> None:
    write_shard(str(tmp_path / "old.parquet"), images, {"meddam.schema_version": "0"})
    with pytest.raises(ValueError, match="version 0"):
        snapshot([str(tmp_path / "old.parquet")])


def test_status_is_kept(images: list[Image]) -> None:
    row = _captioned(images[0])
    bad = replace(row.captions[0], status=Status.FAILED, reason="box_outside", detail="d", text=None)
    flat = flatten(_table([replace(row, captions=[bad])])).to_pylist()
    assert [(r["status"], r["reason"], r["detail"], r["text"]) for r in flat] == [("failed", "box_outside", "d", None)]
