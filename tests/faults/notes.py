"""Rounds of the fault suite that have passed, in a file: two hours of them need not be two hours at one time.

Invariant: a round counts for the code that it ran and for no other; one that was unclean starts the count anew.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
CODE = (
    "meddam_core/**/*.py", "ray_jobs/**/*.py", "benchmarks/**/*.py", "tests/faults/**/*", "tests/cluster/head.py",
    "tests/ray_jobs/made_shards.py", "constraints.txt", "pyproject.toml", "runtime_env.yaml",
)  # fmt: skip
"""What a round runs."""


def code_hash() -> str:
    """Of everything that a round runs; any change gives another one."""
    digest = hashlib.sha256()
    found = {path for pattern in CODE for path in ROOT.glob(pattern) if path.is_file()}
    for path in sorted(p for p in found if "__pycache__" not in p.parts):
        digest.update(f"{path.relative_to(ROOT)}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class RoundNotes:
    """The rounds noted in a file, a line of JSON each; without a file nothing is noted."""

    file: Path | None
    what: dict[str, Any]
    """Cases, images, seed and the code's hash: only rounds that agree with it in all count."""

    def _mine(self) -> list[dict[str, Any]]:
        if self.file is None or not self.file.exists():
            return []
        lines = [json.loads(line) for line in self.file.read_text(encoding="utf-8").splitlines()]
        return [line for line in lines if {name: line.get(name) for name in self.what} == self.what]

    @property
    def num_rounds(self) -> int:
        """Clean or not."""
        return len(self._mine())

    @property
    def num_in_a_row(self) -> int:
        """Clean rounds since the last unclean one."""
        count = 0
        for line in self._mine():
            count = 0 if line["unclean"] else count + 1
        return count

    def add(self, unclean: int, seconds: float, begun: str) -> None:
        """Notes a round that has ended, with how many of its cases were not clean."""
        if self.file is not None:
            line = json.dumps({**self.what, "unclean": unclean, "seconds": round(seconds), "begun": begun})
            with self.file.open("a", encoding="utf-8") as stream:
                stream.write(line + "\n")
