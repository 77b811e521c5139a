"""Caption again what failed in a published run: a further attempt, and a new generation of its table.

    meddam retry s3://bucket/runs/one
    meddam retry s3://bucket/runs/one --num-captioners 2 --config changed.yaml

Settings are the run's own, from its run.json; those that don't decide a caption may be changed by a file. How many
GPUs and CPUs there should be is not taken over: three failed images need no thirty-two GPUs.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from ray_jobs import caption, caption_config
from ray_jobs.estimate import Estimate
from ray_jobs.module_command import run_as
from ray_jobs.options import build
from ray_jobs.run_directory import RUN, RunDirectory
from ray_jobs.summary import Summary


class Config(BaseModel):
    """Caption again what failed in a published run, as a further attempt; where it succeeds it replaces what failed.

    Other settings than these are the run's own. The file may change those of them that decide no caption.
    """

    model_config = ConfigDict(extra="allow", frozen=True, use_attribute_docstrings=True)  # `meddam caption` looks at it

    run: str
    """The run directory, on S3 or disk."""
    num_captioners: int | None = Field(None, ge=1)
    """Actors that hold the model: by default one a GPU of the cluster, or one; not the run's number."""
    wait_for_gpus: int | None = Field(None, ge=1)
    """Begin when the cluster has so many GPUs, and ask an autoscaler for them; by default with those that are there."""
    wait_for_gpus_s: float = Field(3600.0, gt=0)
    """Longest wait for them, seconds."""
    num_cpus: int | None = Field(None, ge=2)
    """CPUs of a Ray session started on this machine."""


def run(cfg: Config) -> Summary | Estimate:
    """Captions the failed images of the run once more.

    Raises as `ray_jobs.caption.run` does, and ValueError where there is no run directory.
    """
    described = RunDirectory(cfg.run).read_json(RUN)
    if described is None:
        raise ValueError(f"{cfg.run} is not a run directory: it has no {RUN}; give the --out of `meddam caption`")
    kept = {name: value for name, value in described["config"].items() if name not in Config.model_fields}
    given = cfg.model_dump(exclude={"run"}, exclude_unset=True)
    return caption.run(build(caption_config.Config, {}, None, kept | given | {"out": cfg.run}), retry=True)


if __name__ == "__main__":  # the same options as `meddam retry`
    run_as("retry")
