"""What the product does, on this machine, in a few minutes: `make demo`.

    meddam demo                              writes demo/phantoms.html and demo/samples.html
    meddam demo --model DIR --short          another model, fewer pictures, nothing killed

Starts an S3 server on loopback, ingests synthetic and real pictures into it, captions them on a local Ray, kills the
job half-way with SIGKILL and runs it again, audits, and writes the reports. Every step is the command a user would
type, in its own process, and is printed before it runs.

Needs the `demo` extra for the S3 server.
"""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import typer
from pydantic import BaseModel, ConfigDict, Field

from meddam_core import storage
from meddam_core.models import default_model
from ray_jobs.module_command import run_as

BUCKET = "s3://meddam"
START_LIMIT_S = 30.0
SHORT_NUM_PHANTOMS = 6


class Config(BaseModel):
    """What `meddam demo` does."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    model: str = Field(default_factory=default_model)
    """DAM checkpoint folder, in the official layout; by default the small model that comes with the package."""
    out: Path = Path("demo")
    """Folder for the reports."""
    num_phantoms: int = Field(36, ge=1)
    """Synthetic pictures, beside the real ones that pydicom bundles."""
    max_new_tokens: int = Field(72, ge=1)
    """Longest caption, tokens."""
    short: bool = False
    """A few pictures only, and nothing is killed."""


class Summary(BaseModel):
    """Where the demo's result lies."""

    reports: list[str]
    seconds: float

    @property
    def exit_code(self) -> int:
        """A demo that ends has worked: each of its steps is checked."""
        return 0

    def lines(self) -> list[str]:
        """For a person."""
        return ["", f"{self.seconds:.0f} s. Open in a browser:", *(f"  {report}" for report in self.reports)]


def run(cfg: Config) -> Summary:
    """Runs the demo. Raises ValueError where a step fails, with the step and its exit code."""
    started = time.monotonic()
    cfg.out.mkdir(parents=True, exist_ok=True)
    with s3_server(cfg.out / "s3.log") as environment:
        os.environ |= environment
        _say("Pictures into a bucket of an S3 server on loopback: synthetic ones, and real ones that pydicom bundles.")
        num_phantoms = SHORT_NUM_PHANTOMS if cfg.short else cfg.num_phantoms
        _meddam("ingest", "phantoms", "--count", str(num_phantoms), "--out", f"{BUCKET}/phantoms")
        _meddam("ingest", "pydicom-samples", "--out", f"{BUCKET}/samples")
        reports = [_captioned(cfg, "phantoms", kill=not cfg.short), _captioned(cfg, "samples", kill=False)]
    return Summary(reports=reports, seconds=time.monotonic() - started)


def _captioned(cfg: Config, dataset: str, kill: bool) -> str:
    """Captions a dataset, audits the run and writes its report; returns where that lies."""
    run, report = f"{BUCKET}/runs/{dataset}", str(cfg.out / f"{dataset}.html")
    caption = [
        "caption", f"{BUCKET}/{dataset}", "--out", run, "--model", cfg.model, "--max-new-tokens",
        str(cfg.max_new_tokens), "--images-per-file", "8", "--images-per-batch", "4",
    ]  # fmt: skip
    _say(f"Captions for every region of the {dataset}" + ("; and half-way, kill -9." if kill else "."))
    if kill:
        _killed_half_way(run, caption)
        _say("The same command again: it goes on where it was stopped. Then: is everything there, exactly once?")
    _meddam(*caption)
    _meddam("audit", run)
    _meddam("report", run, "--out", report)
    return report


@contextmanager
def s3_server(log: Path) -> Iterator[dict[str, str]]:
    """An S3-compatible server with an empty bucket, in its own process; yields the environment that leads to it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with log.open("wb") as stream:
        server = subprocess.Popen(command, stdout=stream, stderr=stream)
    environment = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_ACCESS_KEY_ID": "demo", "AWS_SECRET_ACCESS_KEY": "demo",
        "AWS_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true",
    }  # fmt: skip
    try:
        _wait_for(server, port, log)
        _create_bucket(environment["AWS_ENDPOINT_URL"])
        yield environment
    finally:
        server.terminate()
        server.wait()


def _wait_for(server: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + START_LIMIT_S
    while time.monotonic() < deadline and server.poll() is None:
        with socket.socket() as connection:
            if connection.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise ValueError(f"the S3 server did not start, see {log}; is the `demo` extra installed?")


def _create_bucket(endpoint: str) -> None:
    import boto3

    client = boto3.client(
        "s3", endpoint_url=endpoint, aws_access_key_id="demo", aws_secret_access_key="demo", region_name="us-east-1"
    )
    client.create_bucket(Bucket=BUCKET.removeprefix("s3://"))


def _meddam(*args: str) -> None:
    typer.secho(f"$ meddam {shlex.join(args)}", bold=True)
    code = subprocess.run([sys.executable, "-m", "ray_jobs.cli", *args], check=False).returncode
    if code:
        raise ValueError(f"the demo's step `meddam {args[0]}` ended with exit code {code}")


def _killed_half_way(run: str, args: list[str]) -> None:
    """Starts the job and kills its driver as soon as the first captions are written."""
    typer.secho(f"$ meddam {shlex.join(args)}", bold=True)
    job = subprocess.Popen([sys.executable, "-m", "ray_jobs.cli", *args])
    while job.poll() is None:
        if storage.list_files(f"{run}/checkpoint", ".parquet", recursive=True):
            job.send_signal(signal.SIGKILL)
            typer.secho(f"\n$ kill -9 {job.pid}", bold=True)
            break
        time.sleep(0.05)
    code = job.wait()
    if code not in (0, -signal.SIGKILL):
        raise ValueError(f"the demo's step `meddam {args[0]}` ended with exit code {code}")


def _say(text: str) -> None:
    typer.secho(f"\n{text}", fg="cyan")


if __name__ == "__main__":  # the same options as `meddam demo`
    run_as("demo")
