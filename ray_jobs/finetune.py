"""Train a DAM on image shards and captions; resumable, from any DAM checkpoint or from scratch.

    meddam finetune s3://bucket/vindr --caption s3://bucket/runs/one --model /weights/DAM-3B --train lora --out s3://bucket/ft
    ray job submit --working-dir . --runtime-env runtime_env.yaml -- python -m ray_jobs.finetune SHARDS --out ... ...

Run the same command again after any failure: it goes on from the last checkpoint. OUT/model is the result, in the
official layout; OUT/report.html shows the curve.

Invariants:
- the batches of a step depend on the configuration only, not on workers lost or drivers killed;
- one driver at a time (the lease); what decides the data or the model cannot change between its sessions;
- captions and images are read where they lie; the licences of both go into OUT/run.json.
"""

from __future__ import annotations

import itertools
import json
import logging
import pickle
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from operator import itemgetter
from typing import Any

from pydantic import BaseModel

from meddam_core import __version__, storage
from meddam_core.reports.yield_report import training_report
from meddam_core.training.order import Reading
from ray_jobs.curate import CAPTIONS, CURATION
from ray_jobs.finetune_config import Config
from ray_jobs.finetune_worker import CURVE, MODEL, Spec, World, reader, train
from ray_jobs.fingerprint import differences, inputs_digest, weights_digest
from ray_jobs.lease import Lease
from ray_jobs.module_command import run_as
from ray_jobs.run_directory import RUN, SUMMARY, RunDirectory
from ray_jobs.session import session
from ray_jobs.snapshot import snapshot

logger = logging.getLogger(__name__)

FREE = frozenset({
    "out", "max_steps", "learning_rate", "warmup_steps", "checkpoint_every", "keep_checkpoints", "eval_shards",
    "eval_every", "eval_regions", "num_threads", "num_cpus", "log_every", "max_failures", "use_gpu", "checkpointing",
    "cache_views", "strategy", "zero_stage", "batch_size", "accumulate",
})  # fmt: skip
"""Settings that a resumed run may change: not what is learnt from what. Another batch size deals the data anew."""


class Summary(BaseModel):
    """How a training run ended."""

    model: str
    """The trained checkpoint, in the official layout."""
    num_examples: int
    num_steps: int
    loss: float | None
    meddlc: float | None = None
    seconds: float

    @property
    def exit_code(self) -> int:
        """A run that ends has made all its steps."""
        return 0

    def lines(self) -> list[str]:
        """For a person."""
        score = "" if self.meddlc is None else f", MedDLC-score {100 * self.meddlc:.1f} on held-out regions"
        loss = "" if self.loss is None else f", loss {self.loss:.3f}"
        return [
            f"{self.num_steps:,} steps over {self.num_examples:,} regions{loss}{score}; {self.seconds:.0f} s",
            self.model,
        ]


def run(cfg: Config) -> Summary:
    """Trains, or goes on. Raises ValueError for a configuration that cannot work, LeaseHeld where another driver is."""
    started = time.monotonic()
    directory = RunDirectory(cfg.out)
    storage.check_writable(directory.uri)
    with Lease(directory.uri):
        spec = _open(cfg, directory)
        if cfg.num_workers == 0:
            train(_with_views(spec, None), World())
        else:
            with session(cfg.num_cpus):
                _train_on_ray(_with_views(spec, _ray_map), cfg)
        return _finish(spec, directory, time.monotonic() - started)


def _open(cfg: Config, directory: RunDirectory) -> Spec:
    """Checks and notes what is to be done, and finds the data. Raises ValueError where a resume would change it."""
    from meddam_core.training.adapt import import_peft
    from meddam_core.training.data import CaptionTable, files_of_shards

    if cfg.train == "lora":
        import_peft()  # before anything is read or begun
    # captions are joined by region id; without a table two datasets may hold the same ids
    named = Counter(cfg.shards)  # a folder named twice comes twice as often
    places = [list(named)] if cfg.captions else [[uri] for uri in named]
    shards = [s for some in places for s in snapshot(some, finished=True)]
    shards += [s for uri, times in named.items() for s in snapshot([uri]) * (times - 1)]
    captions = tuple(f for uri in cfg.captions for f in caption_files(uri))
    fingerprint = {
        "config": {k: v for k, v in cfg.model_dump(mode="json").items() if k not in FREE},
        "inputs": inputs_digest(shards),
        "weights": "tiny" if cfg.model == "tiny" else weights_digest(cfg.model),
    }
    begun = directory.read_json(RUN)
    if begun is not None and (changed := differences(begun["fingerprint"], fingerprint)):
        raise ValueError(f"{cfg.out} was begun with other settings: {'; '.join(changed)}. Use these, or another --out")
    table = CaptionTable.read(captions) if captions else None
    files = files_of_shards([s.uri for s in shards], split=cfg.split, captions=table)
    if not files:
        raise ValueError("no region is left to learn from: check --split, and that the captions are of these shards")
    if begun is None:
        lineage = {"images": licences([s.uri for s in shards]), "captions": [_run_facts(u) for u in cfg.captions]}
        directory.write_json(
            {"job": "finetune", "version": __version__, "config": cfg.model_dump(mode="json"),
             "fingerprint": fingerprint, "lineage": lineage}, RUN,
        )  # fmt: skip
    return Spec(cfg=cfg, files=tuple(files), size=_view_size(cfg), caption_files=captions)


def caption_files(uri: str) -> list[str]:
    """The caption tables of a published run, of a curated set, or of any folder. Raises ValueError where none are."""
    directory = RunDirectory(uri)
    folder = directory.at(CAPTIONS) + "/" if directory.read_json(CURATION) is not None else directory.uri
    published = directory.published()
    found = published if published is not None else [o.uri for o in storage.list_objects(folder, ".parquet")]
    if not found:
        raise ValueError(
            f"{uri} holds no captions: give a finished run of `meddam caption` or a set of `meddam curate`"
        )
    return found


def licences(uris: Sequence[str]) -> list[str]:
    """The licences of the images of some shards."""
    import pyarrow.parquet as pq

    found: set[str] = set()
    for uri in uris:
        fs, path = storage.open_uri(uri)
        found |= set(pq.read_table(path, columns=["licence"], filesystem=fs)["licence"].unique().to_pylist())
    return sorted(found)


def _run_facts(uri: str) -> dict[str, Any]:
    directory = RunDirectory(uri)
    curated = directory.read_json(CURATION)
    if curated is not None:
        return {
            "uri": uri,
            "job": "curate",
            "licences": curated["licences"],
            "runs": [r["uri"] for r in curated["runs"]],
        }
    begun = directory.read_json(RUN) or {}
    return {"uri": uri, "job": begun.get("job", "caption"), "model": begun.get("config", {}).get("model")}


def _view_size(cfg: Config) -> int:
    if cfg.model == "tiny":
        from meddam_core.training.tiny import VIEW_SIZE

        return VIEW_SIZE
    from meddam_core.dam.config import read_config

    return read_config(cfg.model).view_size


# -- views that are prepared once -------------------------------------------------------------------------------------


def _with_views(spec: Spec, mapper: Any) -> Spec:
    """The same work over files of prepared views, where the config asks for them; those that are there are kept."""
    if not spec.cfg.cache_views:
        return spec
    from meddam_core.training.data import files_of_views

    folder = storage.join(spec.cfg.out, "views")
    there = {o.uri.rpartition("/")[2] for o in storage.list_objects(folder, ".parquet")}
    tasks = [(f, f"views-{i:06d}.parquet") for i, f in enumerate(spec.files) if f"views-{i:06d}.parquet" not in there]
    prepare = partial(_prepare, folder=folder, spec=replace(spec, caption_files=()))
    if mapper is None:
        for task in tasks:
            prepare(task)
    elif tasks:
        mapper(prepare, tasks)
    uris = sorted(o.uri for o in storage.list_objects(folder, ".parquet"))
    return replace(spec, files=tuple(files_of_views(uris)))


def _prepare(task: tuple[Any, str], folder: str, spec: Spec) -> None:
    from meddam_core.training.examples import write_views

    file, name = task
    write_views(storage.join(folder, name), reader(spec)(file), spec.size)


def _ray_map(function: Any, tasks: list[Any]) -> None:
    """The tasks, shared out over the cluster by Ray Data."""
    import ray

    def of_row(row: dict[str, Any]) -> dict[str, Any]:
        function(row["item"])
        return {"done": 1}

    ray.data.from_items(tasks).map(of_row, num_cpus=0.5).count()


# -- Ray Train --------------------------------------------------------------------------------------------------------


def _train_on_ray(spec: Spec, cfg: Config) -> None:
    """Trains in Ray Train workers; a worker that is lost is replaced, and all go on from the last checkpoint."""
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    cluster = ray.cluster_resources()
    use_gpu = cfg.use_gpu if cfg.use_gpu is not None else cluster.get("GPU", 0) >= cfg.num_workers
    share = {"GPU": 1.0} if use_gpu else {"CPU": max(0.1, min(1.0, cluster["CPU"] / (2 * cfg.num_workers)))}
    with tempfile.TemporaryDirectory() as notes:  # Ray's own; ours are under OUT
        TorchTrainer(
            _worker, train_loop_config={"spec": spec},
            scaling_config=ScalingConfig(num_workers=cfg.num_workers, use_gpu=use_gpu, resources_per_worker=share),
            run_config=RunConfig(
                name="finetune", storage_path=notes, failure_config=FailureConfig(max_failures=cfg.max_failures)
            ),
        ).fit()  # fmt: skip


def _worker(settings: dict[str, Any]) -> None:
    """What each Ray Train worker runs."""
    import ray.train
    import ray.train.torch

    context = ray.train.get_context()
    world = World(
        rank=context.get_world_rank(), num_workers=context.get_world_size(),
        device=str(ray.train.torch.get_device()), read=read_by_ray, report=ray.train.report,
    )  # fmt: skip
    train(settings["spec"], world)


READINGS_AHEAD = 16
"""Windows that are planned in one Ray dataset; how many are in memory is up to Ray's backpressure."""


def read_by_ray(order: Iterator[Reading], spec: Spec) -> Iterator[tuple[Reading, list[Any]]]:
    """Windows through Ray Data: rendered on the cluster's CPUs while the worker learns, in order."""
    import ray

    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    while planned := list(itertools.islice(order, READINGS_AHEAD)):
        items = [{"window": w, "file": f} for w, reading in enumerate(planned) for f in reading.files]
        files = ray.data.from_items(items, override_num_blocks=len(items))
        rows = files.map(partial(_read_examples, spec=spec), num_cpus=0.25)  # 1:1, a file of examples a row
        for window, found in itertools.groupby(rows.iter_rows(), key=itemgetter("window")):
            yield planned[window], [e for row in found for e in pickle.loads(row["examples"])]


def _read_examples(row: dict[str, Any], spec: Spec) -> dict[str, Any]:
    """Pickled, because Ray's blocks are Arrow: read again by this job's own workers only."""
    return {"window": row["window"], "examples": pickle.dumps(reader(spec)(row["file"]), protocol=5)}


# -- the end ----------------------------------------------------------------------------------------------------------


def _finish(spec: Spec, directory: RunDirectory, seconds: float) -> Summary:
    curve = json.loads(storage.read_bytes(directory.at(CURVE)))
    losses = [e["loss"] for e in curve if "loss" in e]
    scores = [e["meddlc_average"] for e in curve if "meddlc_average" in e]
    summary = Summary(
        model=directory.at(MODEL), num_examples=sum(f.num_examples for f in spec.files), num_steps=spec.cfg.max_steps,
        loss=losses[-1] if losses else None, meddlc=scores[-1] if scores else None, seconds=round(seconds, 1),
    )  # fmt: skip
    directory.write_json(summary.model_dump(), SUMMARY)
    facts = {
        "regions": f"{summary.num_examples:,}",
        **{
            k: ", ".join(v) if isinstance(v, tuple) else v
            for k, v in spec.cfg.model_dump().items()
            if v not in (None, ())
        },
    }
    page = training_report(directory.uri.rstrip("/").rpartition("/")[2], curve, facts)
    storage.write_bytes(directory.at("report.html"), page.encode())
    return summary


if __name__ == "__main__":  # the same options as `meddam finetune`
    run_as("finetune")
