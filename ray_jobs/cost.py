"""What a run will cost, before it is begun: `meddam plan SHARDS --gpus 8 --gpu h100 --like RUN`.

    meddam plan s3://bucket/set --gpus 32 --gpu l4-spot --like s3://bucket/runs/trial --startup-minutes 15
    meddam plan s3://bucket/set --gpus 8 --captions-per-s 2.5 --prices ours.yaml --json

Counts are exact: from the shards' footers. Rates are measured: --like reads them from a published run (a trial of a few
hundred images on one GPU of the kind), --captions-per-s takes a figure of `meddam caption --dry-run` or of
benchmarks/LOG.md. Without one of the two there is no plan. Prices come from a table that you can replace. What is
neither counted nor priced is named at the end.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

from meddam_core import storage
from ray_jobs.module_command import run_as
from ray_jobs.progress import duration
from ray_jobs.run_directory import SUMMARY, RunDirectory
from ray_jobs.snapshot import snapshot

PRICES = Path(__file__).parent / "prices.yaml"
JUDGE_PROMPT_TOKENS = 220
"""Of the question with its options and rules, beside the caption; `meddam judge --dry-run` counts them exactly."""
JUDGE_ANSWER_TOKENS = 15


class Config(BaseModel):
    """What `meddam plan` is told."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    shards: tuple[str, ...] = Field(min_length=1)
    """Folders of image shards, on S3 or disk."""
    gpus: int = Field(1, ge=1)
    """GPUs (or captioners) that work at once."""
    gpu: str = "own"
    """Kind of GPU, as the price table names it."""
    like: str | None = None
    """A published run with the same model, prompts and kind of GPU: its measured rates are taken."""
    captions_per_s: float | None = Field(None, gt=0)
    """Measured rate of one GPU, where no run is given."""
    captions_per_region: int = Field(1, ge=1)
    """Prompts times samples."""
    busy_share: float = Field(0.95, gt=0, le=1)
    """Share of the time that captioners work; with --like the run's own, if it says."""
    judge: str | None = None
    """Judge, as the price table names it; by default none."""
    questions_per_region: int = Field(8, ge=1)
    """Questions a region that the judge is asked about each caption."""
    startup_minutes: float | None = Field(None, ge=0)
    """Minutes that GPUs are paid before the first caption: nodes start, weights are loaded. By default left out."""
    months: float = Field(12, ge=0)
    """How long captions are kept."""
    prices: Path = PRICES
    """YAML table of prices; by default the one that comes with the package."""

    @model_validator(mode="after")
    def _has_a_rate(self) -> Config:
        if (self.like is None) == (self.captions_per_s is None):
            raise ValueError(
                "a plan needs one measured rate: --like RUN (a trial on one such GPU), or --captions-per-s from "
                "`meddam caption --dry-run`"
            )
        return self


class Plan(BaseModel):
    """What a run will take."""

    model_config = ConfigDict(frozen=True)

    num_images: int
    num_regions: int
    num_captions: int
    captions_per_s: float
    """Of one GPU, while it works."""
    gpu_hours: float
    seconds: float
    """From the first caption to the last."""
    startup_gpu_hours: float = 0.0
    """Of GPUs that are there and have nothing to do yet."""
    tokens_per_caption: float | None
    caption_gb: float | None
    """Storage of parts and published captions."""
    shards_gb: float
    judge_calls: int = 0
    judge_million_tokens: float = 0.0
    currency: str
    cost_gpus: float | None
    """While they caption."""
    cost_startup: float | None = 0.0
    cost_storage: float | None
    cost_judge: float | None
    assumed: list[str]
    """What was neither counted nor measured."""
    left_out: list[str]
    """What a bill has besides."""

    @property
    def exit_code(self) -> int:
        """A plan that could be made is a success."""
        return 0

    @property
    def cost(self) -> float:
        """Of all lines that have a price."""
        return sum(c for c in (self.cost_gpus, self.cost_startup, self.cost_storage, self.cost_judge) if c is not None)

    def lines(self) -> list[str]:
        """For a person."""
        text = [
            f"{self.num_images:,} images, {self.num_regions:,} regions, {self.num_captions:,} captions to make",
            f"  {self.gpu_hours:>12,.2f}  GPU hours at {self.captions_per_s:.2f} captions/s  "
            + self._money(self.cost_gpus),
            f"  {duration(self.seconds):>12}  from the first caption to the last",
        ]
        if self.startup_gpu_hours:
            cost = self._money(self.cost_startup)
            text.append(f"  {self.startup_gpu_hours:>12,.2f}  GPU hours before the first caption  {cost}")
        if self.caption_gb is not None:
            text.append(f"  {self.caption_gb:>12,.3f}  GB of captions, kept  {self._money(self.cost_storage)}")
        text.append(f"  {self.shards_gb:>12,.3f}  GB of image shards, there already")
        if self.judge_calls:
            text.append(
                f"  {self.judge_million_tokens:>12,.2f}  million tokens in {self.judge_calls:,} calls of the judge  "
                + self._money(self.cost_judge)
            )
        text.append(f"  {self.cost:>12,.2f}  {self.currency} in all, of what has a price")
        text += [f"  assumed: {line}" for line in self.assumed]
        return [*text, f"  not in it: {', '.join(self.left_out)}"]

    def _money(self, cost: float | None) -> str:
        return "(no price in the table)" if cost is None else f"{cost:,.2f} {self.currency}"


def run(cfg: Config) -> Plan:
    """Makes a plan. Raises ValueError where the shards, the run or the table are not there, or the run has no rate."""
    table = _table(cfg.prices)
    shards = snapshot(cfg.shards)
    num_regions = sum(s.num_regions for s in shards)
    if not num_regions:
        raise ValueError("the shards hold no regions: their recipe's detector finds them later; use --dry-run instead")
    measured = _measured(cfg)
    num_captions = num_regions * cfg.captions_per_region
    gpu_hours = num_captions / (measured["rate"] * measured["busy"]) / 3600
    caption_gb = num_captions * measured["bytes"] / 1e9 if measured["bytes"] else None
    tokens = measured["tokens"]
    calls = num_captions * cfg.questions_per_region if cfg.judge else 0
    inputs, outputs = calls * (JUDGE_PROMPT_TOKENS + (tokens or 0)) / 1e6, calls * JUDGE_ANSWER_TOKENS / 1e6
    startup = cfg.gpus * (cfg.startup_minutes or 0) / 60
    hour, month = table["gpu_hour"].get(cfg.gpu), table.get("storage_gb_month")
    prices = table["judge_million_tokens"].get(cfg.judge) if cfg.judge else None
    return Plan(
        num_images=sum(s.num_images for s in shards), num_regions=num_regions, num_captions=num_captions,
        captions_per_s=measured["rate"], gpu_hours=gpu_hours, seconds=3600 * gpu_hours / cfg.gpus,
        tokens_per_caption=tokens, caption_gb=caption_gb, shards_gb=sum(s.size for s in shards) / 1e9,
        judge_calls=calls, judge_million_tokens=inputs + outputs, currency=table["currency"],
        cost_gpus=None if hour is None else gpu_hours * hour,
        startup_gpu_hours=startup, cost_startup=None if hour is None else startup * hour,
        cost_storage=None if month is None or caption_gb is None else caption_gb * month * cfg.months,
        cost_judge=None if prices is None else inputs * prices["input"] + outputs * prices["output"],
        assumed=_assumed(cfg, measured), left_out=_left_out(cfg),
    )  # fmt: skip


def _measured(cfg: Config) -> dict[str, Any]:
    """{rate of one GPU while it works, busy share, tokens and bytes a caption}."""
    if cfg.like is None:
        return {"rate": cfg.captions_per_s, "busy": cfg.busy_share, "tokens": None, "bytes": None, "is_busy": False}
    directory = RunDirectory(cfg.like)
    summary = directory.read_json(SUMMARY)
    session = (summary or {}).get("session", {})
    if summary is None or not session.get("regions_per_s"):
        raise ValueError(f"{cfg.like} says no rate: it is not complete, or its last session captioned nothing")
    captions_per_region = summary["num_captions"] / max(1, summary["num_regions"])
    busy = session.get("busy_share") or cfg.busy_share
    each = session["regions_per_s"] * captions_per_region / (session.get("num_captioners") or 1)
    num_bytes = sum(o.size for o in storage.list_objects(directory.generation(summary["generation"]) + "/", ".parquet"))
    return {  # bytes twice: parts stay beside the published table
        "rate": each / busy, "busy": busy, "tokens": summary["num_tokens"] / max(1, summary["num_captions"]),
        "bytes": 2 * num_bytes / max(1, summary["num_captions"]) or None, "is_busy": "busy_share" in session,
    }  # fmt: skip


def _assumed(cfg: Config, measured: dict[str, Any]) -> list[str]:
    said = ["rates hold for all images: a trial on a random sample of them comes closest"]
    if not measured["is_busy"]:
        said.append(f"captioners busy {measured['busy']:.0%} of the time")
    if measured["bytes"] is None:
        said.append("nothing about the size of captions: give --like RUN to have it measured")
    if cfg.judge:
        said.append(f"{JUDGE_PROMPT_TOKENS} tokens a question beside the caption; `meddam judge --dry-run` counts them")
    if cfg.gpus > 1:
        said.append(f"{cfg.gpus} GPUs are {cfg.gpus} times as fast as one: CPUs and the bucket can feed them")
    return said


def _left_out(cfg: Config) -> list[str]:
    always = ["the head", "requests and traffic of the bucket", "work done twice where nodes are taken away", "taxes"]
    return always if cfg.startup_minutes is not None else ["starting nodes and loading (--startup-minutes)", *always]


def _table(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"there is no price table {path}; copy {PRICES} and put your prices in")
    found = yaml.safe_load(path.read_text())
    lacking = [k for k in ("currency", "gpu_hour", "judge_million_tokens") if k not in (found or {})]
    if lacking:
        raise ValueError(f"{path} lacks {', '.join(lacking)}; copy {PRICES} and put your prices in")
    return dict(found)


if __name__ == "__main__":  # the same options as `meddam plan`
    run_as("plan")
