"""Is this cluster, and this bucket, fit for a run? `meddam doctor` looks, and says what to do about what is not.

    meddam doctor                                                      this machine
    meddam doctor --bucket s3://lab/runs --model /weights/DAM-3B       and what a run would need besides
    ray job submit --working-dir . --runtime-env runtime_env.yaml -- python -m ray_jobs.doctor --bucket s3://lab/runs

Inside a cluster (a submitted job, or RAY_ADDRESS) every node is looked at. Writes and deletes a few objects below the
bucket's prefix, nothing else. Exit codes: 0 nothing stands in the way of a run, 2 something does.
"""

from __future__ import annotations

import os
import time
import uuid
from email.utils import parsedate_to_datetime
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from meddam_core import storage
from ray_jobs.doctor_node import MAX_SKEW_S, Finding, judged, node_facts, together
from ray_jobs.module_command import run_as
from ray_jobs.summary import EXIT_CONFIG

SPEED_BYTES = 16 << 20
SLOW_MB_PER_S = 20.0
_MARKS = {"ok": "ok     ", "warning": "warning", "problem": "PROBLEM"}


class Config(BaseModel):
    """What `meddam doctor` looks at."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    bucket: str | None = None
    """Where runs would go (s3://BUCKET/PREFIX, or a folder): rights, conditional writes, speed, clock."""
    model: str | None = None
    """DAM checkpoint folder: is it on each node?"""
    wait_s: float = Field(60.0, gt=0)
    """How long a node of the cluster may take to answer."""
    wait_for_gpus: int | None = Field(None, ge=1)
    """Begin when the cluster has so many GPUs, and ask its autoscaler for them: only nodes that are there are seen."""
    wait_for_gpus_s: float = Field(3600.0, gt=0)
    """Longest wait for them, seconds."""


class Report(BaseModel):
    """What was found."""

    model_config = ConfigDict(frozen=True)

    findings: dict[str, list[Finding]]
    """By place: the nodes, the cluster, the bucket."""

    @property
    def exit_code(self) -> int:
        """0 where nothing stands in the way of a run."""
        states = {f.state for found in self.findings.values() for f in found}
        return EXIT_CONFIG if "problem" in states else 0

    def lines(self) -> list[str]:
        """For a person."""
        text = []
        for place, found in self.findings.items():
            text.append(place)
            for finding in found:
                text.append(f"  {_MARKS[finding.state]}  {finding.about}: {finding.said}")
                if finding.todo:
                    text.append(f"             -> {finding.todo}")
        return text


def run(cfg: Config) -> Report:
    """Looks at everything; what is wrong is a finding, not an error."""
    nodes, cluster = _cluster(cfg) if os.environ.get("RAY_ADDRESS") else ([node_facts(cfg.model)], _ports())
    findings = {f"node {n['node']} ({n['cpus']} CPUs, {n['memory_gb']:g} GB)": judged(n) for n in nodes}
    findings["cluster"] = [*cluster, *together(nodes), _gpus(nodes)]
    if cfg.bucket is not None:
        findings[cfg.bucket] = bucket_findings(cfg.bucket)
    return Report(findings=findings)


def bucket_findings(uri: str) -> list[Finding]:
    """Rights, the conditional write that a lease needs, speed, and the store's clock."""
    place = storage.join(uri, f".doctor-{uuid.uuid4().hex}")
    try:
        storage.check_writable(uri)
        return [
            Finding(about="rights", state="ok", said="may write, list, read and delete"), *_speed(place),
            *(_conditions(place) if storage.is_s3(uri) else []),
        ]  # fmt: skip
    except (OSError, storage.StorageError) as error:
        said = str(error) if isinstance(error, storage.StorageError) else storage.explain(uri, error)
        todo = "cluster/aws/role-policy.json lists the rights that a run needs"
        return [Finding(about="rights", state="problem", said=said, todo=todo)]
    finally:
        _clear(place)


def _speed(place: str) -> list[Finding]:
    data = os.urandom(SPEED_BYTES)
    started = time.perf_counter()
    storage.write_bytes(place, data)
    written = time.perf_counter()
    whole = storage.read_bytes(place) == data
    read = time.perf_counter()
    if not whole:
        return [Finding(about="reading back", state="problem", said="other bytes came back", todo="check the store")]
    rates = [SPEED_BYTES / 1e6 / s for s in (written - started, read - written)]
    said = f"{rates[0]:.0f} MB/s to it, {rates[1]:.0f} MB/s from it, one stream from this machine"
    slow = min(rates) < SLOW_MB_PER_S
    todo = "run nearer to the bucket, or through its VPC endpoint" if slow else None
    return [Finding(about="speed", state="warning" if slow else "ok", said=said, todo=todo)]


def _conditions(place: str) -> list[Finding]:
    """Whether If-None-Match is honoured, how objects are encrypted, and how far the clocks are apart."""
    from botocore.exceptions import ClientError

    bucket, _, key = place.removeprefix("s3://").partition("/")
    client = storage.s3_client()
    answer = client.head_object(Bucket=bucket, Key=key)
    try:
        client.put_object(Bucket=bucket, Key=key, Body=b"", IfNoneMatch="*")
        todo = "take a store that knows conditional writes (AWS, MinIO, Ceph 19): two drivers could hold one run"
        found = [Finding(about="conditional writes", state="problem", said="ignored", todo=todo)]
    except ClientError as error:
        if error.response["Error"]["Code"] not in ("PreconditionFailed", "412"):
            raise OSError(f"conditional put: {error.response['Error']['Code']}") from error
        found = [Finding(about="conditional writes", state="ok", said="honoured: a run has one driver")]
    found.append(_encryption(answer))
    date = answer["ResponseMetadata"]["HTTPHeaders"].get("date")
    skew_s = 0.0 if date is None else time.time() - parsedate_to_datetime(date).timestamp()
    if abs(skew_s) > MAX_SKEW_S:
        todo = "let this machine follow NTP: requests will be refused"
        return [*found, Finding(about="clock", state="problem", said=f"{skew_s:+.0f} s to the store's", todo=todo)]
    return [*found, Finding(about="clock", state="ok", said="agrees with the store's")]


def _encryption(answer: dict[str, Any]) -> Finding:
    """How the store says that it keeps what was just written."""
    how, key = answer.get("ServerSideEncryption"), answer.get("SSEKMSKeyId")
    if how is None:
        todo = "give the bucket a default encryption (cluster/aws/bucket-encryption.json)"
        return Finding(about="encryption", state="warning", said="the store names none", todo=todo)
    said = how if key is None else f"{how} with the key that ends in {key[-6:]}"
    return Finding(about="encryption", state="ok", said=said)


def _clear(place: str) -> None:
    try:
        storage.delete(place)
    except OSError:  # what cannot be deleted was reported as missing rights already
        return


def _ports() -> list[Finding]:
    if os.environ.get("RAY_AUTH_MODE") == "token":
        return [Finding(about="token", state="ok", said="RAY_AUTH_MODE=token")]
    todo = "a cluster that others can reach wants RAY_AUTH_MODE=token on every node (docs/security.md)"
    return [Finding(about="token", state="warning", said="RAY_AUTH_MODE is not token", todo=todo)]


def _gpus(nodes: list[dict[str, Any]]) -> Finding:
    num = sum(len(n["gpus"]) for n in nodes)
    said = f"{num} in all: a captioner each" if num else "none: one captioner on the CPUs"
    return Finding(about="GPUs", state="ok", said=said)


def _cluster(cfg: Config) -> tuple[list[dict[str, Any]], list[Finding]]:
    """Facts of every node that answers, and what is wrong with the others."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from ray_jobs.session import session, wait_for_gpus

    with session():
        wait_for_gpus(cfg.wait_for_gpus, cfg.wait_for_gpus_s)
        alive = [n for n in ray.nodes() if n["Alive"]]
        probe = ray.remote(_facts_there)
        asked = []
        for node in alive:
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            placed = probe.options(num_cpus=0, max_retries=0, scheduling_strategy=there)
            asked.append(placed.remote(cfg.model, time.time(), node["Resources"].get("object_store_memory")))
        done, late = ray.wait(asked, num_returns=len(asked), timeout=cfg.wait_s)
        nodes = [ray.get(answer) for answer in done]
        for facts in nodes:  # a worker process may have taken some of this time to start
            facts["clock_s"] = None if 0 <= facts["clock_s"] <= cfg.wait_s else facts["clock_s"]
        found = _ports()
        if late:
            said, todo = f"{len(late)} of {len(alive)} did not answer", "look at them in the dashboard"
            found.append(Finding(about="nodes", state="problem", said=said, todo=todo))
        cpus = ray.cluster_resources().get("CPU", 0)
        if cpus < 2:
            found.append(Finding(about="CPUs", state="problem", said=f"{cpus:g}", todo="a run needs two at least"))
        return nodes, found


def _facts_there(model: str | None, sent_s: float, store_bytes: float | None) -> dict[str, Any]:
    """What a node of the cluster is, with what Ray has taken of it; runs there."""
    import ray

    return node_facts(model, sent_s, store_bytes, ray.get_runtime_context().get_temp_dir())


if __name__ == "__main__":  # the same options as `meddam doctor`
    run_as("doctor")
