"""What `cluster/` ships can be applied: manifests by the published schemas, `ray up` by Ray itself, scripts by bash.

ray_io_v1.json holds the part of KubeRay's published CRDs (ray.io/v1, RayJob and RayService, of 1.6.0) that these
manifests use: types, enumerations, required fields. A field that is not in it is an error here, so that a mistyped one
is found; a new one is added to it from the CRD. kubernetes_kinds.json holds the same of the other kinds: Kueue
(v1beta2; v1beta1 is deprecated), the Prometheus operator (0.91), and Kubernetes itself.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from tests.cluster.manifests import CLUSTER, ROOT, STORES, check_command, documents, ray_clusters, the

SCHEMAS = json.loads((Path(__file__).parent / "ray_io_v1.json").read_text())
KINDS = json.loads((Path(__file__).parent / "kubernetes_kinds.json").read_text())
RAY = next(
    line.partition("==")[2] for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("ray==")
)


@pytest.mark.parametrize(
    "document",
    [d for store in (None, *STORES) for _, d in documents(store)],
    ids=lambda d: f"{d['kind']}-{d['metadata'].get('name')}",
)
def test_manifests_have_the_published_shape(document: dict[str, Any]) -> None:
    assert document["apiVersion"] and ("name" in document["metadata"] or "generateName" in document["metadata"])
    if document["apiVersion"] == "ray.io/v1":
        jsonschema.Draft202012Validator(SCHEMAS[document["kind"]]).validate(document["spec"])
    else:
        body = {name: value for name, value in document.items() if name not in ("apiVersion", "kind", "metadata")}
        schema = KINDS[f"{document['apiVersion']} {document['kind']}"]
        jsonschema.Draft202012Validator(schema).validate(body)


def test_a_mistyped_field_is_found() -> None:
    spec = next(d["spec"] for _, d in documents() if d["kind"] == "RayJob")
    broken = json.loads(json.dumps(spec))
    broken["rayClusterSpec"]["workerGroupSpecs"][0]["minReplica"] = 8
    with pytest.raises(jsonschema.ValidationError, match="minReplica"):
        jsonschema.Draft202012Validator(SCHEMAS["RayJob"]).validate(broken)


@pytest.mark.parametrize(("kind", "spec"), ray_clusters())
def test_clusters_are_closed(kind: str, spec: dict[str, Any]) -> None:
    assert spec["authOptions"]["mode"] == "token" and spec["rayVersion"] == RAY
    assert spec["headGroupSpec"]["serviceType"] == "ClusterIP"


def test_the_job_asks_for_the_gpus_that_its_cluster_has() -> None:
    job = next(d for _, d in documents() if d["kind"] == "RayJob")["spec"]
    words = shlex.split(job["entrypoint"])
    assert words[:3] == ["python", "-m", "ray_jobs.caption"]
    check_command(["caption", *words[3:]])
    (workers,) = job["rayClusterSpec"]["workerGroupSpecs"]
    assert workers["minReplicas"] == workers["replicas"] == workers["maxReplicas"]
    assert words[words.index("--wait-for-gpus") + 1] == str(workers["replicas"])


def test_the_endpoint_is_built_from_settings_that_are_valid() -> None:
    from ray.serve.schema import ServeDeploySchema

    from ray_jobs.serve.config import Config

    service = the("RayService")["spec"]
    deployed = ServeDeploySchema.model_validate(yaml.safe_load(service["serveConfigV2"]))
    (application,) = deployed.applications
    module, _, name = application.import_path.partition(":")
    assert name in (ROOT / (module.replace(".", "/") + ".py")).read_text()
    cfg = Config.model_validate(application.args)
    assert cfg.keys, "an endpoint that others reach has keys"
    (workers,) = service["rayClusterConfig"]["workerGroupSpecs"]
    assert (cfg.min_replicas, cfg.max_replicas) == (workers["minReplicas"], workers["maxReplicas"]), (
        "a replica a worker"
    )
    assert workers["template"]["spec"]["terminationGracePeriodSeconds"] > cfg.drain_s


def test_ray_up_takes_the_cluster() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(yaml.safe_load((CLUSTER / "aws/cluster.yaml").read_text()))
    validate_config(config)
    types = config["available_node_types"]
    assert "InstanceMarketOptions" not in types[config["head_node_type"]]["node_config"]
    assert types["gpu_spot"]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    for node in types.values():
        assert node["node_config"]["MetadataOptions"]["HttpTokens"] == "required"
        assert all(d["Ebs"]["Encrypted"] for d in node["node_config"]["BlockDeviceMappings"])
    started = " ".join(config["head_start_ray_commands"])
    assert "RAY_AUTH_MODE=token" in started and "--dashboard-host=127.0.0.1" in started
    assert [p["FromPort"] for p in config["provider"]["security_group"]["IpPermissions"]] == [22]


@pytest.mark.parametrize("name", ["role-policy", "bucket-policy"])
def test_policies_name_only_what_is_needed(name: str) -> None:
    policy = json.loads((CLUSTER / f"aws/{name}.json").read_text())
    assert policy["Version"] == "2012-10-17"
    allowed = [s for s in policy["Statement"] if s["Effect"] == "Allow"]
    assert not any("*" in action for s in allowed for action in s["Action"])
    assert not any(s["Resource"] in ("*", "arn:aws:s3:::*") for s in allowed)
    if name == "role-policy":
        writes = [s for s in allowed if "s3:PutObject" in s["Action"]]
        assert [s["Resource"] for s in writes] == ["arn:aws:s3:::BUCKET/runs/*"]


def test_scripts_parse() -> None:
    script = CLUSTER / "slurm/caption.sbatch"
    subprocess.run(["bash", "-n", script], check=True)
    assert "--requeue" in script.read_text() and "RAY_AUTH_MODE=token" in script.read_text()


def test_the_image_holds_what_the_package_is_made_of_and_runs_as_nobody() -> None:
    lines = (CLUSTER / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    copied = {w for line in lines if line.startswith("COPY") for w in line.split()[1:-1]}
    kept = {w[1:] for w in (ROOT / ".dockerignore").read_text().split() if w.startswith("!")}
    assert copied == kept and all((ROOT / name).exists() for name in copied)
    users = [line.split()[1] for line in lines if line.startswith("USER")]
    assert users == ["1000"]
    extras = next(line.partition("=")[2] for line in lines if line.startswith("ARG EXTRAS="))
    import tomllib

    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(extras.split(",")) | {"mii-kernels"} <= set(known)


def test_the_dashboard_shows_metrics_that_there_are() -> None:
    from ray_jobs.run_metrics import BY_REASON, COUNTERS, GAUGES

    board = json.loads((CLUSTER / "grafana/captions.json").read_text())
    expressions = [t["expr"] for panel in board["panels"] for t in panel["targets"]]
    ours = {name for e in expressions for name in re.findall(r"ray_(meddam_\w+)", e)}
    assert ours == {*COUNTERS, *GAUGES, BY_REASON}
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    places = [panel["gridPos"] for panel in board["panels"]]
    assert all(p["x"] + p["w"] <= 24 for p in places)
    assert all(e.count("(") == e.count(")") for e in expressions)
