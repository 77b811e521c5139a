"""Ray's checkpoint of ids, brought into a state from which resuming loses nothing.

Ray commits a file in two phases: `X.pending.parquet` (ids), the data file `X-0.parquet`, then a rename to `X.parquet`.
Two states make its own recovery lose rows (ray 2.60):

- pending and committed both there. On S3 the rename is a copy and a delete; a death between them leaves both. Ray then
  deletes the data file and still counts its ids as done. Cure: delete the pending one first.
- committed, but no data file (deleted by the above, or by hand). Its ids count as done for ever. Cure: delete it, so
  that its images are captioned again.

A third is harmless to Ray but not to us: a data file that nobody committed, left by a writer that outlived its driver.
Cure: delete it; its images are captioned again.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePosixPath

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from meddam_core import storage

PENDING = ".pending.parquet"


def repair(checkpoint_uri: str, parts_uri: str) -> int:
    """Makes checkpoint and parts agree; needs the lease, and no writer at work. Returns how many files it deleted."""
    checkpoint = storage.list_files(checkpoint_uri, ".parquet")
    pending = {_stem(i.path, PENDING): i.path for i in checkpoint if i.path.endswith(PENDING)}
    committed = {_stem(i.path, ".parquet"): i.path for i in checkpoint if not i.path.endswith(PENDING)}
    data: dict[str, list[str]] = {}
    for info in storage.list_files(parts_uri, ".parquet"):
        # Ray names data files of the commit X "X-0.parquet", "X-1.parquet", ...
        data.setdefault(_stem(info.path, ".parquet").rpartition("-")[0], []).append(info.path)
    doomed = [path for stem, path in pending.items() if stem in committed]
    doomed += [path for stem, path in committed.items() if stem not in data]
    doomed += [path for stem, paths in data.items() if stem not in committed and stem not in pending for path in paths]
    fs, _ = storage.open_uri(checkpoint_uri)
    for path in doomed:
        fs.delete_file(path)
    return len(doomed)


def committed_ids(checkpoint_uri: str) -> NDArray[np.int64]:
    """The ids that Ray counts as written, sorted, as one compact array (8 bytes an image)."""
    files = [i.path for i in storage.list_files(checkpoint_uri, ".parquet") if not i.path.endswith(PENDING)]
    fs, _ = storage.open_uri(checkpoint_uri)

    def ids(path: str) -> NDArray[np.int64]:
        with fs.open_input_file(path) as stream:
            column = pq.read_table(io.BytesIO(stream.read()), columns=["image_id"])["image_id"]
        return np.asarray(column.to_numpy(), np.int64)

    with ThreadPoolExecutor(16) as pool:
        arrays: Iterable[NDArray[np.int64]] = pool.map(ids, files)
        found = np.concatenate([np.empty(0, np.int64), *arrays])
    found.sort()
    return found


def _stem(path: str, suffix: str) -> str:
    return PurePosixPath(path).name.removesuffix(suffix)
