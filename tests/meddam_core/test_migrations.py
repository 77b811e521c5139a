"""Rows of older versions: read as the present ones are, whoever reads; of newer ones: refused with a sentence."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from meddam_core import shards
from meddam_core.migrations import STEPS, upgraded, version_of
from meddam_core.records import SCHEMA_VERSION, Caption, Image, arrow_schema
from meddam_core.training.data import files_of_shards, read_file
from tests.ray_jobs.made_shards import make_shards

ADDED = ("frame", "lut", "labels")
"""What the first layout of a row, of version 1, did not have."""


def age(shard: Path, without: tuple[str, ...] = ADDED) -> Path:
    """The shard as the first release would have written it."""
    file = pq.ParquetFile(shard)
    table = file.read().drop_columns(list(without))
    own = {k: v for k, v in (file.metadata.metadata or {}).items() if k.startswith(b"meddam.")}
    entries = own | {b"meddam.schema": b"Image", b"meddam.schema_version": b"1"}
    pq.write_table(table.replace_schema_metadata(entries), shard)
    return shard


@pytest.fixture
def old(tmp_path: Path) -> tuple[str, list[Image]]:
    """A shard in the first layout, and its images as they were."""
    uri = make_shards(str(tmp_path / "set"), 1, 6)
    (shard,) = (tmp_path / "set/shards").iterdir()
    images = list(shards.read_shard(str(shard)))
    age(shard)
    return f"{uri}/shards/{shard.name}", images


def test_every_reader_takes_a_shard_of_the_first_layout(old: tuple[str, list[Image]]) -> None:
    uri, images = old
    assert "labels" not in pq.read_schema(uri).names
    assert list(shards.read_shard(uri)) == images
    assert list(shards.images_by_id(uri, {images[4].image_id})) == [images[4]]
    assert shards.shard_facts(uri).image_ids.tolist() == [i.image_id for i in images]
    (table,) = shards.shard_batches(uri, ["image_id", "labels.list.element.name"])
    assert table.column_names == ["image_id", "labels"] and table["labels"].to_pylist() == [[]] * 6
    columns = ["image_id", "image_key", "dataset", "width", "height", "labels"]
    assert [i.labels for i in shards.read_shard(uri, columns)] == [[]] * 6
    (file,) = files_of_shards([uri])
    assert len(read_file(file, size=56)) == sum(len(i.regions) for i in images)


def test_a_shard_between_two_layouts_keeps_what_it_has(tmp_path: Path) -> None:
    make_shards(str(tmp_path), 1, 2)
    (shard,) = (tmp_path / "shards").iterdir()
    images = list(shards.read_shard(str(shard)))
    age(shard, without=("lut", "labels"))
    assert list(shards.read_shard(str(shard))) == images


def test_a_newer_version_is_refused_with_what_to_do(tmp_path: Path) -> None:
    make_shards(str(tmp_path), 1, 2)
    (shard,) = (tmp_path / "shards").iterdir()
    table = pq.read_table(shard)
    newer = {**table.schema.metadata, b"meddam.schema_version": str(SCHEMA_VERSION + 1).encode()}
    pq.write_table(table.append_column("invented", pa.nulls(2)).replace_schema_metadata(newer), shard)
    for read in (lambda u: list(shards.read_shard(u)), shards.shard_facts, lambda u: files_of_shards([u])):
        with pytest.raises(ValueError, match=f"newer MedDAM: its rows have schema version {SCHEMA_VERSION + 1}"):
            read(str(shard))


def test_captions_of_the_first_layout_are_read_in_the_present_types() -> None:
    schema = arrow_schema(Caption)
    at = schema.get_field_index("mean_logprob")
    first = schema.set(at, pa.field("mean_logprob", pa.float64())).with_metadata({b"meddam.schema": b"Caption"})
    assert version_of(first, Caption, "one.parquet") == 1
    found = upgraded(first.empty_table(), Caption, 1)
    assert found.schema.equals(schema)
    with pytest.raises(ValueError, match="rows of another kind: Caption, where Image"):
        version_of(first, Image, "one.parquet")


def test_every_step_leads_to_a_version_that_there_is() -> None:
    assert all(1 <= version < SCHEMA_VERSION for _, version in STEPS)
