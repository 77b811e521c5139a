"""The endpoint on Ray Serve as its users meet it: OpenAI's client, DAM's clients, batch's captions, a dying replica."""

from __future__ import annotations

import base64
import json
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from meddam_core.prompts import load_prompt
from meddam_core.records import Image
from meddam_core.shards import read_shard
from ray_jobs.caption import run
from ray_jobs.caption_config import Config
from ray_jobs.run_directory import RunDirectory
from tests.faults.kill_and_resume import captions
from tests.ray_jobs.made_shards import make_shards
from tests.ray_jobs.serve.conftest import MODEL, chat, message, picture, png, url, with_alpha
from tests.ray_jobs.serve.served import Served, free_port

RGBA = url(png(with_alpha(picture())))
ASKED = "\nDescribe the masked region in detail."


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    made = Served(tmp_path_factory.mktemp("serve"), dtype="float32", device="cpu", drain_s=10)
    yield made
    assert made.end() == 0, made.log()[-3000:]


def test_batch_and_endpoint_give_the_same_captions(ray_session: None, served: Served, tmp_path: Path) -> None:
    """Fifty regions through `meddam caption` and through HTTP, float32."""
    shards = make_shards(str(tmp_path / "set"), 3, 10)
    cfg = Config(shards=(shards,), out=str(tmp_path / "run"), model=MODEL, max_new_tokens=16, dtype="float32")
    assert run(cfg).exit_code == 0
    by_region = {row["region_id"]: row["text"] for row in captions(cfg.out).to_pylist()}
    images = [i for n in range(3) for i in read_shard(f"{shards}/shards/shard-{n:06d}.parquet") if i.regions]
    assert len(by_region) >= 50
    with ThreadPoolExecutor(8) as pool:
        found = dict(pair for pairs in pool.map(lambda image: _over_http(served, image), images) for pair in pairs)
    assert found == by_region
    assert RunDirectory(cfg.out).read_json("summary.json")


def _over_http(served: Served, image: Image) -> list[tuple[int, str]]:
    assert image.image.bytes is not None
    file = base64.b64encode(image.image.bytes).decode()
    asked = {"image": file, "recipe": image.recipe, "prompt": "meddam-v1", "max_tokens": 16,
             "regions": [{"id": str(r.region_id), "box": r.box} for r in image.regions]}  # fmt: skip
    answer = httpx2.post(f"{served.url}/v1/regions:describe", json=asked, timeout=120).json()
    one = {"recipe": image.recipe, "box": image.regions[0].box, "max_tokens": 16}
    text = load_prompt("meddam-v1").text
    single = httpx2.post(
        f"{served.url}/v1/chat/completions", json=chat(url(image.image.bytes), text=text, **one), timeout=120
    ).json()
    assert single["choices"][0]["message"]["content"] == answer["regions"][0]["caption"]
    return [(int(region["id"]), region["caption"]) for region in answer["regions"]]


def test_openais_client(served: Served) -> None:
    client = openai.OpenAI(api_key="none", base_url=f"{served.url}/v1", max_retries=0)
    (model,) = client.models.list().data
    asked: dict[str, Any] = {"model": model.id, "messages": message(RGBA, text=ASKED), "max_tokens": 20}
    whole = client.chat.completions.create(**asked)
    text = whole.choices[0].message.content
    assert text and whole.usage and 0 < whole.usage.completion_tokens <= 20
    stream = client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == text
    assert chunks[-1].usage == whole.usage
    boxed = client.chat.completions.create(
        **{**asked, "messages": message(url(png(picture())))}, extra_body={"box": [20, 10, 60, 50], "margin": 0}
    )
    assert boxed.choices[0].message.content
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(**{**asked, "model": "gpt-4o"})
    with pytest.raises(openai.BadRequestError, match="say which region"):
        client.chat.completions.create(**{**asked, "messages": message(url(png(picture())))})


def test_clients_written_for_dams_own_server(served: Served) -> None:
    """The calls of DAM's examples/query_dam_server.py and query_dam_server_raw.py: its path, its pieces, its fields."""
    payload = {"model": "describe_anything_model", "messages": message(RGBA, text=ASKED), "max_tokens": 512,
               "temperature": 0.2, "top_p": 0.5, "use_cache": True, "num_beams": 1, "seed": 3}  # fmt: skip
    raw = httpx2.post(f"{served.url}/chat/completions", json=payload, timeout=120)
    assert raw.status_code == 200
    text = raw.json()["choices"][0]["message"]["content"]
    client = openai.OpenAI(api_key="api_key", base_url=served.url)
    asked = {k: payload[k] for k in ("model", "messages", "max_tokens", "temperature", "top_p", "seed")}
    said = ""
    for chunk in client.chat.completions.create(**asked, stream=True):  # type: ignore[call-overload]
        if chunk.choices[0].delta and chunk.choices[0].delta.content:
            for piece in chunk.choices[0].delta.content:
                if piece["type"] == "text":
                    said += piece["text"]
    assert said == text != ""


def test_the_access_log_and_the_page_are_there(served: Served) -> None:
    assert "Describe a region".lower() in httpx2.get(served.url).text.lower()
    assert httpx2.get(f"{served.url}/health").json() == {"status": "ok"}
    answer = httpx2.get(f"{served.url}/v1/models", headers={"X-Request-Id": "abc"})
    assert answer.headers["x-request-id"] == "abc"


@pytest.mark.slow
def test_a_replica_that_is_killed_under_load_costs_what_it_held(served: Served) -> None:
    """What it held gets 503 and Retry-After in OpenAI's shape; what comes later is served by its successor."""
    httpx2.post(f"{served.url}/v1/chat/completions", json=chat(RGBA, max_tokens=2), timeout=120)
    (replica,) = served.replicas()
    long = chat(RGBA, text="What is it?", max_tokens=900, temperature=2.0)
    with ThreadPoolExecutor(8) as pool:
        held = [pool.submit(httpx2.post, f"{served.url}/v1/chat/completions", json=long, timeout=120) for _ in range(8)]
        while _in_flight(served) < 9:  # the question itself is one
            time.sleep(0.01)
        os.kill(replica, signal.SIGKILL)
        answers = [future.result() for future in held]
    assert {a.status_code for a in answers} <= {200, 503}
    lost = [a for a in answers if a.status_code == 503]
    assert lost, "the replica died too late to hold anything"
    assert all(a.json()["error"]["code"] == "replica_lost" and int(a.headers["retry-after"]) >= 1 for a in lost)
    client = openai.OpenAI(api_key="none", base_url=f"{served.url}/v1", max_retries=60)
    asked: dict[str, Any] = {"model": "meddam", "messages": message(RGBA), "max_tokens": 4}
    assert client.chat.completions.create(**asked).choices[0].message.content is not None
    assert served.replicas() != [replica]


@pytest.mark.slow
def test_a_replica_that_is_killed_in_the_middle_of_a_stream(served: Served) -> None:
    """The stream ends with an error event and as HTTP wants it; OpenAI's client raises what it may try again."""
    client = openai.OpenAI(api_key="none", base_url=f"{served.url}/v1", max_retries=60, timeout=180)
    asked: dict[str, Any] = {"model": "meddam", "messages": message(RGBA), "max_tokens": 900, "temperature": 2.0}
    client.chat.completions.create(**{**asked, "max_tokens": 2})
    events: list[str] = []
    with httpx2.stream("POST", f"{served.url}/v1/chat/completions", json={**asked, "stream": True}, timeout=120) as raw:
        for line in raw.iter_lines():
            events += [line] if line else []
            if len(events) == 3:
                _kill_replica(served)
    assert json.loads(events[-1].removeprefix("data: "))["error"]["code"] == "replica_lost"
    client.chat.completions.create(**{**asked, "max_tokens": 2})
    chunks = iter(client.chat.completions.create(**asked, stream=True))
    assert next(chunks) and next(chunks)
    _kill_replica(served)
    with pytest.raises(openai.APIError, match="try again"):
        list(chunks)


@pytest.mark.slow
def test_a_replica_whose_engine_is_killed_is_replaced(served: Served) -> None:
    client = openai.OpenAI(api_key="none", base_url=f"{served.url}/v1", max_retries=60, timeout=180)
    asked: dict[str, Any] = {"model": "meddam", "messages": message(RGBA), "max_tokens": 2}
    client.chat.completions.create(**asked)
    before, (engine,) = served.replicas(), served.engines()
    os.kill(engine, signal.SIGKILL)
    lost = httpx2.post(f"{served.url}/v1/chat/completions", json=chat(RGBA), timeout=120)
    assert lost.status_code == 503 and lost.json()["error"]["code"] == "replica_lost"
    assert client.chat.completions.create(**asked).choices[0].message.content is not None
    assert served.replicas() != before


@pytest.mark.slow
def test_replicas_come_with_the_load_and_go_with_it(tmp_path: Path) -> None:
    """Autoscaling: none of the requests is lost while a second replica comes and while it goes."""
    served = Served(
        tmp_path, device="cpu", max_replicas=2, target_ongoing=2, upscale_delay_s=1, downscale_delay_s=5, drain_s=10
    )
    done, statuses = threading.Event(), Counter[int]()

    def ask(tokens: int) -> None:
        while not done.is_set():
            body = chat(RGBA, max_tokens=tokens, temperature=2.0)
            statuses[httpx2.post(f"{served.url}/v1/chat/completions", json=body, timeout=180).status_code] += 1

    try:
        with ThreadPoolExecutor(9) as pool:
            asking = [pool.submit(ask, 200) for _ in range(8)]
            most = _replicas_become(served, 2)
            done.set()
            for each in asking:
                each.result()
            done.clear()
            alone = pool.submit(ask, 4)  # somebody asks on, all the while
            least = _replicas_become(served, 1)
            done.set()
            alone.result()
    finally:
        done.set()
        assert served.end() == 0, served.log()[-3000:]
    assert (most, least) == (2, 1)
    assert set(statuses) == {200}, statuses


def _replicas_become(served: Served, number: int) -> int:
    deadline = time.monotonic() + 300
    while len(served.engines()) != number and time.monotonic() < deadline:
        time.sleep(0.2)
    return len(served.engines())


def _kill_replica(served: Served) -> None:
    (replica,) = served.replicas()
    os.kill(replica, signal.SIGKILL)


def _in_flight(served: Served) -> float:
    text = httpx2.get(f"{served.url}/metrics", timeout=60).text
    return float(next(line.split()[1] for line in text.splitlines() if line.startswith("meddam_serve_in_flight ")))


@pytest.mark.slow
def test_a_new_version_replaces_the_old_one_without_a_request_lost(ray_session: None) -> None:
    from ray import serve

    from ray_jobs.serve import job
    from ray_jobs.serve.config import Config as ServeConfig
    from ray_jobs.serve.deployment import application

    cfg = ServeConfig(model=MODEL, port=free_port(), num_threads=1, device="cpu", model_name="one")
    url = job.start(cfg)
    done = threading.Event()
    statuses: Counter[int] = Counter()
    models: set[str] = set()

    def ask() -> None:
        with httpx2.Client(base_url=url, timeout=180) as http:
            while not done.is_set():
                statuses[http.post("/v1/chat/completions", json=chat(RGBA, max_tokens=8)).status_code] += 1
                models.add(http.get("/v1/models").json()["data"][0]["id"])

    with ThreadPoolExecutor(4) as pool:
        asking = [pool.submit(ask) for _ in range(4)]
        serve.run(application(cfg.model_copy(update={"model_name": "two"})), name=job.APP, route_prefix="/")
        deadline = time.monotonic() + 120
        while "two" not in models and time.monotonic() < deadline:
            time.sleep(0.1)
        done.set()
        for each in asking:
            each.result()
    job.end()
    assert models == {"one", "two"}
    assert set(statuses) == {200}, statuses
