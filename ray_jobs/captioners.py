"""Who makes the captions of a run: engine, device and number of actors, decided once by the driver for all of them."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from typing import Any

from meddam_core import storage
from meddam_core.captioner import Captioner
from meddam_core.engines.base import Sampling
from meddam_core.judging.budget import Limits
from meddam_core.prompts import Prompt
from ray_jobs.caption_config import REMOTE, Config
from ray_jobs.judges import ActorPermits
from ray_jobs.permits import end_permits, start_permits
from ray_jobs.remote_captioner import RemoteSpec, endpoint_of

logger = logging.getLogger(__name__)

PATIENCE_S = 600.0
"""A remote endpoint that answers nothing for so long stops the run; no caption fails for it."""
PROBE_CPUS = 0.25
SAY_EVERY_S = 30.0
"""A cluster without room for the first task says so this often: an autoscaler takes minutes, a dead node forever."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptionerSpec:
    """How an actor builds its Captioner: call it in the actor's process."""

    model: str
    engine: str
    kernels: str
    """What the driver's probe of the engine found; an actor that ends up with other kernels refuses to work."""
    device: str
    dtype: str
    slots: int | None
    num_threads: int | None
    prompts: tuple[Prompt, ...]
    sampling: Sampling
    num_samples: int
    num_captioners: int
    gpus_each: float

    def __call__(self) -> Captioner:
        from meddam_core.captioner import load_captioner

        captioner = load_captioner(
            self.model, engine=self.engine, device=self.device, dtype=self.dtype, slots=self.slots,
            num_threads=self.num_threads, prompts=self.prompts, sampling=self.sampling, num_samples=self.num_samples,
        )  # fmt: skip
        found = captioner.loop.engine
        if found.kernels != self.kernels:
            raise RuntimeError(
                f"this worker runs {self.engine} with {found.kernels} kernels, the run uses {self.kernels}: the nodes "
                "differ; give --engine torch, or captioners on one kind of node"
            )
        return captioner

    @property
    def facts(self) -> dict[str, str]:
        """What goes into the fingerprint."""
        return {"engine": self.engine, "kernels": self.kernels, "dtype": self.dtype}


AnySpec = CaptionerSpec | RemoteSpec


def resolve(cfg: Config, prompts: tuple[Prompt, ...], begun: dict[str, str] | None) -> AnySpec:
    """Chooses device, dtype, engine and kernels for the whole run, on the node kind that will do the work.

    `begun` is what a run that has begun was begun with: it stays where the configuration says "auto". Needs Ray.
    Raises ValueError where the cluster cannot provide what was asked for.
    """
    import ray

    if cfg.engine == REMOTE:
        endpoint = endpoint_of(cfg)
        limits = Limits(requests_per_min=cfg.requests_per_min, tokens_per_min=cfg.tokens_per_min,
                        max_concurrent=cfg.max_concurrent)  # fmt: skip
        actor = start_permits(
            endpoint.base_url, limits, run=cfg.out, max_usd=None, state_uri=storage.join(cfg.out, "budget.json"),
            timeout_s=cfg.timeout_s, patience_s=PATIENCE_S,
        )  # fmt: skip
        return RemoteSpec(
            cfg=cfg, prompts=prompts, permits=ActorPermits(actor, cfg.out), num_captioners=cfg.num_captioners or 1
        )
    gpus = int(ray.cluster_resources().get("GPU", 0))
    device = ("cuda" if gpus else "cpu") if cfg.device == "auto" else cfg.device
    if device == "cuda" and not gpus:
        raise ValueError("--device cuda was asked for, but the Ray cluster has no GPU; leave it out to use the CPUs")
    begun = begun or {}
    dtype = cfg.dtype if cfg.dtype != "auto" else begun.get("dtype") or ("bfloat16" if device == "cuda" else "float32")
    engine = cfg.engine if cfg.engine != "auto" else begun.get("engine", "auto")
    num_captioners = cfg.num_captioners or max(1, gpus if device == "cuda" else 1)
    gpus_each = min(1.0, gpus / num_captioners) if device == "cuda" else 0.0
    num_threads = None if device == "cuda" else max(1, (os.cpu_count() or 1) // num_captioners)
    engine, kernels = _probed(engine, cfg.model, device, dtype, gpus_each)
    return CaptionerSpec(
        model=cfg.model, engine=engine, kernels=kernels, device=device, dtype=dtype, slots=cfg.slots,
        num_threads=num_threads, prompts=prompts, sampling=cfg.sampling, num_samples=cfg.num_samples,
        num_captioners=num_captioners, gpus_each=gpus_each,
    )  # fmt: skip


def release(spec: AnySpec) -> None:
    """Lets go of what a spec holds in the cluster: a remote one its place at the endpoint's permits."""
    if isinstance(spec, RemoteSpec):
        end_permits(spec.permits.actor, spec.permits.run)


def _probed(engine: str, model: str, device: str, dtype: str, gpus: float) -> tuple[str, str]:
    """The engine and its kernels as a worker of the run finds them. Waits for a node with room, and says so."""
    import ray

    probe = ray.remote(_probe).options(num_cpus=PROBE_CPUS, num_gpus=gpus, max_retries=0)
    found = probe.remote(engine, model, device, dtype)
    while not ray.wait([found], timeout=SAY_EVERY_S)[0]:
        free = ray.available_resources()
        logger.info(
            "waiting for a worker that tries the engine (needs %g CPU, %g GPU; free in the cluster: %g CPU, %g GPU); "
            "`ray status` shows its nodes", PROBE_CPUS, gpus, free.get("CPU", 0.0), free.get("GPU", 0.0),
        )  # fmt: skip
    chosen: tuple[str, str] = ray.get(found)
    return chosen


def _probe(engine: str, model: str, device: str, dtype: str) -> tuple[str, str]:
    from meddam_core.engines import resolve_engine

    chosen: Any = resolve_engine(engine, model, device=device, dtype=dtype)
    return chosen.name, chosen.kernels
