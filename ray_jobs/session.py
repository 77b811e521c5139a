"""Joining a Ray cluster, or starting one on this machine, and sharing its CPUs out between the stages of a job."""

from __future__ import annotations

import logging
import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

logger = logging.getLogger(__name__)

WAIT_EVERY_S = 10.0
MIN_CPUS = 2
"""Ray's checkpoint filter takes a whole CPU when a run resumes; a session of one CPU would wait for it for ever."""


class TooFewGpus(RuntimeError):
    """The GPUs that a job waited for have not come: a shortage, which the same command may not meet again."""


@contextmanager
def session(num_cpus: int | None = None, object_store_bytes: int | None = None) -> Iterator[None]:
    """A Ray session for the length of a job.

    Inside `ray job submit`, or with RAY_ADDRESS set, it joins that cluster. Otherwise it starts one on this machine,
    never joining a stranger's that happens to run here, and ends it at the end.

    Args:
        num_cpus: CPUs of a session started here; by default those of the machine.
        object_store_bytes: its object store; by default Ray's choice.
    """
    import ray

    quiet = os.environ.get("MEDDAM_RAY_LOGS") is None
    common: dict[str, Any] = {
        "log_to_driver": not quiet, "logging_level": logging.ERROR if quiet else logging.INFO, "namespace": "meddam"
    }  # fmt: skip
    if ray.is_initialized():
        _wait_as_long_as_it_takes()
        yield
        return
    if os.environ.get("RAY_ADDRESS"):
        ray.init(address="auto", **common)
    else:
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # unset, Ray leaves a token in the user's home
        if quiet:  # Ray's C++ side writes to the terminal past Python's logging
            os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
        _start(
            address="local", num_cpus=max(MIN_CPUS, num_cpus or os.cpu_count() or 1), include_dashboard=False,
            object_store_memory=object_store_bytes, **common,
        )  # fmt: skip
    _quiet_ray_data(quiet)
    _wait_as_long_as_it_takes()
    try:
        yield
    finally:
        ray.shutdown()


def _start(**settings: Any) -> None:
    """ray.init, once more or twice where a busy machine took longer than the 30 s that Ray allows itself."""
    import ray

    for attempts_left in (2, 1, 0):
        try:
            ray.init(**settings)
        except Exception as error:  # Ray has no type of its own for it
            if not attempts_left or "timed out during startup" not in str(error):
                raise
            ray.shutdown()
        else:
            return


def _quiet_ray_data(quiet: bool) -> None:
    """Our own progress line stands instead of Ray Data's bars, which print one a stage."""
    import ray

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    if quiet:
        for name in ("ray.data", "ray"):
            logging.getLogger(name).setLevel(logging.ERROR)


def _wait_as_long_as_it_takes() -> None:
    """Ray Data ends a job in which no block has moved for half an hour; here nothing does, other than the job itself.

    It cannot tell waiting from hanging. A caption run whose spot nodes are all gone waits for others, which `meddam
    status` shows; a throttled judge writes its first file after an hour, and has a patience of its own; a part of an
    ingest may be a thousand slides.
    """
    import ray

    ray.data.DataContext.get_current().execution_no_progress_timeout_s = -1  # off


def stop_on_sigterm() -> None:
    """SIGTERM (`ray job stop`, a pod's or Slurm job's end) ends a job as Ctrl-C does: cleanly, with its exit code.

    Called once Ray is there, whose own handler would end the driver with code 15.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _interrupt)


def _interrupt(signum: int, frame: Any) -> None:
    raise KeyboardInterrupt


def wait_for_gpus(num: int | None, timeout_s: float) -> None:
    """Returns when the cluster has `num` GPUs, for which an autoscaler is asked; at once for None.

    A job counts GPUs once, for its number of captioners: on a cluster that is still growing it would begin with few.
    Raises TooFewGpus where they have not come after `timeout_s`.
    """
    import ray
    from ray.autoscaler.sdk import request_resources

    if num is None:
        return
    deadline = time.monotonic() + timeout_s
    request_resources(bundles=[{"GPU": 1}] * num)
    try:
        while (there := int(ray.cluster_resources().get("GPU", 0))) < num:
            if time.monotonic() > deadline:
                raise TooFewGpus(
                    f"the Ray cluster has {there} of {num} GPUs after {timeout_s / 60:.0f} minutes; run the same "
                    "command again when there are more, with a longer --wait-for-gpus-s, or for fewer --wait-for-gpus"
                )
            logger.info("waiting for GPUs: %d of %d are there", there, num)
            time.sleep(min(WAIT_EVERY_S, timeout_s))
    finally:
        request_resources(bundles=[])  # from here on the captioners themselves hold them


def beside_the_driver() -> Any:
    """Scheduling strategy of an actor that should live as long as the driver: on its node, which is rarely a spot one.

    Where that has no room for it, it goes elsewhere. Needs Ray.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shares:
    """CPUs for each stage of a job. They are logical: they say what runs beside what, threads are set elsewhere."""

    read: float
    extract: float
    describe: float
    write: float
    max_readers: int
    max_extractors: int
    max_writers: int


def share_cpus(num_captioners: int, num_extractors: int | None = None) -> Shares:
    """Splits the cluster's CPUs so that reading, Ray's checkpoint filter and writing always find room.

    With two CPUs a resume once hung at "2.3/2 CPU": the filter (a CPU an actor) could not start beside the others.
    Readers and writers have a number, or Ray Data would reserve as much for them as for the stages that work. It
    reserves upstream first, out of what the stages hold now and whole CPUs beyond that: on few CPUs nothing was left
    for a writer, and a resume wrote no file until all was read. There writers take none, which is always to be had.

    Raises ValueError where the cluster has fewer than two.
    """
    import ray

    cpus = ray.cluster_resources().get("CPU", 0.0)
    if cpus < MIN_CPUS:
        raise ValueError(f"the Ray cluster has {cpus:g} CPUs; captioning needs at least {MIN_CPUS}")
    return shares_of(cpus, num_captioners, num_extractors)


def shares_of(cpus: float, num_captioners: int, num_extractors: int | None = None) -> Shares:
    """`share_cpus` for a number of CPUs, two or more."""
    small, write = (0.25, 0.0) if cpus < 8 else (0.5, 0.5)
    describe = _floor(min(small, (cpus - 1) / (4 * num_captioners)))
    readers, writers = max(1, int(cpus / 8)), max(1, int(cpus / 16))
    free = max(0.1, cpus - 1 - num_captioners * describe - readers * small - writers * write)
    extractors = num_extractors or (max(2, int(free)) if cpus <= 4 else max(1, int(free)))
    return Shares(
        read=small, extract=_floor(min(1.0, free / extractors)), describe=describe, write=write, max_readers=readers,
        max_extractors=extractors, max_writers=writers,
    )  # fmt: skip


def _floor(cpus: float) -> float:
    """To hundredths: what is shared out may not add up to more than there is."""
    return math.floor(100 * cpus + 1e-6) / 100
