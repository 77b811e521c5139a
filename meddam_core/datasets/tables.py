"""A dataset's CSV files, read as a stream of rows, and its folders, as names of files.

rows = table_rows(uri, "the concept table")
files = files_below("s3://bucket/images")
"""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Iterator, Sequence
from typing import Any

from meddam_core import storage
from meddam_core.storage import ObjectInfo

PICTURES = (".bmp", ".dcm", ".dicom", ".jp2", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


def table_rows(uri: str, what: str, needed: Sequence[str] = ()) -> Iterator[dict[str, str]]:
    """The lines of a CSV file by column, without surrounding spaces. A line of other length than the header is cut.

    Raises ValueError, naming `what`, for a file that is not there, cannot be read, or lacks a `needed` column.
    """
    with _opened(uri, what) as stream, io.TextIOWrapper(stream, "utf-8-sig", errors="replace", newline="") as text:
        table = csv.DictReader(text)
        columns = [str(c).strip() for c in table.fieldnames or []]
        missing = [c for c in needed if c not in columns]
        if missing:
            raise ValueError(f"{uri} is not {what}: it has no column {missing[0]!r}; check that it is the right file")
        table.fieldnames = columns
        for row in table:
            yield {k: (v or "").strip() for k, v in row.items() if isinstance(k, str) and not isinstance(v, list)}


def table_columns(uri: str, what: str) -> list[str]:
    """The header of a CSV file. Raises ValueError as `table_rows`."""
    with _opened(uri, what) as stream, io.TextIOWrapper(stream, "utf-8-sig", errors="replace", newline="") as text:
        return [c.strip() for c in next(csv.reader(text), [])]


def digest_of(uri: str, what: str) -> str:
    """SHA-256 of a file's bytes. Raises ValueError as `table_rows`."""
    digest = hashlib.sha256()
    with _opened(uri, what) as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def files_below(folder: str, suffixes: Sequence[str] = PICTURES) -> list[ObjectInfo]:
    """Files of a folder and its subfolders with one of the suffixes, by URI. Raises StorageError for a bad bucket."""
    found = storage.list_objects(folder.rstrip("/") + "/")
    return sorted((o for o in found if o.uri.lower().endswith(tuple(suffixes))), key=lambda o: o.uri)


def names_digest(*listings: Sequence[ObjectInfo]) -> str:
    """Changes with the names, sizes and tags of the files listed."""
    digest = hashlib.sha256()
    for listing in listings:
        for entry in listing:
            digest.update(f"{entry.uri}\t{entry.etag}\n".encode())
        digest.update(b"\0")
    return digest.hexdigest()


def stem(uri: str) -> str:
    """A file's name without folder and suffix; of `.nii.gz` without both."""
    name = uri.rpartition("/")[2]
    return name[: -len(".nii.gz")] if name.lower().endswith(".nii.gz") else name.rpartition(".")[0] or name


def relative(uri: str, root: str) -> str:
    """What a file is called below `root`: stable when the dataset moves."""
    fs_root = root.rstrip("/") if storage.is_s3(root) else storage.open_uri(root)[1]
    return uri.removeprefix(fs_root).lstrip("/")


def _opened(uri: str, what: str) -> Any:
    try:
        fs, path = storage.open_uri(uri)
        return fs.open_input_file(path)
    except FileNotFoundError:
        raise ValueError(f"{what} is not at {uri}; check its name") from None
    except OSError as error:
        raise ValueError(f"{what} cannot be read: {storage.explain(uri, error)}") from error
