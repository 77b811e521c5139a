"""`meddam doctor`: real machine, real S3 server, and findings that name what to do."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from meddam_core import storage
from ray_jobs.doctor import Config, _cluster, bucket_findings, run
from ray_jobs.doctor_node import judged, memory_bytes, node_facts, store_size, together

MODEL = str(Path(__file__).parents[1] / "data/oracle/dam_tiny/checkpoint")


def states(facts: dict[str, Any]) -> dict[str, str]:
    return {f.about: f.state for f in judged(facts)}


@pytest.mark.s3
def test_a_machine_and_a_bucket_that_are_fit(s3_bucket: str) -> None:
    report = run(Config(bucket=f"{s3_bucket}/runs", model=MODEL))
    text = "\n".join(report.lines())
    assert report.exit_code == 0, text
    assert "may write, list, read and delete" in text and "honoured: a run has one driver" in text
    assert "MB/s from it" in text and "agrees with the store's" in text and "the same on 1 node" in text
    assert storage.list_objects(f"{s3_bucket}/runs/") == [] and not storage.exists(f"{s3_bucket}/runs/.doctor")


@pytest.mark.s3
def test_a_bucket_that_is_not_there_and_weights_that_are_not(s3_bucket: str, tmp_path: Path) -> None:
    report = run(Config(bucket=f"{s3_bucket}-absent/runs", model=str(tmp_path)))
    assert report.exit_code == 2
    text = "\n".join(report.lines())
    assert "the bucket does not exist" in text and "the checkpoint folder is not there" in text
    assert "meddam fetch-weights" in text and "role-policy.json" in text


def test_a_folder_has_no_conditions(tmp_path: Path) -> None:
    assert [f.about for f in bucket_findings(str(tmp_path))] == ["rights", "speed"]
    assert list(tmp_path.iterdir()) == []


def test_each_lack_is_found_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    fit = node_facts(MODEL, None) | {"shm_gb": 1e4, "disk_gb": 1e4, "open_files": 1 << 20, "root": False}
    fit["spill_device"] = "dm-crypt"
    monkeypatch.setenv("MEDDAM_OPS_CACHE", "/cache")
    fit["gpus"] = [{"name": "H200", "memory_gb": 140.0, "capability": (9, 0)}]
    fit["versions"] = fit["versions"] | {"deepspeed": "0.19.8", "deepspeed-mii": "0.3.3"}
    assert set(states(fit).values()) == {"ok"} and states(fit)["kernels"] == "ok"
    without = fit["versions"] | {"deepspeed": None}
    gpu = {"name": "T4", "memory_gb": 16.0, "capability": (7, 5)}
    small = {"name": "L4", "memory_gb": 12.0, "capability": (8, 9)}
    for change, about, state in (
        ({"python": "3.13.0"}, "python", "problem"), ({"shm_gb": 0.06}, "shared memory", "warning"),
        ({"shm_gb": 8.59, "store_gb": 10.0}, "shared memory", "warning"),
        ({"disk_gb": 1.0}, "disk for spilling", "warning"), ({"open_files": 1024}, "open files", "warning"),
        ({"clock_s": -400.0}, "clock", "problem"), ({"weights": False}, "weights", "problem"),
        ({"spill_device": "/dev/sda1"}, "spilled pixels", "warning"),
        ({"root": True}, "user", "warning"), ({"gpus": [gpu]}, "GPU", "warning"), ({"gpus": [small]}, "GPU", "warning"),
        ({"versions": without}, "kernels", "warning"),
    ):  # fmt: skip
        found = [f for f in judged(fit | change) if f.state != "ok"]
        assert [(f.about, f.state) for f in found] == [(about, state)] and found[0].todo, change


@pytest.mark.parametrize("memory_gib", [8, 16, 32, 192, 2048])
@pytest.mark.parametrize("shm_gib", [0, 4, 8, 12, 60, 1024])
def test_an_object_store_is_as_large_as_ray_makes_it(
    memory_gib: int, shm_gib: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray._private import utils

    memory, shm = memory_gib << 30, shm_gib << 30
    monkeypatch.setattr(utils, "get_shared_memory_bytes", lambda: shm)
    assert store_size(memory, shm) == pytest.approx(utils.resolve_object_store_memory(memory))


def test_a_store_that_was_told_its_size_is_judged_by_that() -> None:
    told, default = node_facts(store_bytes=3e9), node_facts()
    assert told["store_gb"] == 3.0 != default["store_gb"]
    assert states(told | {"shm_gb": 4.29})["shared memory"] == "ok"


def test_the_disk_that_is_looked_at_is_the_one_that_ray_spills_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / "not/yet/there"))
    assert node_facts()["spill"] == str(tmp_path)
    facts = node_facts(spill="/dev/shm")
    assert facts["spill"] == "/dev/shm" and facts["spill_device"] == "memory"
    (disk,) = [f for f in judged(facts | {"disk_gb": 1.0}) if f.about == "disk for spilling"]
    assert "/dev/shm" in disk.said


@pytest.mark.usefixtures("ray_session")
def test_nodes_of_a_cluster_are_judged_by_what_ray_took_there(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.setenv("RAY_ADDRESS", "auto")
    (facts,), _ = _cluster(Config())
    assert facts["spill"] == ray.get_runtime_context().get_temp_dir()
    assert facts["store_gb"] == round(ray.cluster_resources()["object_store_memory"] / 1e9, 2)


def test_nodes_of_different_versions_are_found() -> None:
    one = node_facts()
    other = one | {"versions": one["versions"] | {"ray": "2.59.0"}}
    assert [f.state for f in together([one, one])] == ["ok"]
    (found,) = together([one, other])
    assert found.state == "problem" and "2.59.0" in found.said and "same image" in (found.todo or "")


def test_a_head_without_gpus_may_have_the_image_for_cpus() -> None:
    gpu = [{"name": "L4", "memory_gb": 24.0, "capability": (8, 9)}]
    versions = node_facts()["versions"] | {"torch": "2.13.0", "deepspeed": "0.19.8", "deepspeed-mii": "0.3.3"}
    worker = node_facts() | {"gpus": gpu, "versions": versions}
    without = versions | {"torch": "2.13.0+cpu", "deepspeed": None, "deepspeed-mii": None}
    head = worker | {"gpus": [], "versions": without}
    assert [f.state for f in together([head, worker, worker])] == ["ok"]
    assert [f.about for f in together([head, worker, worker | {"versions": without}])] == [
        "deepspeed of the nodes", "deepspeed-mii of the nodes"
    ]  # fmt: skip
    (found,) = together([head, worker | {"versions": versions | {"torch": "2.12.0"}}])
    assert found.about == "torch of the nodes"


@pytest.mark.parametrize(
    ("line", "file"),
    [("0::/job/step", "job/memory.max"), ("0::/", "memory.max"), ("0::/../other", "memory.max"),
     ("9:memory:/pod/box", "memory/pod/box/memory.limit_in_bytes")],
)  # fmt: skip
def test_memory_is_what_the_container_may_use(tmp_path: Path, line: str, file: str) -> None:
    own, limit = tmp_path / "own", tmp_path / "groups" / file
    own.write_text(f"4:cpu,cpuacct:/elsewhere\n{line}\n")
    limit.parent.mkdir(parents=True)
    limit.write_text("1000000\n")
    assert memory_bytes(tmp_path / "groups", own) == 1_000_000
    limit.write_text("max\n")
    everything = memory_bytes(tmp_path / "groups", tmp_path / "absent")
    assert memory_bytes(tmp_path / "groups", own) == everything > 1_000_000


def test_nodes_are_waited_for_before_they_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    from ray_jobs import session

    done: list[Any] = []
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    monkeypatch.setattr(session, "session", nullcontext)
    monkeypatch.setattr(session, "wait_for_gpus", lambda num, timeout_s: done.append(num))
    monkeypatch.setattr(ray, "nodes", lambda: done.append("looked") or [])
    monkeypatch.setattr(ray, "remote", lambda f: f)
    monkeypatch.setattr(ray, "wait", lambda asked, **_: (asked, []))
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 384.0})
    assert run(Config(wait_for_gpus=32)).exit_code == 0
    assert done == [32, "looked"]
