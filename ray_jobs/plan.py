"""What a driver finds when it opens a run directory, and what is left to do.

A new directory gets its snapshot and run.json. One that exists is compared field by field with the configuration: a run
never mixes captions of two prompts, models or crops.
"""

from __future__ import annotations

import platform
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from meddam_core import __version__, storage
from meddam_core.captioner import ViewRules
from meddam_core.dam.config import read_config
from meddam_core.datasets.recipes import get_recipe
from meddam_core.prompts import Prompt, load_prompt
from meddam_core.records import REGION_BITS, Status
from meddam_core.shards import shard_recipes
from ray_jobs.audit import Audit, images_in
from ray_jobs.caption_config import REMOTE, Config
from ray_jobs.captioners import AnySpec
from ray_jobs.checkpoints import committed_ids, repair
from ray_jobs.fingerprint import STAGES, differences, inputs_digest, weights_digest
from ray_jobs.monitor import Totals
from ray_jobs.progress import speed_figures, speed_line
from ray_jobs.publish import Generation
from ray_jobs.remote_captioner import allowed_egress, remote_digest
from ray_jobs.run_directory import RUN, SUMMARY, InputShard, RunDirectory
from ray_jobs.snapshot import changed, snapshot
from ray_jobs.summary import Summary

_PACKAGES = ("torch", "transformers", "ray", "pyarrow", "pydicom", "pillow", "numpy", "deepspeed", "deepspeed-mii")


@dataclass(slots=True, kw_only=True)
class Plan:
    """A run as this driver works on it."""

    cfg: Config
    directory: RunDirectory
    shards: list[InputShard]
    prompts: tuple[Prompt, ...]
    rules: ViewRules
    fingerprint: dict[str, Any]
    """All but the engine, which `begin` adds."""
    attempt: int = 1
    only: NDArray[np.int64] | None = None
    """Sorted ids of the images of this attempt; None for all."""
    begun_engine: dict[str, str] | None = None
    """The engine of a run that has begun."""
    finished: Summary | None = None
    """Set where there is nothing left to do."""
    unfinished: list[InputShard] = field(default_factory=list)
    num_images_left: int = 0
    num_regions_left: int = 0
    spec: AnySpec | None = None

    @property
    def model_name(self) -> str:
        """The checkpoint's name and the first digits of its hash, as every row carries it."""
        name = self.cfg.model.rstrip("/").rpartition("/")[2]
        return f"{name}@{self.fingerprint['weights'][:12]}"

    @property
    def num_images(self) -> int:
        """Images of this attempt, done or not."""
        return sum(s.num_images for s in self.shards) if self.only is None else len(self.only)

    def begin(self, spec: AnySpec) -> bool:
        """Writes run.json where this is a new run, mends the checkpoint, and finds what is left. False: nothing."""
        self.spec = spec
        if self.begun_engine is None:
            self.directory.write_inputs(self.shards)
            self.directory.write_json(_description(self, spec), RUN)
            self.begun_engine = spec.facts
        elif self.begun_engine != spec.facts:
            raise ValueError(_refusal(self.directory.uri, differences(self.begun_engine, spec.facts)))
        repair(self.directory.checkpoint(self.attempt), self.directory.parts(self.attempt))
        done = committed_ids(self.directory.checkpoint(self.attempt))
        self._find_unfinished(done)
        return self.num_images_left > 0

    def refresh(self) -> None:
        """Counts again what is left, from the part files themselves: what Ray says it wrote, and what is there."""
        mine = [uri for attempt, uri in self.directory.part_files() if attempt == self.attempt]
        ids = [found for _, found in images_in(mine)]
        self._find_unfinished(np.unique(np.concatenate(ids)) if ids else np.empty(0, np.int64))

    def clear_checkpoint(self) -> None:
        """Removes Ray's checkpoint, which a published run needs no more."""
        folder = self.directory.path("checkpoint")
        if storage.list_files(self.directory.at("checkpoint"), recursive=True):
            self.directory.filesystem.delete_dir(folder)

    def _find_unfinished(self, done: NDArray[np.int64]) -> None:
        """Shards with images that are not in `done`. Their ids lie in ranges that do not overlap."""
        self.unfinished, self.num_images_left, regions_left = [], 0, 0.0
        wanted_ids = self.only
        for shard in self.shards:
            wanted = shard.num_images if wanted_ids is None else _num_within(wanted_ids, shard)
            left = wanted - _num_within(done, shard)
            if left > 0:
                self.unfinished.append(shard)
                self.num_images_left += left
                regions_left += shard.num_regions * left / shard.num_images
        self.num_regions_left = round(regions_left)


def open_run(cfg: Config, directory: RunDirectory, retry: bool) -> Plan:
    """Compares the configuration with the run directory. Needs no Ray and reads no pixels.

    Raises ValueError where they don't fit together, or where `retry` finds no published run.
    """
    prompts = tuple(load_prompt(p) for p in cfg.prompts)
    _check(cfg, prompts)
    rules = _view_rules(cfg)
    described = directory.read_json(RUN)
    now = snapshot(cfg.shards, finished=True)
    _check_views(prompts, now)
    then = directory.inputs() if described is not None else now
    if edits := changed(then, now):
        raise ValueError(_refusal(directory.uri, [f"inputs: {e}" for e in edits[:10]]))
    plan = Plan(
        cfg=cfg, directory=directory, shards=then, prompts=prompts, rules=rules,
        fingerprint=_fingerprint(cfg, then, prompts, rules),
    )  # fmt: skip
    if described is not None:
        plan.begun_engine = described["fingerprint"].pop("engine")
        if fields := differences(described["fingerprint"], plan.fingerprint):
            raise ValueError(_refusal(directory.uri, fields))
    summary = directory.read_json(SUMMARY)
    if retry:
        _plan_retry(plan, summary)
    elif summary is not None:
        plan.finished = Summary(**summary)
    return plan


def finish_summary(
    plan: Plan, totals: Totals, generation: Generation | None, found: Audit | None, stopped: str | None, started: float
) -> Summary:
    """The summary of a session that came to its end, whichever."""
    why, state = stopped, "stopped" if stopped else "complete"
    if stopped is None and (found is None or not found.clean):
        state = "incomplete"
        missing = found.num_missing if found else plan.num_regions_left
        why = f"{missing:,} captions are missing; run the same command again"
    if found is not None and found.clean and found.num_published and found.by_status == {"failed": found.num_published}:
        state, why = "stopped", "every caption failed; mend the cause, then run `meddam retry`"
    assert plan.spec is not None
    return Summary(
        state=state, why=why, generation=generation.number if generation else None, attempt=plan.attempt,
        num_images=sum(s.num_images for s in plan.shards),
        num_regions=found.num_regions if found else sum(s.num_regions for s in plan.shards),
        num_captions=found.num_published if found else 0, by_status=found.by_status if found else {},
        by_reason=found.by_reason if found else dict(totals.by_reason),
        num_tokens=generation.num_tokens if generation else totals.num_tokens, engine=plan.spec.engine,
        kernels=plan.spec.kernels, finished_at=_now(), audit=found.to_json() if found else None, session={
            "num_images": totals.num_images, "num_regions": totals.num_regions, "num_tokens": totals.num_tokens,
            "seconds": round(time.monotonic() - started, 1), "worker_deaths": totals.num_deaths,
            "num_captioners": len(totals.busy_s), "quarantined": [str(i) for i in totals.quarantined],
            "speed": speed_line(totals), **speed_figures(totals),
        },
    )  # fmt: skip


def _check(cfg: Config, prompts: tuple[Prompt, ...]) -> None:
    if len({p.id for p in prompts}) != len(prompts):
        raise ValueError(f"the same prompt is given twice: {', '.join(p.id for p in prompts)}")
    if cfg.num_samples > 1 and cfg.temperature == 0:
        raise ValueError(
            "greedy captions of one region are all the same; give --temperature above 0 with --num-samples"
        )


def _check_views(prompts: tuple[Prompt, ...], shards: list[InputShard]) -> None:
    """Prompts for pictures go with pictures, video prompts with recipes that show clips. Looks at the first shard."""
    clips = {get_recipe(name).clip for name in shard_recipes(shards[0].uri)}
    video = {prompt.num_views != 1 for prompt in prompts}
    if len(video | clips) == 1:
        return
    if True in clips:
        raise ValueError("the shards' recipe shows regions as clips; choose a video prompt (--prompt dam-video)")
    raise ValueError(
        "a video prompt (eight <image>) cannot describe pictures; choose another --prompt, or shards whose recipe "
        "shows clips (lidc-idri-clip)"
    )


def _view_rules(cfg: Config) -> ViewRules:
    """How regions are shown: to a remote model as pictures that keep their shape, and only those that it may see."""
    chosen: Any = {"margin": cfg.margin, "window": cfg.window}
    if cfg.engine == REMOTE:
        return ViewRules(size=cfg.view_size, aspect=cfg.aspect or "pad", egress=allowed_egress(cfg), **chosen)  # type: ignore[arg-type]
    return ViewRules(size=read_config(cfg.model).view.size, aspect=cfg.aspect, **chosen)  # type: ignore[arg-type]


def _fingerprint(
    cfg: Config, shards: list[InputShard], prompts: tuple[Prompt, ...], rules: ViewRules
) -> dict[str, Any]:
    sampling = cfg.sampling
    return {
        "inputs": inputs_digest(shards),
        "prompts": {p.id: p.version for p in prompts},
        "num_samples": cfg.num_samples,
        "sampling": {k: getattr(sampling, k) for k in ("max_new_tokens", "temperature", "top_p", "top_k", "seed")},
        "weights": remote_digest(cfg.model) if cfg.engine == REMOTE else weights_digest(cfg.model),
        "views": {k: getattr(rules, k) for k in ("size", "aspect", "margin", "window")},
        "stages": STAGES,
    }


def _description(plan: Plan, spec: AnySpec) -> dict[str, Any]:
    return {
        "meddam": __version__,
        "begun_at": _now(),
        "model": plan.model_name,
        "config": plan.cfg.model_dump(mode="json"),
        "fingerprint": plan.fingerprint | {"engine": spec.facts},
        "prompt_texts": {p.id: p.text for p in plan.prompts},
        "versions": {"python": platform.python_version(), **{p: _version(p) for p in _PACKAGES}},
        "licence": "captions inherit the licences of the weights and of the images; see docs/licences.md",
        "not_for_diagnosis": True,
    }


def _now() -> str:
    return datetime.now(UTC).isoformat(sep=" ", timespec="seconds")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _refusal(uri: str, fields: list[str]) -> str:
    listed = "\n".join(f"  {f}" for f in fields)
    return (
        f"{uri} belongs to another run:\n{listed}\nCaptions of two runs are not mixed. "
        "Give the settings it was begun with, or another --out."
    )


def _plan_retry(plan: Plan, summary: dict[str, Any] | None) -> None:
    if summary is None:
        raise ValueError(f"{plan.directory.uri} is not complete yet: run `meddam caption` again first, then retry")
    failed = []
    for uri in plan.directory.published() or []:
        fs, path = storage.open_uri(uri)
        rows = pq.read_table(path, filesystem=fs, columns=["region_id", "status"], partitioning=None)
        is_failed = np.asarray(rows["status"].to_numpy(zero_copy_only=False) == Status.FAILED.value)
        failed.append(np.asarray(rows["region_id"].to_numpy(), np.int64)[is_failed] >> REGION_BITS)
    plan.only = np.unique(np.concatenate(failed)) if failed else np.empty(0, np.int64)
    plan.attempt = int(summary["attempt"]) + 1
    if not len(plan.only):
        plan.finished = Summary(**summary)


def _num_within(ids: NDArray[np.int64], shard: InputShard) -> int:
    """How many of the sorted ids lie in the shard's range."""
    return int(np.searchsorted(ids, shard.last_id, "right") - np.searchsorted(ids, shard.first_id, "left"))
