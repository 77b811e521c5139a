"""Rows of older schema versions, as the present one has them.

    version = version_of(file.schema_arrow, Image, uri)     # ValueError where a newer release wrote it
    table = upgraded(table, Image, version)                 # at present: the table itself

Readers upgrade as they read, so that nobody has to; `meddam migrate` rewrites files for good. Whoever changes a row in
records.py raises SCHEMA_VERSION there and adds the step that leads to it here.

    1   as first written; some images of it have `frame`, `lut` or `labels` already, for they were not counted then
    2   Image has `frame`, `lut` and `labels`; a Caption's mean_logprob is a float32
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pyarrow as pa

from meddam_core.records import SCHEMA_VERSION, Caption, Image, arrow_schema

Step = Callable[[pa.Table], pa.Table]
"""A table of one version, perhaps with some of its columns only, as the next version has it."""


def _image_1(table: pa.Table) -> pa.Table:
    """`labels` is empty, not null: nobody had looked for labels of whole images, and none were kept."""
    schema = arrow_schema(Image)
    for name, value in (("frame", None), ("lut", None), ("labels", [])):
        if name not in table.column_names:
            table = table.append_column(schema.field(name), pa.array([value] * len(table), schema.field(name).type))
    return table


def _caption_1(table: pa.Table) -> pa.Table:
    if "mean_logprob" not in table.column_names:
        return table
    at = table.column_names.index("mean_logprob")
    field = arrow_schema(Caption).field("mean_logprob")
    return table.set_column(at, field, table["mean_logprob"].cast(field.type))


STEPS: dict[tuple[str, int], Step] = {(Image.__name__, 1): _image_1, (Caption.__name__, 1): _caption_1}
"""By row and the version that the step begins with; where there is none, that version changed nothing of the row."""


def version_of(schema: pa.Schema, row: type, uri: str) -> int:
    """The version that a file was written with; one that says nothing is of version 1, for captions through Ray.

    Raises ValueError for rows of another kind and for a version that this release does not know.
    """
    entries = schema.metadata or {}
    kind = entries.get(b"meddam.schema", b"").decode()
    text = entries.get(b"meddam.schema_version", b"1").decode()
    if kind not in ("", row.__name__) or not text.isdigit():
        raise ValueError(f"{uri} holds rows of another kind: {kind or 'unknown'}, where {row.__name__} is wanted")
    check_version(int(text), uri)
    return int(text)


def check_version(version: int, uri: str) -> None:
    """Raises ValueError where a newer release of MedDAM wrote `uri`."""
    if version > SCHEMA_VERSION:
        raise ValueError(
            f"{uri} was written by a newer MedDAM: its rows have schema version {version}, this release knows "
            f"{SCHEMA_VERSION} and older; install the release that wrote it, or a later one"
        )


def upgraded(table: pa.Table, row: type, version: int, columns: Sequence[str] | None = None) -> pa.Table:
    """`table` of `row`s of schema `version`, as the present version has them.

    columns: those that the reader asked for; a step's others are left out. None for all, in the present order.
    """
    if version == SCHEMA_VERSION:
        return table
    for number in range(version, SCHEMA_VERSION):
        step = STEPS.get((row.__name__, number))
        table = step(table) if step is not None else table
    wanted = arrow_schema(row).names if columns is None else list(dict.fromkeys(columns))
    return table.select([name for name in wanted if name in table.column_names])
