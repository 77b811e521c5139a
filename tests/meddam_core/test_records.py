"""Rows: typed objects and Arrow rows are the same thing, ids are unique by construction, errors hold no surprises."""

from __future__ import annotations

import dataclasses
import pickle
import typing
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meddam_core.records import (
    MAX_REGIONS_PER_ROW,
    ROW_BITS,
    SCHEMA_VERSION,
    Caption,
    CaptionedImage,
    EncodedImage,
    Image,
    Label,
    Reason,
    Region,
    RegionCaption,
    Rle,
    RowError,
    Status,
    arrow_schema,
    from_row,
    image_id,
    image_of,
    region_id,
    to_row,
)

ROWS = [Image, CaptionedImage, Caption]


def full(record: type, seed: int = 3) -> Any:
    """An object of `record` with a value in every field, optional ones included."""
    hints = typing.get_type_hints(record)
    return record(**{f.name: value_of(hints[f.name], f"{f.name}{seed}") for f in dataclasses.fields(record)})


def value_of(hint: Any, text: str) -> Any:
    args = [a for a in typing.get_args(hint) if a is not type(None)]
    if type(None) in typing.get_args(hint):
        return value_of(args[0], text)
    if dataclasses.is_dataclass(hint):
        return full(typing.cast(type, hint))
    if typing.get_origin(hint) is tuple:
        return tuple(range(len(args)))
    if typing.get_origin(hint) is list:
        return [value_of(args[0], text), value_of(args[0], text)]
    if typing.get_origin(hint) is typing.Literal:
        return args[-1]
    if isinstance(hint, type) and issubclass(hint, Status):
        return Status.TRUNCATED
    return {str: text, int: len(text), float: len(text) / 4, bool: True, bytes: text.encode()}[hint]


@pytest.mark.parametrize("record", ROWS)
def test_every_field_survives_parquet(record: type, tmp_path: Any) -> None:
    written = [full(record, 1), full(record, 22)]
    table = pa.Table.from_pylist([to_row(r) for r in written], schema=arrow_schema(record))
    pq.write_table(table, tmp_path / "rows.parquet")
    read = pq.read_table(tmp_path / "rows.parquet")
    assert [from_row(record, row) for row in read.to_pylist()] == written


@pytest.mark.parametrize("record", ROWS)
def test_optional_fields_may_be_null_and_others_not(record: type) -> None:
    row = to_row(full(record))
    hints = typing.get_type_hints(record)
    row |= {name: None for name in row if type(None) in typing.get_args(hints[name])}
    (read,) = pa.Table.from_pylist([row], schema=arrow_schema(record)).to_pylist()
    assert to_row(from_row(record, read)) == row


@pytest.mark.parametrize("record", ROWS)
def test_the_schema_names_itself_and_its_version(record: type) -> None:
    metadata = arrow_schema(record).metadata
    assert metadata[b"meddam.schema"] == record.__name__.encode()
    assert metadata[b"meddam.schema_version"] == str(SCHEMA_VERSION).encode()


def test_both_tables_hold_a_caption_in_the_same_types() -> None:
    nested = arrow_schema(CaptionedImage).field("captions").type.value_type
    flat = arrow_schema(Caption)
    for field in nested:
        assert flat.field(field.name).type == field.type, field.name


def test_a_column_of_another_schema_is_named() -> None:
    row = to_row(full(Image)) | {"patient_name": "x"}
    with pytest.raises(ValueError, match=r"unknown column \['patient_name'\] in a row of Image"):
        from_row(Image, row)


@given(st.integers(0, 2**35 - 1), st.integers(0, 2**ROW_BITS - 1), st.integers(0, MAX_REGIONS_PER_ROW - 1))
@settings(derandomize=True)
def test_ids_are_unique_and_fit_in_int64(shard: int, row: int, ordinal: int) -> None:
    image = image_id(shard, row)
    region = region_id(image, ordinal)
    assert region < 2**63
    assert image_of(region) == image
    assert (image >> ROW_BITS, image & (2**ROW_BITS - 1), region & 15) == (shard, row, ordinal)


@pytest.mark.parametrize(("shard", "row"), [(-1, 0), (2**35, 0), (0, -1), (0, 2**ROW_BITS)])
def test_ids_that_would_collide_are_refused(shard: int, row: int) -> None:
    with pytest.raises(ValueError, match=r"row|shard"):
        image_id(shard, row)


def test_a_seventeenth_region_is_refused() -> None:
    with pytest.raises(ValueError, match="at most 16 regions a row"):
        region_id(1, MAX_REGIONS_PER_ROW)


def test_a_row_error_crosses_processes() -> None:
    error = pickle.loads(pickle.dumps(RowError(Reason.MASK_SIZE, "the mask is 3 x 4, the image 5 x 6")))
    assert (error.reason, error.detail) == (Reason.MASK_SIZE, "the mask is 3 x 4, the image 5 x 6")
    assert isinstance(error, ValueError)


def test_status_and_reason_are_their_codes_in_a_row() -> None:
    caption = RegionCaption(region_id=1, prompt_id="p", status=Status.FAILED, reason=Reason.CORRUPT, detail="d")
    nested = arrow_schema(CaptionedImage).field("captions").type.value_type
    (row,) = pa.array([to_row(caption)], type=nested).to_pylist()
    assert (row["status"], row["reason"]) == ("failed", "corrupt")
    assert from_row(RegionCaption, row).status is Status.FAILED


def test_nested_regions_come_back_typed() -> None:
    region = Region(
        region_id=5, box=(1, 2, 3, 4), mask=Rle(size=(8, 9), counts="PP"),
        labels=[Label(name="nodule", value="present", trust=0.75)],
    )  # fmt: skip
    image = dataclasses.replace(full(Image), regions=[region], preview=EncodedImage(bytes=b"\xff"), frames=None)
    (row,) = pa.Table.from_pylist([to_row(image)], schema=arrow_schema(Image)).to_pylist()
    assert from_row(Image, row) == image
