"""The manifests of `cluster/kuberay` fit each other, Kueue, a restricted namespace, and the steps of docs/cluster.md.

What Kubernetes and Kueue do with them is done here by their rules, in a few lines: who reaches whom by the network
policies, which flavor a pod gets.
"""

from __future__ import annotations

import ipaddress
import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from meddam_core import storage
from tests.cluster.manifests import (
    CLUSTER,
    ROOT,
    STEPS,
    STORES,
    all_pods,
    amount,
    check_command,
    containers,
    documents,
    pods,
    ray_clusters,
    templates,
    the,
)


@pytest.mark.parametrize("pod", all_pods())
def test_pods_are_what_a_restricted_namespace_admits(pod: dict[str, Any]) -> None:
    assert "pod-security.kubernetes.io/enforce=restricted" in STEPS
    assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] == 1000
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    mounted = {m["name"] for c in containers(pod) for m in c.get("volumeMounts", [])}
    assert mounted == {v["name"] for v in pod.get("volumes", [])}
    for container in containers(pod):
        assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert re.fullmatch(r"\S+:\d+\.\d+\.\d+-(cpu|cuda)", container["image"]), "a fixed version, never latest"
        gpus = any("nvidia.com/gpu" in c["resources"]["limits"] for c in pod["containers"])
        assert container["image"].endswith("-cuda") == gpus


def test_what_kuberay_adds_to_a_pod_is_restricted_too() -> None:
    """Without these neither the sidecar of its autoscaler nor the submitting pod has a security context."""
    for _, spec in ray_clusters():
        if spec["enableInTreeAutoscaling"]:
            context = spec["autoscalerOptions"]["securityContext"]
            assert context == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    (submits,) = the("RayJob")["spec"]["submitterPodTemplate"]["spec"]["containers"]
    assert submits["image"] == pods(the("RayJob")["spec"]["rayClusterSpec"])[0]["containers"][0]["image"]


@pytest.mark.parametrize("store", STORES)
def test_what_a_manifest_names_is_made_by_a_manifest_or_by_the_steps(store: str) -> None:
    made = {(d["kind"], d["metadata"].get("name")) for _, d in documents(store)}
    by_hand = [line for line in STEPS.splitlines() if line.startswith("kubectl") and store not in line]
    for kind, words in (("ConfigMap", "configmap"), ("Secret", "secret generic"), ("Secret", "secret docker-registry")):
        made |= {(kind, n) for line in by_hand for n in re.findall(rf"-n meddam create {words} (\S+)", line)}
    accounts = [d for _, d in documents(store) if d["kind"] == "ServiceAccount"]
    wanted = {("Secret", s["name"]) for d in (*all_pods(store), *accounts) for s in d.get("imagePullSecrets", [])}
    for pod in all_pods(store):
        wanted |= {("ServiceAccount", pod["serviceAccountName"])} if "serviceAccountName" in pod else set()
        for source in (s for c in containers(pod) for s in c.get("envFrom", [])):
            wanted |= {("ConfigMap", source["configMapRef"]["name"])} if "configMapRef" in source else set()
            wanted |= {("Secret", source["secretRef"]["name"])} if "secretRef" in source else set()
        for volume in pod.get("volumes", []):
            assert volume.keys() - {"name"} <= {"emptyDir", "configMap", "ephemeral"}, "nothing else is made here"
            if "configMap" in volume:
                wanted.add(("ConfigMap", volume["configMap"]["name"]))
            if "ephemeral" in volume:
                claim = volume["ephemeral"]["volumeClaimTemplate"]["spec"]
                wanted.add(("StorageClass", claim["storageClassName"]))
    labels = the("RayJob")["metadata"]["labels"]
    wanted |= {("LocalQueue", labels["kueue.x-k8s.io/queue-name"])}
    wanted |= {("WorkloadPriorityClass", labels["kueue.x-k8s.io/priority-class"])}
    assert wanted - made == set()


def test_the_steps_apply_every_manifest_and_replace_every_placeholder() -> None:
    for file in {name for name, _ in documents()}:
        assert re.search(rf"kubectl .*(apply|create) -f cluster/kuberay/{file}", STEPS), file
    text = "".join(f.read_text() for f in (CLUSTER / "kuberay").glob("*.yaml"))
    replaced = re.findall(r"s\|([^|]+)\|[^|]+\|", STEPS.partition("**3.")[0])
    assert sorted(replaced) == ["BUCKET", "registry.example"] and all(word in text for word in replaced)
    assert "BUCKET" not in STEPS.partition("**3.")[2], "from then on the steps use the names that were put in"
    assert sorted(STORES) == ["# AWS", "# MinIO"]


@pytest.mark.parametrize("store", STORES)
def test_the_names_that_one_puts_in_reach_every_place(store: str, tmp_path: Path) -> None:
    """The steps' own lines, on a copy."""
    shutil.copytree(CLUSTER, tmp_path / "cluster")
    typed = [line for line in STEPS.splitlines() if line.startswith("sed -i") and ("BUCKET" in line or store in line)]
    assert len(typed) == 2
    for line in typed:
        subprocess.run(["bash", "-c", line], cwd=tmp_path, check=True)
    lines = [(f.name, x) for f in (tmp_path / "cluster/kuberay").glob("*.yaml") for x in f.read_text().splitlines()]
    left = [(name, line) for name, line in lines if re.search(r"BUCKET|registry\.example", line.partition("#")[0])]
    assert len(lines) > 200 and left == []


def test_no_file_needs_a_kind_that_its_step_does_not_bring() -> None:
    """`kubectl apply` of a file ends with an error where one kind in it is unknown to the cluster."""
    groups = {name: {d["apiVersion"].partition("/")[0] for n, d in documents() if n == name} for name, _ in documents()}
    assert groups.pop("support.yaml") == {"v1", "networking.k8s.io"}, "what every Kubernetes has"
    assert all(len(found) == 1 for found in groups.values())
    labels = {
        n["namespaceSelector"]["matchLabels"]["kubernetes.io/metadata.name"]
        for n in _peers("ingress")
        if "namespaceSelector" in n
    }
    (operator,) = re.findall(r"helm install kuberay-operator .* --namespace (\S+)", STEPS)
    assert operator in labels
    (version,) = re.findall(r"helm install kuberay-operator .* --version (\d+)\.(\d+)", STEPS)
    assert tuple(map(int, version)) >= (1, 6), "authOptions came with 1.5.1, preRunningDeadlineSeconds with 1.6"


def _peers(direction: str, name: str = "meddam-closed") -> list[dict[str, Any]]:
    rules = the("NetworkPolicy", name)["spec"][direction]
    return [peer for rule in rules for peer in rule["from" if direction == "ingress" else "to"]]


def admitted(labels: dict[str, str], port: int, peer: dict[str, str] | str, direction: str = "ingress") -> bool:
    """Whether a pod takes (or makes) a connection; peer: labels of a pod beside it, a namespace, or an address."""
    for _, policy in documents():
        if policy["kind"] != "NetworkPolicy" or direction.title() not in policy["spec"]["policyTypes"]:
            continue
        if not policy["spec"]["podSelector"]["matchLabels"].items() <= labels.items():
            continue
        for rule in policy["spec"][direction]:
            if any(p["port"] == port for p in rule.get("ports", [{"port": port}])) and any(
                _is(peer, one) for one in rule["from" if direction == "ingress" else "to"]
            ):
                return True
    return False


def _is(peer: dict[str, str] | str, rule: dict[str, Any]) -> bool:
    if isinstance(peer, dict):
        return "podSelector" in rule and rule["podSelector"]["matchLabels"].items() <= peer.items()
    if "ipBlock" in rule:
        return peer[0].isdigit() and ipaddress.ip_address(peer) in ipaddress.ip_network(rule["ipBlock"]["cidr"])
    named = rule.get("namespaceSelector", {}).get("matchLabels", {})
    return bool(named == {"kubernetes.io/metadata.name": peer})


def test_the_network_policies_let_in_who_has_business_there() -> None:
    job, service = the("RayJob")["spec"], the("RayService")["spec"]["rayClusterConfig"]
    submits = job["submitterPodTemplate"]["metadata"]["labels"]
    run, serve = ([t["metadata"]["labels"] for t in templates(c)] for c in (job["rayClusterSpec"], service))
    for head in (run[0], serve[0]):
        assert admitted(head, 8265, "kuberay-operator"), "the operator asks how the job or the application is"
        assert not any(admitted(head, port, "elsewhere") for port in (6379, 8265, 8000, 10001))
        assert not any(admitted(head, port, {"app": "elsewhere"}) for port in (6379, 8265, 8000, 10001))
        assert admitted(head, 8080, "monitoring") and not admitted(head, 8265, "monitoring")
    assert admitted(run[0], 8265, submits), "who submits is one of us by its own label, whatever KubeRay adds"
    assert admitted(submits, 8265, run[0], "egress")
    assert all(admitted(run[0], 6379, labels) and admitted(labels, 6379, run[0], "egress") for labels in run)
    assert admitted(serve[1], 8000, "ingress-nginx"), "an Ingress reaches the proxies"
    assert not admitted(run[1], 8000, "ingress-nginx") and not admitted(serve[1], 8265, "ingress-nginx")


def test_the_network_policies_let_pods_out_to_the_bucket_and_no_further() -> None:
    job, service = the("RayJob")["spec"]["rayClusterSpec"], the("RayService")["spec"]["rayClusterConfig"]
    run, serve = ([t["metadata"]["labels"] for t in templates(c)] for c in (job, service))
    endpoint = re.match(r"https://\w+\.(\w+)\.svc:(\d+)", the("ConfigMap")["data"]["AWS_ENDPOINT_URL"])
    assert endpoint is not None
    for labels in (*run, *serve, the("Pod")["metadata"]["labels"]):
        assert admitted(labels, int(endpoint[2]), endpoint[1], "egress"), "the store that the settings name"
        assert admitted(labels, 53, "kube-system", "egress")
        assert not any(admitted(labels, port, "203.0.113.7", "egress") for port in (53, 80, 443)), "the internet"
    head = serve[0] | {"ray.io/node-type": "head"}  # KubeRay's own label
    assert admitted(head, 443, "10.96.0.1", "egress") and admitted(head, 6443, "192.168.0.2", "egress")
    assert not admitted(serve[1] | {"ray.io/node-type": "worker"}, 6443, "192.168.0.2", "egress")
    assert not admitted(run[0] | {"ray.io/node-type": "head"}, 6443, "192.168.0.2", "egress")


def test_kueue_admits_the_pods_of_the_job() -> None:
    """By Kueue's rule: a flavor fits a pod whose selector, as far as the flavor has that label, agrees with it."""
    job = the("RayJob")["spec"]
    workers = job["rayClusterSpec"]["workerGroupSpecs"]
    podsets = [(1, job["submitterPodTemplate"]["spec"]), (1, pods(job["rayClusterSpec"])[0])]
    podsets += [(group["replicas"], group["template"]["spec"]) for group in workers]
    flavors = {d["metadata"]["name"]: d["spec"] for _, d in documents() if d["kind"] == "ResourceFlavor"}
    (group,) = the("ClusterQueue")["spec"]["resourceGroups"]
    assert {f["name"] for f in group["flavors"]} == set(flavors)
    assert all([r["name"] for r in f["resources"]] == group["coveredResources"] for f in group["flavors"])
    left = {f["name"]: {r["name"]: amount(r["nominalQuota"]) for r in f["resources"]} for f in group["flavors"]}
    for _ in range(4):  # as many runs as the quota was made for
        for count, pod in podsets:
            chosen = pod["nodeSelector"]
            fits = [n for n, f in flavors.items() if chosen.items() >= f["nodeLabels"].items()]
            assert len(fits) == 1, f"{chosen} fits {fits}"
            for container in pod["containers"]:
                for name, text in container["resources"]["requests"].items():
                    left[fits[0]][name] -= count * amount(text)
    assert all(rest >= -1e-9 for quota in left.values() for rest in quota.values())
    assert job["shutdownAfterJobFinishes"] and not job["rayClusterSpec"]["enableInTreeAutoscaling"], (
        "Kueue refuses others"
    )


def test_nodes_that_pods_ask_for_are_labelled_in_the_steps() -> None:
    labels = set(re.findall(r"^kubectl label nodes .* (\S+)=(\S+)$", STEPS, re.MULTILINE))
    assert {item for pod in all_pods() for item in pod["nodeSelector"].items()} == labels
    for pod in all_pods():
        tolerated = {t["key"] for t in pod.get("tolerations", [])}
        wanted = (
            {"nvidia.com/gpu"} if any("nvidia.com/gpu" in c["resources"]["limits"] for c in containers(pod)) else set()
        )
        wanted |= {"spot"} if pod["nodeSelector"]["meddam/capacity"] == "spot" else set()
        assert tolerated == wanted


@pytest.mark.parametrize(("kind", "spec"), ray_clusters())
def test_every_pod_fetches_the_weights_that_it_is_told_to_use(kind: str, spec: dict[str, Any]) -> None:
    for pod in pods(spec):
        (init,) = pod["initContainers"]
        assert init["command"][0] == "meddam"
        check_command(init["command"][1:])
        model = init["command"][-1]
        document = the(kind)["spec"]
        assert model in (document.get("entrypoint") or document["serveConfigV2"])
        writable = {m["name"]: m["mountPath"] for m in init["volumeMounts"] if not m.get("readOnly")}
        assert writable == {"weights": str(Path(model).parent)}
        (held,) = [m for m in pod["containers"][0]["volumeMounts"] if m["name"] == "weights"]
        assert held["readOnly"] and held["mountPath"] == writable["weights"]


@pytest.mark.parametrize("store", STORES)
def test_the_authority_is_where_the_settings_say(store: str) -> None:
    settings = next(d["data"] for _, d in documents(store) if d["kind"] == "ConfigMap")
    assert ("AWS_CA_BUNDLE" in settings) == ("AWS_ENDPOINT_URL" in settings) == (store == "# AWS")
    if store == "# MinIO":
        return
    folder, _, file = settings["AWS_CA_BUNDLE"].rpartition("/")
    assert f"create configmap meddam-ca --from-file={file}" in STEPS
    for pod in all_pods(store):
        for container in (c for c in containers(pod) if "envFrom" in c):
            assert folder in [m["mountPath"] for m in container["volumeMounts"] if m["name"] == "ca"]


def test_a_proxy_is_not_between_the_cluster_and_its_own_store(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = the("ConfigMap")["data"]
    monkeypatch.setenv("https_proxy", "http://proxy.example:3128")
    monkeypatch.setenv("no_proxy", settings["NO_PROXY"])
    host = settings["AWS_ENDPOINT_URL"].removeprefix("https://").partition(":")[0]
    for own in (host, "localhost", "127.0.0.1", "caption-head-svc.meddam.svc.cluster.local"):
        assert storage._proxy("https", own) is None
    assert storage._proxy("https", "s3.eu-central-1.amazonaws.com") == "http://proxy.example:3128"
    assert "/" not in settings["NO_PROXY"], "ranges mean nothing to boto3 and to what pyarrow is told"


def test_what_reads_requests_has_few_rights_and_no_keys() -> None:
    accounts = {d["metadata"]["name"]: d for _, d in documents() if d["kind"] == "ServiceAccount"}
    job, service = (dict(ray_clusters())[kind] for kind in ("RayJob", "RayService"))
    assert {p["serviceAccountName"] for p in pods(job)} == {"meddam"}
    assert {p["serviceAccountName"] for p in pods(service)} == {"meddam-serve"}
    role = "eks.amazonaws.com/role-arn"
    assert len({d["metadata"]["annotations"][role] for d in accounts.values()}) == len(accounts)
    head, *workers = pods(service)
    tokenless = [*all_pods()[:1], *pods(job), *workers]
    assert all(pod["automountServiceAccountToken"] is False for pod in tokenless)
    assert head.get("automountServiceAccountToken") is not False, "KubeRay's autoscaler in it asks for pods"
    for template in templates(service):
        spec = template["spec"]
        assert not any("envFrom" in container for container in spec["containers"])
        skipped = template["metadata"]["annotations"]["eks.amazonaws.com/skip-containers"].split(",")
        assert {c["name"] for c in spec["containers"]} <= set(skipped)
        assert not {c["name"] for c in spec["initContainers"]} & set(skipped)


def test_the_secret_of_patients_keys_is_in_no_pod() -> None:
    made = [line for line in STEPS.splitlines() if "create secret" in line]
    assert made and not any("MEDDAM_SECRET" in line for line in made)
    assert "MEDDAM_SECRET" not in json.dumps([d for _, d in documents()])


def test_the_doctor_is_the_same_job_with_another_entrypoint(tmp_path: Path) -> None:
    (line,) = [line for line in STEPS.splitlines() if "ray_jobs.doctor" in line]
    before, _, after = line.partition(" | ")
    assert after.startswith("kubectl -n meddam create -f -")
    done = subprocess.run(["bash", "-c", before], cwd=ROOT, capture_output=True, text=True, check=True)
    made, shipped = yaml.safe_load(done.stdout), the("RayJob")
    words = shlex.split(made["spec"].pop("entrypoint"))
    shipped["spec"].pop("entrypoint")
    assert made == shipped
    assert words[:3] == ["python", "-m", "ray_jobs.doctor"]
    check_command(["doctor", *words[3:]])


def test_a_run_is_looked_at_from_a_pod_that_may_read_the_bucket() -> None:
    """A job's cluster goes with it, and a desk outside reaches no bucket inside."""
    pod, job = the("Pod"), the("RayJob")["spec"]["rayClusterSpec"]
    (container,), (head, *_) = pod["spec"]["containers"], pods(job)
    assert pod["spec"]["serviceAccountName"] == head["serviceAccountName"]
    assert container["envFrom"] == head["containers"][0]["envFrom"] and pod["spec"]["activeDeadlineSeconds"]
    name = pod["metadata"]["name"]
    typed = [
        shlex.split(m) for m in re.findall(rf"^kubectl -n meddam exec {name} -- meddam (.*)$", STEPS, re.MULTILINE)
    ]
    assert [words[0] for words in typed] == ["status", "audit", "report"]
    for words in typed:
        check_command(words)
    assert f"cp {name}:{typed[-1][typed[-1].index('--out') + 1]} " in STEPS
    assert not re.search(r"^meddam (status|audit|report)", STEPS, re.MULTILINE)


def test_a_mistake_in_the_settings_does_not_start_cluster_after_cluster() -> None:
    """KubeRay retries whatever the driver's exit code was, and waits for pods as long as it is let."""
    job = the("RayJob")["spec"]
    assert job["backoffLimit"] == 1
    assert job["preRunningDeadlineSeconds"] < job["activeDeadlineSeconds"]
