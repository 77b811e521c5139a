"""The Kubernetes manifests, the pods that they lead to, and the steps of docs/cluster.md that apply them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import typer
import yaml

from ray_jobs import cli

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
STEPS = (ROOT / "docs/cluster.md").read_text().partition("## On Kubernetes, step by step")[2].partition("\n## ")[0]
STORES = re.findall(r"^sed -i '/(# \w+)/d' cluster/kuberay", STEPS, re.MULTILINE)
"""What the steps take out of the manifests: the lines of the store that one does not have."""


def documents(without: str | None = None) -> list[tuple[str, dict[str, Any]]]:
    """(file, document) of every Kubernetes manifest, as shipped or without the lines that hold a text."""
    found = []
    for file in sorted((CLUSTER / "kuberay").glob("*.yaml")):
        lines = [line for line in file.read_text().splitlines() if without is None or without not in line]
        found += [(file.name, d) for d in yaml.safe_load_all("\n".join(lines))]
    return found


def ray_clusters(without: str | None = None) -> list[tuple[str, dict[str, Any]]]:
    found = [(d["kind"], d["spec"].get("rayClusterSpec") or d["spec"].get("rayClusterConfig"))
             for _, d in documents(without) if d["apiVersion"] == "ray.io/v1"]  # fmt: skip
    assert len(found) == 2
    return found


def the(kind: str, name: str | None = None) -> dict[str, Any]:
    """The one manifest of a kind, or of a kind and name."""
    (found,) = [d for _, d in documents() if d["kind"] == kind and name in (None, d["metadata"].get("name"))]
    return found


def templates(spec: dict[str, Any]) -> list[dict[str, Any]]:
    """The pods of a Ray cluster, the head first, as templates with labels."""
    return [g["template"] for g in (spec["headGroupSpec"], *spec["workerGroupSpecs"])]


def pods(spec: dict[str, Any]) -> list[dict[str, Any]]:
    return [t["spec"] for t in templates(spec)]


def all_pods(without: str | None = None) -> list[dict[str, Any]]:
    """Every pod that the manifests lead to: the one that submits, those of Ray, and those that stand alone."""
    submits = [d["spec"]["submitterPodTemplate"]["spec"] for _, d in documents(without) if d["kind"] == "RayJob"]
    alone = [d["spec"] for _, d in documents(without) if d["kind"] == "Pod"]
    return submits + [pod for _, spec in ray_clusters(without) for pod in pods(spec)] + alone


def containers(pod: dict[str, Any]) -> list[dict[str, Any]]:
    return [*pod.get("initContainers", []), *pod["containers"]]


def amount(text: str) -> float:
    """A quantity of Kubernetes."""
    number, unit = re.fullmatch(r"(\d+)(m|Gi|Ti)?", text).groups()  # type: ignore[union-attr]
    return int(number) * {None: 1.0, "m": 0.001, "Gi": 1.0 * 2**30, "Ti": 1.0 * 2**40}[unit]


def check_command(words: list[str]) -> None:
    """Every option of a `meddam` command exists and its settings are valid."""
    command, name = typer.main.get_command(cli.app), "meddam"
    context = command.make_context(name, words)
    while hasattr(command, "resolve_command"):
        name, command, words = command.resolve_command(context, words)
        assert command is not None
        context = command.make_context(name, list(words), parent=context)
