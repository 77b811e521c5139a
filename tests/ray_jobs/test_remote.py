"""The remote engine: what a model is shown, what leaves and what doesn't, and a caption run against a real server."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as PilImage

from meddam_core.captioner import RegionPreparer, ViewRules
from meddam_core.engines.base import Engine, Request, Sampling
from meddam_core.engines.remote import ChatFailed, ChatReply, RemoteEngine, Showing, chat_messages
from meddam_core.focal import focal_views
from meddam_core.records import Reason, RowError
from meddam_core.shards import read_shard, write_shard
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
