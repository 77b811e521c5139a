"""The Serve application: one replica holds one model; clients' use of keys is counted in one place for all of them.

    serve run ray_jobs.serve.deployment:build model=/weights/DAM-3B        # or cluster/serve.yaml, for KubeRay

Who does what: Ray Serve starts, scales and drains replicas, and replaces those whose health check fails. Its proxy is
the door; Shortcut, in it, hands each request to the replica that has the fewest, and CleanErrors turns a replica's
death into an error that says to try again. A replica reads requests; its engine, in a process of its own, batches them.
"""

from __future__ import annotations

import logging
import os
from typing import Any

import ray
from ray import serve
from ray.serve.config import AutoscalingConfig, BackpressureConfig
from ray.serve.exceptions import RayServeException
from ray.serve.schema import LoggingConfig
from starlette.middleware import Middleware

from ray_jobs.serve.config import Config
from ray_jobs.serve.guards import ACCESS_LOG, CleanErrors
from ray_jobs.serve.keys import LocalLedger, Refusal
from ray_jobs.serve.replica import make_service, model_folder
from ray_jobs.serve.shortcut import Shortcut

LEDGER = "meddam-serve-ledger"
_ROOM = 2
"""Serve hands a replica this much more than it serves, so that the replica itself says 503 in OpenAI's shape."""


class LedgerActor(LocalLedger):
    """The one Ledger of all replicas. Restarted it begins anew: a day's quota counts from then."""


class RemoteLedger:
    """A Ledger that asks the actor."""

    def __init__(self) -> None:
        self._actor: Any = (
            ray.remote(LedgerActor)
            .options(name=LEDGER, get_if_exists=True, lifetime="detached", num_cpus=0, max_restarts=-1)
            .remote()
        )

    async def request(self, name: str, per_minute: int | None) -> Refusal | None:
        return await self._actor.request.remote(name, per_minute)

    async def captions(self, name: str, num: int, per_day: int | None) -> Refusal | None:
        return await self._actor.captions.remote(name, num, per_day)


@serve.ingress()
class Replica:
    """The app of app.py, with an engine of its own."""

    def __init__(self, settings: dict[str, Any]) -> None:
        cfg = Config.model_validate(settings)
        if not ACCESS_LOG.handlers:
            handler = logging.StreamHandler()
            handler.setFormatter(logging.Formatter("%(message)s"))
            ACCESS_LOG.addHandler(handler)
            ACCESS_LOG.setLevel(logging.INFO)
            ACCESS_LOG.propagate = False
        self._service = make_service(cfg, ledger=RemoteLedger() if cfg.keys else None, in_ray=True)

    def __serve_build_asgi_app__(self) -> Any:
        from ray_jobs.serve.app import make_app

        return make_app(self._service, behind_proxy=True)

    def check_health(self) -> None:
        """Called by Serve. Without its engine the process ends: Serve replaces what is dead at once, what is ill after
        three checks."""
        if self._service.describer.loop.failure is not None:
            os._exit(1)


def build(args: dict[str, Any]) -> serve.Application:
    """The application for `serve run`, a Serve config file or `meddam serve`; `args` are the fields of Config."""
    return application(Config.model_validate(args))


def application(cfg: Config) -> serve.Application:
    """The application. Raises ValueError where there is no such model."""
    model_folder(cfg)
    gpus = ray.cluster_resources().get("GPU", 0) if cfg.device == "auto" else float(cfg.device == "cuda")
    deployment: Any = serve.deployment(
        Replica,
        name="meddam",
        ray_actor_options={"num_cpus": 1, "num_gpus": 1 if gpus else 0},
        max_ongoing_requests=_ROOM * cfg.max_ongoing,
        max_queued_requests=_ROOM * cfg.max_ongoing * cfg.max_replicas,
        backpressure_config=BackpressureConfig(status_code=503, retry_after_s=1),
        autoscaling_config=AutoscalingConfig(
            min_replicas=cfg.min_replicas, max_replicas=cfg.max_replicas, target_ongoing_requests=cfg.target_ongoing,
            downscale_delay_s=cfg.downscale_delay_s, upscale_delay_s=cfg.upscale_delay_s,
        ),
        graceful_shutdown_timeout_s=cfg.drain_s,
        graceful_shutdown_wait_loop_s=0.5,
        health_check_period_s=5,
        health_check_timeout_s=30,
        logging_config=LoggingConfig(enable_access_log=False, log_level="WARNING"),
    )  # fmt: skip
    return deployment.bind(cfg.model_dump(mode="json"))


def proxy_middlewares() -> list[Middleware]:
    """For RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH: what Serve's proxies run around every request, the last outermost.

    Serve asks for it in replicas too, for their own ports; there the guards have said all.
    """
    try:
        serve.get_replica_context()
    except RayServeException:
        return [Middleware(Shortcut), Middleware(CleanErrors)]
    return []
