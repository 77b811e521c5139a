"""`meddam` in a Ray session with a small object store, most of which another's object takes, that spills to FOLDER.

python -m tests.faults.spilling FOLDER caption SHARDS --out RUN --model DIR
"""

from __future__ import annotations

import os
import sys

STORE_BYTES = 80_000_000
"""About the least that Ray takes."""
OTHERS_BYTES = 60_000_000


def main() -> None:
    import numpy as np
    import ray

    from ray_jobs.cli import main as meddam
    from ray_jobs.session import start_ray

    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    folder, sys.argv[1:] = sys.argv[1], sys.argv[2:]
    start_ray(
        address="local", num_cpus=2, include_dashboard=False, object_store_memory=STORE_BYTES,
        object_spilling_directory=folder, namespace="meddam", log_to_driver=False,
    )  # fmt: skip
    others = ray.put(np.zeros(OTHERS_BYTES, np.uint8))  # kept while the job works: there is room for it on a disk only
    try:
        meddam()
    finally:
        del others


if __name__ == "__main__":
    main()
