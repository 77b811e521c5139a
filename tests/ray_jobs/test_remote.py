"""The remote engine: what a model is shown, what leaves and what doesn't, and a caption run against a real server."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as PilImage

from meddam_core.captioner import RegionPreparer, ViewRules
from meddam_core.engines.base import Engine, EngineDied, EngineStopped, Request, Sampling
from meddam_core.engines.loop import EngineLoop
from meddam_core.engines.remote import ChatFailed, ChatReply, RemoteEngine, Showing, chat_messages
from meddam_core.focal import focal_views
from meddam_core.records import Reason, RowError
from meddam_core.shards import read_shard, write_shard
from ray_jobs import captioners
from ray_jobs.audit import audit
from ray_jobs.caption import run
from ray_jobs.caption_config import Config
from ray_jobs.run_directory import RunDirectory
from ray_jobs.summary import Summary
from tests.faults.kill_and_resume import captions
from tests.faults.quota_server import Quota, QuotaServer
from tests.ray_jobs.made_shards import make_shards


def request(name: str = "a") -> Request:
    image_HWC = np.zeros((200, 300, 3), np.uint8)
    image_HWC[80:120, 100:150] = (0, 200, 0)
    mask_HW = np.zeros((200, 300), np.uint8)
    mask_HW[80:120, 100:150] = 1
    views = focal_views(image_HWC, mask_HW, 256, "pad")[None]
    return Request(request_id=name, views_N8SS=views, query="<image>\nDescribe it.", sampling=Sampling(seed=7))


def shown(messages: list[dict[str, Any]]) -> tuple[str, list[np.ndarray[Any, Any]]]:
    (message,) = messages
    text, *pictures = message["content"]
    raw = [base64.b64decode(p["image_url"]["url"].partition(",")[2]) for p in pictures]
    return text["text"], [np.asarray(PilImage.open(io.BytesIO(r))) for r in raw]


def test_the_model_is_shown_the_whole_image_with_a_box_and_the_crop() -> None:
    text, (full, crop) = shown(chat_messages(request(), Showing()))
    assert text.endswith("Describe it.")
    assert "<image>" not in text
    assert "red box" in text
    (ys, xs), (red_ys, red_xs) = (np.nonzero((full == colour).all(-1)) for colour in ((0, 200, 0), (255, 0, 0)))
    for inner, outer in ((ys, red_ys), (xs, red_xs)):  # the box lies just outside of the region, and covers none of it
        assert outer.min() < inner.min() <= outer.min() + 6
        assert outer.max() > inner.max() >= outer.max() - 6
    assert len(ys) > 0.8 * 40 * 50 * (256 / 300) ** 2
    assert (crop == (0, 200, 0)).all(-1).mean() > 0.75, "the crop is the region itself"


@pytest.mark.parametrize(
    ("showing", "num", "red"),
    [(Showing("crop"), 1, False), (Showing("full"), 1, True), (Showing("both", False), 2, False)],
)
def test_other_ways_to_show_it(showing: Showing, num: int, red: bool) -> None:
    text, pictures = shown(chat_messages(request(), showing))
    assert len(pictures) == num
    assert any((p == (255, 0, 0)).all(-1).any() for p in pictures) is red is ("red box" in text)


def test_a_whole_image_without_a_box_is_refused() -> None:
    with pytest.raises(ValueError, match="does not tell which region"):
        Showing("full", box=False)


class Echo:
    """A chat of this process, for the engine's own book-keeping."""

    async def complete(self, messages: list[dict[str, Any]], sampling: Sampling) -> ChatReply:
        if sampling.seed == 13:
            raise ChatFailed("the endpoint failed: timeout")
        return ChatReply(f"seed {sampling.seed}", "length" if sampling.seed == 8 else "stop", 10, 3)


def test_requests_come_back_with_their_own_results() -> None:
    engine = RemoteEngine(Echo(), "some-vlm", Showing())
    assert isinstance(engine, Engine)
    requests = [
        Request(request_id=str(s), views_N8SS=request().views_N8SS, query="<image> x", sampling=Sampling(seed=s))
        for s in (7, 8, 13)
    ]
    ok, long, failed = engine.generate(requests)
    assert (ok.text, ok.finish_reason, len(ok.token_ids), ok.mean_logprob) == ("seed 7", "stop", 3, None)
    assert long.finish_reason == "length"
    assert (failed.reason, failed.detail) == (Reason.ENGINE_ERROR, "the endpoint failed: timeout")
    engine.submit(requests[:1])
    with pytest.raises(ValueError, match="in flight"):
        engine.submit(requests[:1])
    engine.cancel("7")
    assert engine.num_unfinished == 0
    engine.close()


class Raising:
    """A chat that raises what it was given."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    async def complete(self, messages: list[dict[str, Any]], sampling: Sampling) -> ChatReply:
        raise self.error


@pytest.mark.parametrize(
    ("error", "name"),
    [
        (AttributeError("a secret"), "AttributeError"),
        (OSError("a secret"), "OSError"),
        (UnicodeDecodeError("utf-8", b"a secret", 0, 1, "a secret"), "UnicodeDecodeError"),  # a ValueError
        (asyncio.CancelledError("a secret"), "CancelledError"),
    ],
)
def test_whatever_is_raised_is_a_failed_result_with_its_name(error: BaseException, name: str) -> None:
    engine = RemoteEngine(Raising(error), "some-vlm", Showing())
    (failed,) = engine.generate([request()])
    assert (failed.finish_reason, failed.reason) == ("error", Reason.ENGINE_ERROR)
    assert failed.detail is not None
    assert failed.detail.startswith(f"{name} while asking the endpoint")
    assert "secret" not in failed.detail
    engine.close()


def test_a_picture_that_cannot_be_made_says_why() -> None:
    engine = RemoteEngine(Echo(), "some-vlm", Showing())
    views = np.concatenate([request().views_N8SS] * 2)
    (failed,) = engine.generate([Request(request_id="a", views_N8SS=views, query="x", sampling=Sampling())])
    assert failed.detail is not None
    assert "not clips" in failed.detail
    engine.close()


def test_a_refusal_that_stops_ends_the_engine_and_no_row_gets_it() -> None:
    engine = RemoteEngine(Raising(ChatFailed("the endpoint has answered no call", stops=True)), "some-vlm", Showing())
    loop = EngineLoop(engine)
    with pytest.raises(EngineStopped, match="answered no call"):
        loop.generate([request("a"), request("b")])
    assert isinstance(loop.failure, EngineStopped)
    engine.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_engine_whose_thread_has_ended_says_so() -> None:
    engine = RemoteEngine(Raising(SystemExit(1)), "some-vlm", Showing())
    with pytest.raises(EngineDied):
        engine.generate([request()])


def test_what_may_not_leave_is_not_even_rendered(tmp_path: Path) -> None:
    shards = make_shards(str(tmp_path / "set"), 1, 2)
    image = next(read_shard(f"{shards}/shards/shard-000000.parquet"))
    rules = ViewRules(size=64, egress=("zero-retention",))
    with pytest.raises(RowError, match="egress policy open") as refused:
        RegionPreparer(rules).prepare(image)
    assert refused.value.reason is Reason.ACCESS_DENIED


def config(shards: str, out: Path, url: str, **settings: Any) -> Config:
    return Config(
        shards=(shards,), out=str(out), model="some/vlm", engine="remote", base_url=url, prompts=("dam-default",),
        view_size=128, images_per_file=10, **{"retention": "inside", **settings},
    )  # fmt: skip


def test_a_run_through_faults_is_a_run_like_any_other(ray_session: None, tmp_path: Path) -> None:
    shards = make_shards(str(tmp_path / "set"), 1, 8)
    shares = {"error": 0.1, "close": 0.05, "limited": 0.05}
    with QuotaServer(Quota(None, latency_s=(0.0, 0.02), shares=shares, seed=2)) as server:
        summary = run(config(shards, tmp_path / "run", server.url, timeout_s=5.0))
        asked = len(server.seen)
        assert isinstance(summary, Summary)
        assert (summary.state, summary.engine, summary.kernels) == ("complete", "remote", "some/vlm")
        assert audit(RunDirectory(str(tmp_path / "run"))).clean
        rows = captions(str(tmp_path / "run")).to_pylist()
        assert asked >= len(rows) == summary.num_regions
        assert all(r["status"] == "ok" and r["text"].startswith("A region like") for r in rows)
        assert len({r["text"] for r in rows}) == len(rows), "each region's own pictures must be sent"
        described = json.loads((tmp_path / "run/run.json").read_text())
        assert described["model"].startswith("vlm@")
        with pytest.raises(ValueError, match=r"shown: both\+box -> crop"):
            _rerun(tmp_path, config(shards, tmp_path / "run", server.url, show="crop", draw_box=False))


def _rerun(tmp_path: Path, cfg: Config) -> None:
    (tmp_path / "run/summary.json").unlink()
    run(cfg)


class Turning(QuotaServer):
    """After so many requests something happens to the endpoint, once; `broken` breaks every answer from then on."""

    def __init__(self, after: int, turn: Callable[[], None]) -> None:
        super().__init__(Quota(None, latency_s=(0.0, 0.0)))
        self.after, self.turn, self.broken = after, turn, False

    def _fate(self, age_s: float) -> str:
        if len(self.seen) == self.after:
            self.turn()
        return "error" if self.broken else super()._fate(age_s)


def _kill_the_permits() -> None:
    import ray

    (name,) = [n for n in ray.util.list_named_actors() if n.startswith("permits-")]
    ray.kill(ray.get_actor(name))


@pytest.mark.parametrize(
    ("what", "said"),
    [("outage", "answered no call"), pytest.param("permits", "has died", marks=pytest.mark.slow)],
)
def test_what_ends_late_in_a_run_stops_it_without_failed_rows_and_it_goes_on(
    ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, said: str
) -> None:
    """Fails if the rest of a run becomes failed rows with exit code 0 because its endpoint was down for long."""
    monkeypatch.setattr(captioners, "PATIENCE_S", 0.3)
    shards, out = make_shards(str(tmp_path / "set"), 2, 12), tmp_path / "run"
    with Turning(25, lambda: None) as server:

        def end() -> None:
            server.broken = True

        server.turn = end if what == "outage" else _kill_the_permits
        cfg = config(shards, out, server.url, timeout_s=5.0, images_per_batch=4, max_failed_share=1.0)
        stopped = run(cfg)
        assert isinstance(stopped, Summary)
        assert (stopped.state, stopped.exit_code) == ("stopped", 3)
        assert set(stopped.by_reason) <= {"no_regions"}
        assert said in str(stopped.why)
        assert stopped.session["worker_deaths"] == 0
        server.broken = False
        whole = run(cfg)
        assert isinstance(whole, Summary)
        assert (whole.state, set(whole.by_status)) == ("complete", {"ok"})
        assert audit(RunDirectory(str(out))).clean


def test_pictures_that_are_denied_send_no_byte(
    ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    made = make_shards(str(tmp_path / "made"), 1, 9)
    images: Sequence[Any] = list(read_shard(f"{made}/shards/shard-000000.parquet"))
    from dataclasses import replace

    write_shard(str(tmp_path / "set/shards/shard-000000.parquet"), [replace(i, egress="deny") for i in images])
    with QuotaServer(Quota(None)) as server:
        url = server.url.replace("http://", "https://")
        summary = run(config(str(tmp_path / "set"), tmp_path / "run", url, retention="retains"))
        assert isinstance(summary, Summary)
        assert (summary.state, set(summary.by_reason)) == ("stopped", {"access_denied"})
        assert not server.seen


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"base_url": None}, "needs --base-url"),
        ({"engine": "torch"}, "no other engine takes one"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], said: str) -> None:
    base = {"shards": ("s",), "out": "o", "model": "m", "engine": "remote", "base_url": "http://h/v1"}
    with pytest.raises(ValueError, match=said):
        Config(**(base | settings))
