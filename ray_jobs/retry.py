"""Caption again what failed in a published run: a further attempt, and a new generation of its table.

    meddam retry s3://bucket/runs/one

Settings are the run's own, from its run.json; those that don't decide a caption may be changed by a file.
"""

from __future__ import annotations

from pathlib import Path

from ray_jobs import caption
from ray_jobs.caption_config import Config
from ray_jobs.estimate import Estimate
from ray_jobs.module_command import run_as
from ray_jobs.options import build
from ray_jobs.run_directory import RUN, RunDirectory
from ray_jobs.summary import Summary


def run(uri: str, config_file: Path | None = None) -> Summary | Estimate:
    """Captions the failed images of the run at `uri` once more.

    Args:
        uri: the run directory.
        config_file: YAML with settings that may change, such as the number of captioners.

    Raises as `ray_jobs.caption.run` does, and ValueError where `uri` is no run directory.
    """
    described = RunDirectory(uri).read_json(RUN)
    if described is None:
        raise ValueError(f"{uri} is not a run directory: it has no {RUN}; give the --out of `meddam caption`")
    return caption.run(build(Config, {}, config_file, described["config"] | {"out": uri}), retry=True)


if __name__ == "__main__":  # the same options as `meddam retry`
    run_as("retry")
