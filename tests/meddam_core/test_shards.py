"""Shards: what goes in comes out, whole or not at all, and people can look at it."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image as PilImage

from meddam_core import shards, storage
from meddam_core.imaging.png import encode_png, preview_jpeg
from meddam_core.records import (
    EncodedImage,
    Image,
    Label,
    Lut,
    Region,
    Rescale,
    Window,
    arrow_schema,
    image_id,
    region_id,
)
from meddam_core.regions.masks import rle_of


def _images(num: int, side: int = 24) -> Iterator[Image]:
    rng = np.random.default_rng(4)
    mask_HW = np.zeros((side, side), np.uint8)
    mask_HW[3:9, 4:7] = 1
    for row in range(num):
        number = image_id(6, row)
        pixels = rng.integers(0, 4096, (side, side), dtype=np.uint16)
        regions = [
            Region(
                region_id=region_id(number, i),
                box=(4, 3, 7, 9),
                mask=rle_of(mask_HW) if i % 2 else None,
                labels=[Label(name="finding", value="nodule", trust=0.5)],
                frame_masks=[rle_of(mask_HW)] * 2 if i == 3 else None,
            )
            for i in range(row % 5)
        ]
        yield Image(
            image_id=number,
            image_key=f"{row:032x}",
            patient_key="p" if row % 2 else None,
            dataset="films",
            image=EncodedImage(bytes=encode_png(pixels)),
            preview=EncodedImage(bytes=preview_jpeg(np.repeat((pixels >> 4).astype(np.uint8)[..., None], 3, -1))),
            frames=[EncodedImage(bytes=encode_png(pixels))] * 2 if row % 3 == 0 else None,
            width=side,
            height=side,
            stored_bits=12,
            rescale=Rescale(slope=1.0, intercept=-1024.0),
            window=Window(center=-600, width=1500),
            lut=Lut(first=0, bits=8, values=[1, 2, 3], stage="display") if row == 2 else None,
            photometric="MONOCHROME2",
            padding=[0, 1],
            pixel_spacing_mm=[0.5, 0.6],
            regions=regions,
        )


def test_rows_come_back_as_they_were(tmp_path: Path) -> None:
    uri = str(tmp_path / "new" / "shard.parquet")
    shards.write_shard(uri, _images(130), {"meddam.note": "hello"})
    assert list(shards.read_shard(uri)) == list(_images(130))
    facts = shards.shard_facts(uri)
    assert facts.num_rows == 130
    assert facts.image_ids.tolist() == [image_id(6, r) for r in range(130)]
    assert facts.num_regions.tolist() == [r % 5 for r in range(130)]
    assert facts.metadata["meddam.note"] == "hello"
    assert shards.shard_metadata(uri) == facts.metadata
    assert shards.shard_metadata(str(tmp_path / "absent.parquet")) is None


def test_the_same_rows_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        shards.write_shard(str(tmp_path / name), _images(9))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_through_s3(s3_bucket: str) -> None:
    uri = f"{s3_bucket}/set/shards/shard-000006.parquet"
    shards.write_shard(uri, _images(12))
    assert list(shards.read_shard(uri)) == list(_images(12))
    assert shards.shard_facts(uri).num_rows == 12


def test_a_shard_that_fails_half_way_does_not_appear(tmp_path: Path, s3_bucket: str) -> None:
    def broken() -> Iterator[Image]:
        yield from _images(3)
        raise RuntimeError("the disk is full")

    for uri in (str(tmp_path / "set" / "shard.parquet"), f"{s3_bucket}/set/shard.parquet"):
        with pytest.raises(RuntimeError, match="disk is full"):
            shards.write_shard(uri, broken())
        assert not storage.exists(uri)
    assert not list((tmp_path / "set").iterdir())


def test_row_groups_are_small_and_pictures_not_compressed_twice(tmp_path: Path) -> None:
    path = str(tmp_path / "shard.parquet")
    shards.write_shard(path, _images(150))
    file = pq.ParquetFile(path)
    assert [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)] == [64, 64, 22]
    group = file.metadata.row_group(0)
    columns = {group.column(i).path_in_schema: group.column(i).compression for i in range(group.num_columns)}
    assert {p for p, c in columns.items() if c == "UNCOMPRESSED"} == {p for p in columns if p.endswith(".bytes")}
    large = (i for i in _images(6, side=2000))
    shards.write_shard(path, large)  # 6 pictures of about 7 MB
    assert pq.ParquetFile(path).num_row_groups >= 2


def test_rows_can_be_read_without_their_pictures(tmp_path: Path) -> None:
    uri = str(tmp_path / "shard.parquet")
    shards.write_shard(uri, _images(5))
    columns = ["image_id", "image_key", "dataset", "width", "height", "regions"]
    rows = list(shards.read_shard(uri, columns))
    assert [r.regions for r in rows] == [r.regions for r in _images(5)]
    assert all(r.image.bytes is None for r in rows)


def test_an_empty_shard_is_a_shard(tmp_path: Path) -> None:
    uri = str(tmp_path / "shard.parquet")
    shards.write_shard(uri, iter(()))
    assert list(shards.read_shard(uri)) == []
    assert shards.shard_facts(uri).num_rows == 0


def test_other_schemas_are_refused_by_name(tmp_path: Path) -> None:
    schema = arrow_schema(Image)
    older = schema.with_metadata({**schema.metadata, b"meddam.schema_version": b"0"})
    pq.write_table(older.empty_table(), tmp_path / "old.parquet")
    with pytest.raises(ValueError, match="it says Image, version 0"):
        list(shards.read_shard(str(tmp_path / "old.parquet")))
    less = schema.remove(schema.get_field_index("licence")).append(pa.field("license", pa.string()))
    pq.write_table(less.with_metadata(schema.metadata).empty_table(), tmp_path / "less.parquet")
    with pytest.raises(ValueError, match=r"lacks the columns \['licence'\] and has the unknown columns \['license'\]"):
        shards.shard_facts(str(tmp_path / "less.parquet"))
    pq.write_table(pa.table({"a": [1]}), tmp_path / "foreign.parquet")
    with pytest.raises(ValueError, match="make it again with `meddam ingest`"):
        shards.shard_facts(str(tmp_path / "foreign.parquet"))
    (tmp_path / "text.parquet").write_text("not parquet at all")
    with pytest.raises(ValueError, match="no Parquet file"):
        shards.shard_facts(str(tmp_path / "text.parquet"))


def test_hugging_face_datasets_shows_the_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    shards.write_shard(str(tmp_path / "shards" / "shard-000006.parquet"), _images(5))
    loaded = datasets.load_dataset(
        "parquet", data_files=str(tmp_path / "shards" / "*.parquet"), cache_dir=str(tmp_path / "cache"), split="train"
    )
    assert isinstance(loaded.features["preview"], datasets.Image)
    assert isinstance(loaded.features["image"], datasets.Image)
    row, expected = loaded[3], list(_images(5))[3]
    assert row["preview"].size == (24, 24)
    assert expected.image.bytes is not None
    assert np.array_equal(np.asarray(row["image"]), np.asarray(PilImage.open(io.BytesIO(expected.image.bytes))))
    assert row["regions"][1]["box"] == [4, 3, 7, 9]
    assert json.loads(json.dumps(row["regions"]))[0]["labels"] == [{"name": "finding", "value": "nodule", "trust": 0.5}]
