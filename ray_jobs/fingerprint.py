"""What a run's captions depend on, as one dict; a resume with another one is refused, naming the fields.

Package versions are left out on purpose: STAGES counts the changes of meaning that we make, stage by stage.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ray_jobs.run_directory import InputShard

STAGES = {"rows": 1, "render": 1, "regions": 2, "focal": 1, "tokens": 1, "sampling": 1}
"""A number per stage, raised whenever the same input would give another output."""

_CHUNK = 1 << 22


def weights_digest(folder: str) -> str:
    """SHA-256 over the names and contents of a checkpoint's files. Raises ValueError where there is no such folder."""
    root = Path(folder)
    files = sorted(p for p in root.rglob("*") if p.is_file() and not p.name.startswith("."))
    if not files:
        raise ValueError(f"{folder} is no checkpoint folder: it holds no file; give the folder that holds config.json")
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.relative_to(root).as_posix()}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as stream:
            while chunk := stream.read(_CHUNK):
                digest.update(chunk)
    return digest.hexdigest()


def inputs_digest(shards: Sequence[InputShard]) -> str:
    """SHA-256 over the shards' URIs and tags."""
    lines = "\n".join(f"{s.uri}\t{s.etag}\t{s.num_images}" for s in shards)
    return hashlib.sha256(lines.encode()).hexdigest()


def differences(then: dict[str, Any], now: dict[str, Any], path: str = "") -> list[str]:
    """The fields in which two fingerprints differ, as `name: then -> now`."""
    found = []
    for key in sorted(then.keys() | now.keys()):
        before, after = then.get(key), now.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            found += differences(before, after, f"{path}{key}.")
        elif before != after:
            found.append(f"{path}{key}: {_short(before)} -> {_short(after)}")
    return found


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
