"""What a cluster is given: the Serve configuration and the dashboard fit the code; keys are counted across replicas."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path

import pytest
import yaml
from starlette.testclient import TestClient

from ray_jobs.serve.app import make_app
from ray_jobs.serve.config import Config
from ray_jobs.serve.job import ENVIRONMENT
from ray_jobs.serve.job import run as run_job
from ray_jobs.serve.metrics import Metrics
from ray_jobs.serve.replica import make_service, model_folder
from tests.ray_jobs.serve.conftest import MODEL

CLUSTER = Path(__file__).parents[3] / "cluster"


def test_the_serve_configuration_is_one() -> None:
    from ray.serve.schema import ServeDeploySchema

    content = yaml.safe_load((CLUSTER / "serve.yaml").read_text())
    (application,) = ServeDeploySchema.model_validate(content).applications
    assert application.import_path == "ray_jobs.serve.deployment:build"
    assert Config.model_validate(application.args).keys, "what others reach asks for keys"


def test_the_proxies_find_what_they_run() -> None:
    from ray._common.utils import import_attr

    from ray_jobs.serve.guards import CleanErrors
    from ray_jobs.serve.shortcut import Shortcut

    middlewares = import_attr(ENVIRONMENT["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"])()
    assert [m.cls for m in middlewares] == [Shortcut, CleanErrors], "the last is outermost"


def test_clusters_are_started_with_serves_environment() -> None:
    text = (CLUSTER / "kuberay/rayservice.yaml").read_text()
    given = dict(re.findall(r'{name: (RAY_SERVE_\w+), value: "?([^"}]+)"?}', text))
    assert given == ENVIRONMENT


def test_the_dashboard_asks_for_metrics_that_there_are() -> None:
    text = (CLUSTER / "grafana/serve.json").read_text()
    assert len(json.loads(text)["panels"]) >= 10
    asked = set(re.findall(r"ray_(meddam_serve_[a-z_]+)", text))
    families = {family.name: family.type for family in Metrics().registry.collect()}
    there = {name + {"counter": "_total", "histogram": "_bucket"}.get(kind, "") for name, kind in families.items()}
    assert asked <= there
    assert len(asked) >= 8


def test_a_model_that_is_not_there_is_said_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no config\.json"):
        run_job(Config(model=str(tmp_path)))
    assert model_folder(Config(model=MODEL)) == MODEL


def test_without_a_model_the_packages_own_is_served() -> None:
    service = make_service(Config(num_threads=1))
    with TestClient(make_app(service)) as client:
        card = client.get("/samples").json()["samples"][1]
        picture = client.get(f"/samples/{card['name']}").content
        asked = {"image": base64.b64encode(picture).decode(), "recipe": card["recipe"], "max_tokens": 60,
                 "regions": [{"box": [140, 325, 360, 485]}]}  # fmt: skip
        (region,) = client.post("/v1/regions:describe", json=asked).json()["regions"]
    service.describer.loop.close()
    assert "CT slice" in region["caption"] and region["template_set"] == "phantom_ct"
    assert {"side", "density"} <= {finding["attribute"] for finding in region["findings"]}


def test_a_fresh_key_comes_with_its_entry() -> None:
    lines = run_job(Config(new_key="ward-7")).lines()
    entry = yaml.safe_load(lines[-1])["keys"]
    assert Config(model=MODEL, keys=entry).keys["ward-7"].sha256 == entry["ward-7"]["sha256"]
    assert "sk-meddam-" in lines[0]


def test_replicas_share_what_keys_used(ray_session: None) -> None:
    import asyncio

    from ray_jobs.serve.deployment import RemoteLedger

    async def take() -> list[object]:
        one, other = RemoteLedger(), RemoteLedger()
        return [await ledger.captions("ward", 2, 5) for ledger in (one, other, one)]

    first, second, third = asyncio.run(take())
    assert first is None and second is None
    assert third is not None and third[0] == "quota"  # type: ignore[index]
