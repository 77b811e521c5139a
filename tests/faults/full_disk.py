"""An object store of 80 MB on a disk that Ray takes for full: what does not fit cannot be spilled.

    python -m tests.faults.full_disk     ends with 0 where a put beyond the store fails with OutOfDiskError

It is Ray's own threshold that is set, to nearly nothing, so that every disk is over it.
"""

from __future__ import annotations

import logging
import sys

STORE_BYTES = 80_000_000
ENVIRONMENT = {
    "RAY_local_fs_capacity_threshold": "0.0001",
    "RAY_DEFAULT_OBJECT_STORE_MAX_MEMORY_BYTES": str(STORE_BYTES),
}


def main() -> int:
    import numpy as np
    import ray

    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    part = STORE_BYTES // 8
    try:
        _held = [ray.put(np.zeros(part, np.uint8)) for _ in range(12)]
    except ray.exceptions.OutOfDiskError:
        return 0
    finally:
        ray.shutdown()
    return 1


if __name__ == "__main__":
    sys.exit(main())
