"""Describe every region of every image: shards in, a published table of captions out.

    meddam caption s3://bucket/vindr --out s3://bucket/runs/one --model /weights/DAM-3B
    ray job submit --working-dir . --runtime-env runtime_env.yaml -- python -m ray_jobs.caption SHARDS --out RUN ...

Run the same command again after any failure: it goes on where it stopped. Exit codes: see ray_jobs.summary.

Invariants:
- one image row from read to write; captions stay nested, because Ray's resume counts an id as done with its first row;
- published captions = regions x prompts x samples, exactly once; failures are rows with reasons;
- the driver holds ids and counts, never rows.
"""

from __future__ import annotations

import functools
import time
from typing import Any

from meddam_core import storage
from meddam_core.shards import shard_schema
from ray_jobs.actors import DescribeRegions, ExtractRegions
from ray_jobs.audit import audit
from ray_jobs.caption_config import REMOTE, Config
from ray_jobs.captioners import AnySpec, release, resolve
from ray_jobs.estimate import Estimate, estimate
from ray_jobs.lease import Lease, give_way
from ray_jobs.module_command import run_as
from ray_jobs.monitor import start_monitor
from ray_jobs.plan import Plan, finish_summary, open_run
from ray_jobs.progress import progress
from ray_jobs.progress_file import ProgressFile
from ray_jobs.publish import publish
from ray_jobs.run_directory import SUMMARY, RunDirectory
from ray_jobs.session import Shares, session, share_cpus, stop_on_sigterm, wait_for_gpus
from ray_jobs.summary import Summary

BLOCK_BYTES = 32 << 20
"""Small blocks up to the captioner, so that all captioners start at once and end together."""
MAX_PASSES = 3


def run(cfg: Config, retry: bool = False) -> Summary | Estimate:
    """Captions what is not captioned yet, audits and publishes.

    Args:
        cfg: what to do.
        retry: caption the failed images of a published run again, as a further attempt.

    Raises ValueError or StorageError for a configuration that cannot work, before any work; LeaseHeld where another
    driver is at it; TooFewGpus where those it waited for have not come.
    """
    started = time.monotonic()
    directory = RunDirectory(cfg.out)
    if cfg.dry_run:
        return _dry_run(cfg, directory)
    storage.check_writable(directory.uri)
    with Lease(directory.uri, on_lost=give_way):
        plan = open_run(cfg, directory, retry)
        if plan.finished is not None:
            return plan.finished
        with ProgressFile(directory, plan.attempt) as shown, session(cfg.num_cpus):
            stop_on_sigterm()
            wait_for_gpus(cfg.wait_for_gpus, cfg.wait_for_gpus_s)
            spec = resolve(cfg, plan.prompts, plan.begun_engine)
            try:
                monitor = start_monitor(cfg.max_failed_share, cfg.canary_images, min_images=100)
                stopped = None
                for _ in range(MAX_PASSES):  # the second finds nothing left, unless files went missing under the first
                    if stopped is not None or not plan.begin(spec):
                        break
                    stopped = _caption(cfg, plan, spec, monitor, shown)
                return _publish(plan, monitor, stopped, started, shown)
            finally:
                release(spec)


def _dry_run(cfg: Config, directory: RunDirectory) -> Estimate:
    if cfg.engine == REMOTE:
        raise ValueError("a dry run captions a few images, which a remote endpoint would be paid for; leave it out")
    plan = open_run(cfg, directory, retry=False)
    with session(cfg.num_cpus):
        spec = resolve(cfg, plan.prompts, plan.begun_engine)
        return estimate(plan, spec, share_cpus(spec.num_captioners, cfg.num_extractors).max_extractors)


def _caption(cfg: Config, plan: Plan, spec: AnySpec, monitor: Any, shown: ProgressFile) -> str | None:
    """One pass over what is missing. Returns why it was stopped, or None."""
    import ray

    shares = share_cpus(spec.num_captioners, cfg.num_extractors)
    left = (plan.num_images_left, plan.num_regions_left)
    shown.phase("captioning", num_images_before=plan.num_images - left[0], num_regions_left=left[1])
    with progress(lambda: ray.get(monitor.totals.remote()), *left, also=shown.update):
        try:
            images = read_shards(plan, shares)  # streams from S3; finished shards are not read again
            regions = images.map_batches(  # 1:1  CPU actors: decode, window, margin, focal crops -> uint8
                ExtractRegions, fn_constructor_args=(plan.rules, monitor), batch_size=4, batch_format="pyarrow",
                num_cpus=shares.extract, compute=ray.data.ActorPoolStrategy(min_size=1, max_size=shares.max_extractors),
            )  # fmt: skip
            captions = regions.map_batches(  # 1:1  GPU actors: batched DAM; two calls in flight each share its batches
                DescribeRegions, fn_constructor_args=(spec, plan.rules.size, monitor, plan.attempt, plan.model_name),
                batch_size=cfg.images_per_batch, batch_format="pyarrow", num_cpus=shares.describe,
                num_gpus=spec.gpus_each, compute=ray.data.ActorPoolStrategy(
                    size=spec.num_captioners, max_concurrent_calls_per_actor=2, max_tasks_in_flight_per_actor=4,
                    enable_true_multi_threading=True,
                ),
            )  # fmt: skip
            captions.write_parquet(  # two-phase commit of files and of the ids in them
                plan.directory.path("parts", f"attempt={plan.attempt}"), filesystem=plan.directory.filesystem,
                min_rows_per_file=cfg.images_per_file, concurrency=shares.max_writers,
                ray_remote_args={"num_cpus": shares.write},
            )  # fmt: skip
        except Exception:  # the breaker raises in an actor and Ray wraps that; anything else goes on up
            stop: str | None = ray.get(monitor.totals.remote()).stop
            if stop is None:
                raise
            return stop
    return None


def read_shards(plan: Plan, shares: Shares) -> Any:
    """The images that have no part row yet, as a Ray dataset; shards that are done are left out by path."""
    import ray
    from ray.data.checkpoint import CheckpointConfig

    context = ray.data.DataContext.get_current()
    context.use_datasource_v2 = False  # 2.60's new reader puts 20 small files into one block, for one actor
    context.target_max_block_size = BLOCK_BYTES
    # Otherwise reading ahead fills what stages share of a small object store, and the others crawl at a tenth.
    context.op_resource_reservation_ratio = 0.95
    context.memory_usage_poll_interval_s = None  # each worker would walk its pages once a second, the store's with them
    context.checkpoint_config = CheckpointConfig(
        id_column="image_id", checkpoint_path=plan.directory.path("checkpoint", f"attempt={plan.attempt}"),
        override_filesystem=plan.directory.filesystem, delete_checkpoint_on_success=False,
    )  # fmt: skip
    filesystem, _ = storage.open_uri(plan.unfinished[0].uri)
    images = ray.data.read_parquet(
        [storage.open_uri(s.uri)[1] for s in plan.unfinished], filesystem=filesystem, partitioning=None,
        num_cpus=shares.read, concurrency=shares.max_readers,
        schema=shard_schema({}),  # not the first file's: an older one may lack columns
    )  # fmt: skip
    if plan.only is not None:  # an attempt beyond the first: only what failed
        images = images.map_batches(
            functools.partial(_only, ids=ray.put(plan.only)), batch_format="pyarrow", num_cpus=shares.read,
            concurrency=shares.max_readers,
        )  # fmt: skip
    return images


def _only(batch: Any, ids: Any) -> Any:
    import numpy as np
    import pyarrow as pa
    import ray

    return batch.filter(pa.array(np.isin(batch["image_id"].to_numpy(), ray.get(ids))))


def _publish(plan: Plan, monitor: Any, stopped: str | None, started: float, shown: ProgressFile) -> Summary:
    """Writes the flat table from the parts, audits it, and announces it when nothing is missing or twice."""
    import ray

    totals = ray.get(monitor.totals.remote())
    plan.refresh()
    if stopped is not None or plan.num_images_left:
        summary = finish_summary(plan, totals, None, None, stopped, started)
        shown.finish(summary, totals)
        return summary
    shown.phase("publishing")
    generation = publish(plan.directory)
    found = audit(plan.directory, generation.files)
    summary = finish_summary(plan, totals, generation, found, None, started)
    if found.clean:
        plan.directory.write_json(summary.model_dump(mode="json"), SUMMARY)
        plan.clear_checkpoint()
    shown.finish(summary, totals)
    return summary


if __name__ == "__main__":  # the same options as `meddam caption`
    run_as("caption")
