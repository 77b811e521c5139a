"""`meddam serve`: the endpoint and the page on this machine, or on the Ray cluster that RAY_ADDRESS names.

    meddam serve                                          the small model that comes with the package
    meddam serve --model /weights/DAM-3B --host 0.0.0.0 --config serve.yaml       keys in serve.yaml
    meddam serve --new-key ward-7                         a key, and what to write into serve.yaml

Ends on Ctrl-C or SIGTERM: replicas finish what they hold first, for at most `drain_s`.
"""

from __future__ import annotations

import logging
import os
import signal
import threading

import typer
import yaml
from pydantic import BaseModel, ConfigDict

from ray_jobs.module_command import run_as
from ray_jobs.serve.config import Config
from ray_jobs.session import session

APP = "meddam"
ENVIRONMENT = {
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "ray_jobs.serve.deployment.proxy_middlewares",
    "RAY_SERVE_ENABLE_DIRECT_INGRESS": "1",
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "3",
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
}
"""Where a Ray session is started by someone else, these variables must be set there (cluster/ does)."""


class Summary(BaseModel):
    """What was done."""

    model_config = ConfigDict(frozen=True)

    said: list[str]

    @property
    def exit_code(self) -> int:
        """An endpoint that was asked to end has ended well."""
        return 0

    def lines(self) -> list[str]:
        """For a person."""
        return self.said


def run(cfg: Config) -> Summary:
    """Serves until told to stop. Raises ValueError for a model, an address or an engine that cannot be had."""
    if cfg.new_key is not None:
        from ray_jobs.serve.keys import new_key

        key, digest = new_key()
        entry = yaml.safe_dump({"keys": {cfg.new_key: {"sha256": digest}}}, sort_keys=False).rstrip()
        return Summary(said=[f"key, shown this once: {key}", "in the configuration:", entry])
    from ray_jobs.serve.replica import model_folder

    model_folder(cfg)
    stop = threading.Event()
    set_environment()
    with session(cfg.num_cpus):
        for number in (signal.SIGTERM, signal.SIGINT):  # after Ray has set its own, which would exit at once with 15
            signal.signal(number, lambda *_: stop.set())
        url = start(cfg)
        who = "with a key" if cfg.keys else "without keys"
        typer.echo(f"serving on {url} {who}; the page is at {url}/, the API at {url}/v1; Ctrl-C ends it", err=True)
        stop.wait()
        typer.echo("draining", err=True)
        end()
    return Summary(said=["ended"])


def set_environment() -> None:
    """Before a Ray session is started here, or Serve imported: what Serve's processes take from their environment."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def start(cfg: Config) -> str:
    """Starts the endpoint in the Ray session of this process, and returns its address once it answers."""
    from ray import serve

    from ray_jobs.serve.deployment import application

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    serve.start(
        proxy_location="HeadOnly",
        http_options={"host": cfg.host, "port": cfg.port, "keep_alive_timeout_s": 75},
    )
    serve.run(application(cfg), name=APP, route_prefix="/")
    host = f"[{cfg.host}]" if ":" in cfg.host else cfg.host
    return f"http://{host}:{cfg.port}"


def end() -> None:
    """Drains and ends the endpoint."""
    from ray import serve

    serve.delete(APP)  # waits until the replicas have drained
    serve.shutdown()


if __name__ == "__main__":  # the same options as `meddam serve`
    run_as("serve")
