"""Caption again what failed in a published run: a further attempt, and a new generation of its table.

    meddam retry s3://bucket/runs/one

Settings are the run's own, from its run.json; those that don't decide a caption may be changed by a file. How many
GPUs and CPUs there should be is not taken over: three failed images need no thirty-two GPUs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ray_jobs import caption
from ray_jobs.caption_config import Config
from ray_jobs.estimate import Estimate
from ray_jobs.module_command import run_as
from ray_jobs.options import build
from ray_jobs.run_directory import RUN, RunDirectory
from ray_jobs.summary import Summary

OF_THE_CLUSTER = ("num_captioners", "num_cpus", "wait_for_gpus", "wait_for_gpus_s")
"""Settings that a retry has of its own."""


def run(uri: str, config_file: Path | None = None, **of_the_cluster: Any) -> Summary | Estimate:
    """Captions the failed images of the run at `uri` once more.

    Args:
        uri: the run directory.
        config_file: YAML with settings that may change, such as the number of captioners.
        of_the_cluster: settings of OF_THE_CLUSTER; None is the default of `meddam caption`.

    Raises as `ray_jobs.caption.run` does, and ValueError where `uri` is no run directory.
    """
    described = RunDirectory(uri).read_json(RUN)
    if described is None:
        raise ValueError(f"{uri} is not a run directory: it has no {RUN}; give the --out of `meddam caption`")
    kept = {name: value for name, value in described["config"].items() if name not in OF_THE_CLUSTER}
    return caption.run(build(Config, of_the_cluster, config_file, kept | {"out": uri}), retry=True)


if __name__ == "__main__":  # the same options as `meddam retry`
    run_as("retry")
