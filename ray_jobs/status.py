"""Where a run stands, from its run directory alone: `meddam status RUN`, from any machine that can read the bucket.

    meddam status s3://bucket/runs/one
    meddam status s3://bucket/runs/one --json

Reads run.json, inputs.parquet, summary.json, progress.json and the names of the part files: no rows, no Ray. Exit codes
are the run's: 0 complete, 3 stopped, 4 not complete (yet), 2 where there is no run. How long ago the driver gave a sign
of life is reckoned by the store's clock alone: those of the driver's machine and of this one may be off, or be set.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from meddam_core import storage
from ray_jobs.module_command import run_as
from ray_jobs.progress import duration
from ray_jobs.progress_file import AT_WORK, PROGRESS
from ray_jobs.run_directory import RUN, SUMMARY, RunDirectory
from ray_jobs.summary import EXIT_INCOMPLETE, EXIT_STOPPED

SILENT_FOR = 4
"""Times the interval between two signs of life, after which a driver is taken for gone."""
_EXIT = {"complete": 0, "stopped": EXIT_STOPPED}


class Config(BaseModel):
    """What `meddam status` does."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    run: str
    """The run directory, on S3 or disk."""


class Status(BaseModel):
    """Where a run stands."""

    model_config = ConfigDict(frozen=True)

    run: str
    state: Literal["complete", "stopped", "incomplete", "interrupted", "failed", "working", "silent", "not begun"]
    """silent: its driver said it was at work, and has said nothing since."""
    phase: str | None = None
    model: str | None = None
    num_images: int = 0
    num_regions: int = 0
    num_images_done: int | None = None
    """By this session and those before it."""
    num_captions: int | None = None
    """Published."""
    regions_per_s: float | None = None
    seconds_left: float | None = None
    busy_share: float | None = None
    num_failed: int = 0
    by_reason: dict[str, int] = Field(default_factory=dict)
    worker_deaths: int = 0
    num_part_files: int = 0
    driver: str | None = None
    seconds_since_sign_of_life: float | None = None
    why: str | None = None

    @property
    def exit_code(self) -> int:
        """The run's own."""
        return _EXIT.get(self.state, EXIT_INCOMPLETE)

    def lines(self) -> list[str]:
        """For a person."""
        done = self.num_images if self.state == "complete" else self.num_images_done
        share = f" ({done / self.num_images:.1%})" if done is not None and self.num_images else ""
        text = [f"{self.state}: {self.run}" + (f", {self.phase}" if self.state == "working" else "")]
        shown = "-" if done is None else f"{done:,}"
        text.append(f"  {shown} of {self.num_images:,} images{share}, {self.num_regions:,} regions in all")
        if self.num_captions is not None:
            text.append(f"  {self.num_captions:,} captions published")
        if self.state == "working" and self.regions_per_s:
            busy = f", captioners busy {self.busy_share:.0%}" if self.busy_share is not None else ""
            left = f", {duration(self.seconds_left)} left" if self.seconds_left is not None else ""
            text.append(f"  {self.regions_per_s:,.1f} regions/s{left}{busy}")
        text += [f"  {count:>8,}  {reason}" for reason, count in sorted(self.by_reason.items(), key=lambda i: -i[1])]
        if self.worker_deaths:
            text.append(f"  {self.worker_deaths} worker deaths, made good")
        if self.why:
            text.append(f"  {self.why}")
        if self.driver and self.seconds_since_sign_of_life is not None and self.state in ("working", "silent"):
            text.append(f"  {self.driver}, last sign of life {duration(self.seconds_since_sign_of_life)} ago")
        if self.state not in ("complete", "working"):
            text.append("  run the same `meddam caption` again to go on")
        return text


def run(cfg: Config) -> Status:
    """Reads a run directory. Raises ValueError where it is none."""
    directory = RunDirectory(cfg.run)
    described, said, summary = (directory.read_json(name) for name in (RUN, PROGRESS, SUMMARY))
    if described is None and said is None:
        directory.inputs()  # says what is wrong
    shards = directory.inputs() if described is not None else []
    counts: dict[str, Any] = {
        "run": directory.uri, "model": (described or {}).get("model"),
        "num_images": sum(s.num_images for s in shards), "num_regions": sum(s.num_regions for s in shards),
    }  # fmt: skip
    said = said or {}
    silent_s = storage.age_s(directory.at(PROGRESS)) if said else None
    if summary is not None and not _alive(said, silent_s):
        return _published(counts, summary, said, silent_s)
    return _unpublished(counts, said, silent_s, len(directory.part_files()))


def _alive(said: dict[str, Any], silent_s: float | None) -> bool:
    """Whether a driver says that it is at work, and said so lately."""
    return said.get("phase") in AT_WORK and silent_s is not None and silent_s < SILENT_FOR * float(said["every_s"])


def _published(counts: dict[str, Any], summary: dict[str, Any], said: dict[str, Any], silent_s: float | None) -> Status:
    """A run with a summary stays published, whatever became of a driver: one killed before it could say that it had
    finished, or that of a retry."""
    why = summary["why"]
    if said and said["attempt"] > summary["attempt"]:
        state = f"silent for {duration(silent_s or 0.0)}" if said["phase"] in AT_WORK else said["phase"]
        why = f"a retry was begun and is {state}: run `meddam retry` again, unless its driver is still there"
    return Status(
        **counts, state=summary["state"], num_images_done=summary["num_images"], num_captions=summary["num_captions"],
        by_reason=summary["by_reason"], num_failed=sum(summary["by_reason"].values()), why=why,
    )  # fmt: skip


def _unpublished(counts: dict[str, Any], said: dict[str, Any], silent_s: float | None, num_files: int) -> Status:
    phase = said.get("phase", "not begun")
    state = "working" if _alive(said, silent_s) else "silent" if phase in AT_WORK else phase
    before, done = said.get("num_images_before", 0), said.get("num_images_done", 0)
    wanted, rate = said.get("num_regions_left"), said.get("regions_per_s")
    left = max(0.0, (wanted - said.get("num_regions_done", 0)) / rate) if wanted is not None and rate else None
    return Status(
        **counts, state=state, phase=said.get("phase"), num_images_done=before + done if said else None,
        regions_per_s=rate, seconds_left=left, busy_share=said.get("busy_share"), num_failed=said.get("num_failed", 0),
        by_reason=said.get("by_reason", {}), worker_deaths=said.get("worker_deaths", 0), num_part_files=num_files,
        driver=said.get("driver"), seconds_since_sign_of_life=silent_s, why=said.get("why"),
    )  # fmt: skip


if __name__ == "__main__":  # the same options as `meddam status`
    run_as("status")
