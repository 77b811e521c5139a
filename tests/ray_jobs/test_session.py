"""How a cluster's CPUs are shared out, and how long a run waits for its GPUs."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path

import pytest

from ray_jobs import caption, cli, session
from ray_jobs.progress_file import PROGRESS
from ray_jobs.session import shares_of
from ray_jobs.summary import EXIT_INCOMPLETE
from tests.ray_jobs.made_shards import make_shards

MODEL = "tests/data/oracle/dam_tiny/checkpoint"

FILTER_CPUS = 1.0
"""Of Ray's checkpoint filter, which runs while a job is resumed."""


@pytest.mark.parametrize("cpus", [2, 3, 4, 6, 8, 16, 24, 64, 128, 1024])
@pytest.mark.parametrize("num_captioners", [1, 2, 8, 64])
def test_every_stage_finds_room_at_once(cpus: int, num_captioners: int) -> None:
    """Otherwise Ray Data reserves nothing for the last ones: a resume hung, another wrote no file for ten minutes."""
    shares = shares_of(cpus, num_captioners)
    taken = (
        FILTER_CPUS + shares.read * shares.max_readers + shares.extract * shares.max_extractors
        + shares.describe * num_captioners + shares.write * shares.max_writers
    )  # fmt: skip
    if cpus > num_captioners:
        assert taken <= cpus + 1e-9
    assert min(shares.max_readers, shares.max_extractors, shares.max_writers) >= 1


def test_most_of_a_gpu_node_prepares_images() -> None:
    shares = shares_of(16, 1)
    assert shares.extract * shares.max_extractors >= 12


def test_gpus_that_do_not_come_are_no_mistake_of_the_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A shortage ends a run with the code that says to run it again, after the time that was given."""
    asked: list[int] = []
    monkeypatch.setattr(caption, "session", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(caption, "stop_on_sigterm", lambda: None)
    monkeypatch.setattr(session.time, "sleep", lambda _: None)
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 8.0, "GPU": 3.0})
    monkeypatch.setattr("ray.autoscaler.sdk.request_resources", lambda bundles: asked.append(len(bundles)))
    shards, out = make_shards(str(tmp_path / "set"), 1, 2), tmp_path / "run"
    args = ["caption", shards, "--out", str(out), "--model", MODEL, "--wait-for-gpus", "8"]
    with pytest.raises(SystemExit) as end:
        cli.main([*args, "--wait-for-gpus-s", "0.2"])
    assert end.value.code == EXIT_INCOMPLETE
    assert "has 3 of 8 GPUs" in capsys.readouterr().err
    assert asked == [8, 0], "an autoscaler is asked, and told when nothing is wanted any more"
    assert json.loads((out / PROGRESS).read_text())["why"] == "TooFewGpus"


def test_a_stage_that_moves_nothing_for_long_does_not_end_the_job(
    ray_session: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Spot nodes that are gone, or a judge that is throttled: both wait for longer than Ray Data would."""
    import ray

    context = ray.data.DataContext.get_current()
    monkeypatch.setattr(context, "execution_no_progress_timeout_s", 0.2)

    def slow(row: dict[str, int]) -> dict[str, int]:
        time.sleep(2)
        return row

    with session.session():
        assert ray.data.range(1).map(slow).take_all() == [{"id": 0}]
