"""One row of a .npy file on S3 or disk, without reading the others.

    rows = NpyRows("s3://bucket/fold1/images.npy"); rows.shape; rows.read(17)

PanNuke's folds are single arrays of several gigabytes. Only plain, C-ordered arrays are read: never pickled objects.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meddam_core import storage
from meddam_core.records import Reason, RowError


@dataclass(frozen=True, slots=True)
class _Header:
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    start: int


class NpyRows:
    """An array in a file, row by row. Raises ValueError where it is none, or one that cannot be read so."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self._header = _read_header(uri)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole array."""
        return self._header.shape

    def read(self, row: int) -> NDArray[Any]:
        """Row `row`. Raises RowError(corrupt) where the file ends before it, (not_found) beyond the array."""
        header = self._header
        if not 0 <= row < header.shape[0]:
            raise RowError(Reason.NOT_FOUND, f"the array has {header.shape[0]} rows")
        num_bytes = math.prod(header.shape[1:]) * header.dtype.itemsize
        fs, path = storage.open_uri(self.uri)
        with fs.open_input_file(path) as stream:
            stream.seek(header.start + row * num_bytes)
            data = bytes(stream.read(num_bytes))
        if len(data) < num_bytes:
            raise RowError(Reason.CORRUPT, "the array is cut short")
        return np.frombuffer(data, header.dtype).reshape(header.shape[1:])

    def all(self) -> NDArray[Any]:
        """The whole array; for small ones."""
        fs, path = storage.open_uri(self.uri)
        with fs.open_input_file(path) as stream:
            stream.seek(self._header.start)
            data = bytes(stream.read())
        return np.frombuffer(data, self._header.dtype, math.prod(self.shape)).reshape(self.shape)


@lru_cache(maxsize=64)
def _read_header(uri: str) -> _Header:
    fs, path = storage.open_uri(uri)
    with fs.open_input_file(path) as stream:
        try:
            version = np.lib.format.read_magic(stream)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran, dtype = read(stream)
        except ValueError as error:
            raise ValueError(f"{uri} is no .npy array: {error}") from error
        start = int(stream.tell())
    if fortran or dtype.hasobject or not shape:
        raise ValueError(f"{uri} holds an array that cannot be read row by row; save it with np.save, in C order")
    return _Header(tuple(shape), dtype, start)
