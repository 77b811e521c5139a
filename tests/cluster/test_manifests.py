"""What `cluster/` ships can be applied: manifests by the published schemas, `ray up` by Ray itself, scripts by bash.

ray_io_v1.json holds the part of KubeRay's published CRDs (ray.io/v1, RayJob and RayService, of 1.6.0) that these
manifests use: types, enumerations, required fields. A field that is not in it is an error here, so that a mistyped one
is found; a new one is added to it from the CRD. kubernetes_kinds.json holds the same of the other kinds: Kueue
(v1beta2; v1beta1 is deprecated), the Prometheus operator (0.91), and Kubernetes itself.
"""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from ray_jobs.doctor_node import store_size
from tests.cluster.manifests import CLUSTER, ROOT, STEPS, STORES, amount, check_command, documents, ray_clusters, the
from tests.conftest import s3_environment

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


@pytest.mark.parametrize(("kind", "spec"), ray_clusters())
def test_the_object_store_fits_into_shared_memory(kind: str, spec: dict[str, Any]) -> None:
    """Otherwise Ray puts it on a disk, and says so in a log only; on AWS it is --shm-size, looked at below."""
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        memory = amount(pod["containers"][0]["resources"]["limits"]["memory"])
        (shared,) = [amount(v["emptyDir"]["sizeLimit"]) for v in pod["volumes"] if v["name"] == "shm"]
        told = group["rayStartParams"].get("object-store-memory")
        store = store_size(int(memory), int(shared)) if told is None else int(told)
        assert 1e9 < store < shared <= memory / 2, f"{kind}: {store / 1e9:g} GB into {shared / 1e9:g} GB"


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
    region, image = config["provider"]["region"], config["docker"]["image"]
    options = " ".join(config["docker"]["run_options"])
    assert f"-e AWS_DEFAULT_REGION={region}" in options
    assert "--cap-drop=ALL" in options and "--security-opt=no-new-privileges" in options
    login = next(c for c in config["initialization_commands"] if "docker login" in c)
    assert login.endswith(" " + image.partition("/")[0]) and f"--region {region}" in login
    assert re.fullmatch(r"\S+:\d+\.\d+\.\d+-cuda", image)
    assert not config["setup_commands"] and not config["head_setup_commands"], "Ray's defaults install with pip"
    (token,) = config["file_mounts"].values()
    assert token.startswith("~/"), "not in the checkout, which every job uploads"


def test_a_node_completes_weights_of_which_a_part_is_there(tmp_path: Path) -> None:
    weights, calls = tmp_path / "weights", tmp_path / "calls"
    commands = yaml.safe_load((CLUSTER / "aws/cluster.yaml").read_text())["initialization_commands"]
    (command,) = [c.replace("/opt/weights", str(weights)) for c in commands if "s3://" in c]
    (weights / "DAM-3B").mkdir(parents=True)
    (weights / "DAM-3B/config.json").write_text("{}")
    for name, body in (("sudo", 'exec "$@"'), ("aws", f'echo "$@" >>{calls}')):
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    subprocess.run(["bash", "-ec", command], env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, check=True)
    assert calls.read_text().endswith(f"s3://BUCKET/weights/DAM-3B {weights}/DAM-3B\n")


def test_what_reads_the_bucket_on_aws_comes_before_the_cluster_goes() -> None:
    """Once its policy is there, objects are read from inside alone."""
    page = (ROOT / "docs/cluster.md").read_text().partition("### On AWS")[2].partition("\n### ")[0]
    lines = re.findall(r"^(?:ray|aws|meddam) .*$", page.partition("put-bucket-policy")[2], re.MULTILINE)
    assert lines[-1].startswith("ray down")
    reading = [line for line in lines if "s3://" in line]
    assert all(line.startswith(("ray job submit", "ray exec")) for line in reading)
    typed = [shlex.split(shlex.split(line)[-1])[1:] for line in reading if line.startswith("ray exec")]
    assert [words[0] for words in typed] == ["status", "audit", "report"]
    for words in typed:
        check_command(words)
    (brought,) = [line.split()[3] for line in lines if line.startswith("ray rsync-down")]
    assert brought == typed[-1][typed[-1].index("--out") + 1]


@pytest.fixture
def on_aws(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> tuple[dict[str, Any], list[str]]:
    """(cluster.yaml with the ids of an account on loopback, rights that requests from here on ask for)."""
    import boto3
    import botocore.client
    from ray.autoscaler._private.util import prepare_config

    for name, value in s3_environment(s3_endpoint).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HOME", str(tmp_path))  # Ray writes the key pair's file
    text = (CLUSTER / "aws/cluster.yaml").read_text()
    ec2, iam = (boto3.client(name, region_name="eu-central-1") for name in ("ec2", "iam"))
    (vpc,) = ec2.describe_vpcs()["Vpcs"]
    group = ec2.create_security_group(GroupName=f"g{tmp_path.name}", Description="ours", VpcId=vpc["VpcId"])["GroupId"]
    ours = {"IpProtocol": "tcp", "FromPort": 22, "ToPort": 22, "IpRanges": [{"CidrIp": "203.0.113.0/24"}]}
    ec2.authorize_security_group_ingress(GroupId=group, IpPermissions=[ours])
    for profile in ("meddam", "meddam-worker"):
        with contextlib.suppress(iam.exceptions.EntityAlreadyExistsException):
            iam.create_instance_profile(InstanceProfileName=profile)
    text = text.replace("ami-00000000000000000", ec2.describe_images()["Images"][0]["ImageId"])
    asked: list[str] = []
    call = botocore.client.BaseClient._make_api_call

    def noted(self: Any, operation: str, arguments: dict[str, Any]) -> Any:
        asked.append(f"{self.meta.service_model.service_name}:{operation}")
        return call(self, operation, arguments)

    monkeypatch.setattr(botocore.client.BaseClient, "_make_api_call", noted)
    return prepare_config(yaml.safe_load(text.replace("sg-00000000000000000", group))), asked


@pytest.mark.s3
def test_ray_up_opens_nothing_and_starts_the_gpus_that_a_run_waits_for(
    on_aws: tuple[dict[str, Any], list[str]],
) -> None:
    import boto3
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

    config, asked = on_aws
    config = AWSNodeProvider.bootstrap_config(AWSNodeProvider.fillout_available_node_types_resources(config))
    assert "ec2:AuthorizeSecurityGroupIngress" not in asked, "Ray's own rule lets the world in"
    for node in config["available_node_types"].values():
        (group,) = node["node_config"]["SecurityGroupIds"]
        rules = boto3.resource("ec2", region_name="eu-central-1").SecurityGroup(group).ip_permissions
        assert [r["CidrIp"] for rule in rules for r in rule["IpRanges"]] == ["203.0.113.0/24"]
    workers = config["available_node_types"]["gpu_spot"]
    assert workers["min_workers"] == 0, "nodes without work end"
    for name, node in (("head", config["available_node_types"]["head"]), ("worker", workers)):
        memory = boto3.client("ec2", region_name="eu-central-1").describe_instance_types(
            InstanceTypes=[node["node_config"]["InstanceType"]]
        )["InstanceTypes"][0]["MemoryInfo"]["SizeInMiB"]
        (shared,) = re.findall(r"--shm-size=(\d+)gb", " ".join(config["docker"][f"{name}_run_options"]))
        assert 0.3 * memory <= int(shared) * 1024 < 0.5 * memory, name
    gpus = workers["resources"]["GPU"] * workers["max_workers"]
    for page in (CLUSTER / "aws/cluster.yaml", ROOT / "docs/cluster.md"):
        waited = re.findall(r"ray_jobs\.\w+ [^\n]*s3://BUCKET/\S+[^\n]* --wait-for-gpus (\d+)", page.read_text())
        assert waited and set(waited) == {str(gpus)}, page.name


@pytest.mark.s3
def test_the_head_has_the_rights_that_its_autoscaler_uses_and_no_others(
    on_aws: tuple[dict[str, Any], list[str]],
) -> None:
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
    from ray.autoscaler.tags import TAG_RAY_LAUNCH_CONFIG, TAG_RAY_NODE_KIND, TAG_RAY_NODE_NAME, TAG_RAY_NODE_STATUS

    config = AWSNodeProvider.bootstrap_config(on_aws[0])
    asked = on_aws[1]
    asked.clear()
    provider = AWSNodeProvider(config["provider"], config["cluster_name"])
    tags = {TAG_RAY_NODE_KIND: "worker", TAG_RAY_LAUNCH_CONFIG: "a", TAG_RAY_NODE_NAME: "b", TAG_RAY_NODE_STATUS: "c"}
    worker = config["available_node_types"]["gpu_spot"]["node_config"]
    provider.create_node(json.loads(json.dumps(worker)), tags, 1)
    (node,) = provider.non_terminated_nodes({})
    provider.set_node_tags(node, {TAG_RAY_NODE_STATUS: "d"})
    assert provider.internal_ip(node)
    provider.terminate_nodes([node])
    policy = json.loads((CLUSTER / "aws/head-policy.json").read_text())
    granted = {action: s for s in policy["Statement"] for action in s["Action"]}
    assert set(granted) == {*asked, "iam:PassRole"}, "a role is passed with RunInstances"
    assert granted["iam:PassRole"]["Resource"].endswith(":role/" + worker["IamInstanceProfile"]["Name"])
    own = granted["ec2:TerminateInstances"]["Condition"]["StringEquals"]
    assert own == {"aws:ResourceTag/ray-cluster-name": config["cluster_name"]}


WITHOUT_RESOURCES = {"ec2:DescribeInstances", "ec2:RunInstances", "ecr:GetAuthorizationToken"}
"""Rights that AWS gives for no single resource, or that would name a dozen kinds."""


@pytest.mark.parametrize(
    ("name", "writable"),
    [("role", ["runs/*"]), ("data", ["set/*", "runs/*"]), ("weights", []), ("bucket", []), ("head", []), ("pull", [])],
)
def test_policies_name_only_what_is_needed(name: str, writable: list[str]) -> None:
    policy = json.loads((CLUSTER / f"aws/{name}-policy.json").read_text())
    assert policy["Version"] == "2012-10-17"
    allowed = [s for s in policy["Statement"] if s["Effect"] == "Allow"]
    assert not any("*" in action for s in allowed for action in s["Action"])
    wide = [s for s in allowed if s["Resource"] in ("*", "arn:aws:s3:::*")]
    assert all(set(s["Action"]) <= WITHOUT_RESOURCES for s in wide)
    writes = [s["Resource"] for s in allowed if "s3:PutObject" in s["Action"]]
    resources = [r for some in writes for r in ([some] if isinstance(some, str) else some)]
    assert resources == [f"arn:aws:s3:::BUCKET/{prefix}" for prefix in writable]


def test_each_role_of_pods_is_for_one_service_account() -> None:
    """By the steps' own lines: role, who may take it, and what it may do then, as support.yaml names them."""
    accounts = [d for _, d in documents() if d["kind"] == "ServiceAccount"]
    for account in accounts:
        name = account["metadata"]["name"]
        role = account["metadata"]["annotations"]["eks.amazonaws.com/role-arn"].rpartition("/")[2]
        (file,) = re.findall(rf"create-role --role-name {role} --assume-role-policy-document file://(\S+)", STEPS)
        (statement,) = json.loads((ROOT / file).read_text())["Statement"]
        issuer = statement["Principal"]["Federated"].partition(":oidc-provider/")[2]
        assert statement["Action"] == "sts:AssumeRoleWithWebIdentity" and statement["Effect"] == "Allow"
        assert statement["Condition"] == {"StringEquals": {
            f"{issuer}:aud": "sts.amazonaws.com", f"{issuer}:sub": f"system:serviceaccount:meddam:{name}"
        }}  # fmt: skip
        (given,) = re.findall(rf"put-role-policy --role-name {role} .* file://cluster/aws/(\S+)", STEPS)
        assert given == {"meddam": "role-policy.json", "meddam-serve": "weights-policy.json"}[name]
        (left,) = re.findall(r"^grep -nE '(\S+)' (.*)$", STEPS, re.MULTILINE)
        assert {file, f"cluster/aws/{given}"} < set(left[1].split()) and re.search(left[0], (ROOT / file).read_text())
    assert len(accounts) == 2


def test_every_file_is_in_the_list_of_this_folder() -> None:
    listed = re.findall(r"\]\(([^)]+)\)", (CLUSTER / "README.md").read_text())
    files = {f.relative_to(CLUSTER).as_posix() for f in CLUSTER.rglob("*") if f.is_file() and f.name != "README.md"}
    assert files - set(listed) == set()


def test_the_documentations_aws_commands_exist() -> None:
    """Services, operations, options and files, by the models that the AWS CLI is made from."""
    import botocore.session
    from botocore import xform_name

    session = botocore.session.get_session()
    own = {("s3", "sync"), ("ecr", "get-login-password")}  # made by hand, in the CLI alone
    flat = {("ec2", "authorize-security-group-ingress"): {"protocol", "port", "cidr", "source-group"}}
    page = (ROOT / "docs/cluster.md").read_text().replace("\\\n", " ")
    lines = [shlex.split(m, comments=True) for m in re.findall(r"^ *(aws .*)$", page, re.MULTILINE)]
    assert len(lines) > 10
    for _, service, operation, *rest in lines:
        options = {w.removeprefix("--") for w in rest if w.startswith("--")}
        if (service, operation) in own:
            assert options <= {"region", "username", "password-stdin"}
            continue
        model = session.get_service_model(service.removesuffix("api"))  # s3api
        (found,) = [n for n in model.operation_names if xform_name(n, "-") == operation]
        known = {xform_name(n, "-") for n in model.operation_model(found).input_shape.members}
        assert options <= known | flat.get((service, operation), set()) | {"region", "query", "output"}, operation
        for file in (w.removeprefix("file://") for w in rest if w.startswith("file://")):
            json.loads((ROOT / file).read_text())


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
    assert {"train", "dicom-sr"} <= set(extras.split(",")), "every command works in the image"
    for page in ("cluster/Dockerfile", "docs/cluster.md", "cluster/airgapped/README.md"):
        named = re.findall(r"[\w,-]*\bmii-kernels\b", (ROOT / page).read_text())
        assert named and set(named) == {f"{extras},mii-kernels"}, page


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
