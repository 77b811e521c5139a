"""Lines of an annotation file -> groups by image, in order of first appearance, on disk.

A manifest may name an image on lines far apart, and COCO lists annotations in no order. Sorting them in memory would
take gigabytes for a large dataset; here they pass through a temporary SQLite file.
"""

from __future__ import annotations

import itertools
import json
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_BATCH = 5000


class Groups:
    """Values by group. Add them all, then iterate once or more."""

    def __init__(self, path: Path) -> None:
        self._database = sqlite3.connect(path)
        self._database.executescript(
            "PRAGMA journal_mode=OFF; PRAGMA synchronous=OFF;"
            "CREATE TABLE line (name TEXT, at INTEGER PRIMARY KEY, value TEXT);"
            "CREATE TABLE owner (id TEXT PRIMARY KEY, name TEXT) WITHOUT ROWID"
        )
        self._waiting: list[tuple[str, str]] = []

    def add(self, group: str, value: Any) -> None:
        """Adds a JSON value to the group of that name."""
        self._waiting.append((group, json.dumps(value)))
        if len(self._waiting) >= _BATCH:
            self._flush()

    def __iter__(self) -> Iterator[tuple[str, list[Any]]]:
        """(name, values in the order they were added), by the groups' first values."""
        self._flush()
        self._database.execute("CREATE INDEX IF NOT EXISTS by_name ON line (name, at)")
        rows = self._database.execute(
            "SELECT line.name, line.value FROM line JOIN (SELECT name, min(at) AS first FROM line GROUP BY name) AS g "
            "ON line.name = g.name ORDER BY g.first, line.at"
        )
        for name, lines in itertools.groupby(rows, key=lambda row: row[0]):
            yield name, [json.loads(value) for _, value in lines]

    def claim(self, id_: str, owner: str) -> bool:
        """Whether `id_` belongs to `owner`: to the first that claims it."""
        self._database.execute("INSERT OR IGNORE INTO owner VALUES (?, ?)", (id_, owner))
        found = self._database.execute("SELECT name FROM owner WHERE id = ?", (id_,)).fetchone()
        return bool(found[0] == owner)

    def close(self) -> None:
        """Frees the temporary file."""
        self._database.close()

    def _flush(self) -> None:
        self._database.executemany("INSERT INTO line (name, value) VALUES (?, ?)", self._waiting)
        self._waiting.clear()


@contextmanager
def grouped() -> Iterator[Groups]:
    """Groups in a temporary folder that goes away at the end."""
    with tempfile.TemporaryDirectory(prefix="meddam-groups-") as folder:
        groups = Groups(Path(folder) / "lines.sqlite")
        try:
            yield groups
        finally:
            groups.close()
