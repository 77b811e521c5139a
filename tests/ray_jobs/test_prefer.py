"""`meddam prefer` and `meddam shorten`: choices among samples by a judge, and captions in several lengths."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from meddam_core.training.data import CaptionTable
from ray_jobs import curate, prefer, shorten
from ray_jobs.cli import main
from ray_jobs.finetune import caption_files
from tests.faults.quota_server import Quota, QuotaServer, Seen
from tests.ray_jobs.made_lidc_rows import make_nodule_shards
from tests.ray_jobs.test_captions_import import imported

pytestmark = pytest.mark.usefixtures("ray_session")
SAID = ("A ground-glass mass.", "A solid nodule with a sharp margin, on the left.", "A solid, sharp nodule.")


class Comparing(QuotaServer):
    """Prefers the longer description, or with `place` the one that stands there."""

    place: str | None = None

    def text(self, asked: dict[str, Any], seen: Seen) -> str:
        first, _, second = asked["messages"][1]["content"].partition("Description B:")
        return json.dumps({"choice": self.place or ("A" if len(first) - 40 > len(second.partition("<")[0]) else "B")})


@pytest.fixture
def run(tmp_path: Path) -> str:
    images = make_nodule_shards(tmp_path / "set", 3)
    with (tmp_path / "captions.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["region_id", "sample", "text"])
        writer.writerows((r.region_id, s, text) for i in images for r in i.regions for s, text in enumerate(SAID))
    imported(str(tmp_path / "set"), tmp_path / "captions.csv", tmp_path / "run")
    return str(tmp_path / "run")


def chosen(run: str, name: str, out: Path) -> set[str]:
    summary = curate.run(curate.Config(runs=(run,), out=str(out), choice=name))
    assert summary.dropped == {"pairwise": 12}
    rows = pq.read_table(out / "captions").to_pylist()
    assert {r["chosen_by"] for r in rows} == {name}
    return {r["text"] for r in rows}


def test_a_model_chooses_and_is_not_asked_again(run: str, tmp_path: Path) -> None:
    with Comparing(Quota(None, latency_s=(0.0, 0.0))) as server:
        cfg = prefer.Config(run=run, judge="llm", model="m", base_url=server.url, retention="inside", api_key_env="NO")
        found = prefer.run(cfg)
        assert (found.num_choices, found.num_pairs, found.exit_code) == (6, 12, 0)
        asked = len(server.seen)
        assert 0 < asked <= 24
        assert prefer.run(cfg) == found
        (Path(run) / "choices/llm-m/summary.json").unlink()  # as if killed before the end
        for file in (Path(run) / "choices/llm-m/files").glob("*.parquet"):
            file.unlink()
        assert prefer.run(cfg).num_pairs == 12  # from the cache
        assert len(server.seen) == asked
        assert chosen(run, "llm-m", tmp_path / "set-1") == {SAID[1]}
        server.place = "A"
        other = prefer.run(cfg.model_copy(update={"name": "place", "model": "n"}))
        assert (other.num_ties, other.num_flipped) == (12, 12)
        with pytest.raises(ValueError, match="holds other choices: judge"):
            prefer.run(cfg.model_copy(update={"name": "place"}))


def test_offline_agreement_chooses(run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["prefer", run])
    assert ended.value.code == 0
    assert "6 choices by lexical" in capsys.readouterr().out
    assert SAID[0] not in chosen(run, "lexical", tmp_path / "set")


def test_what_cannot_work_is_said(run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(ValueError, match="needs --model and --base-url"):
        prefer.Config(run=run, judge="llm")
    with pytest.raises(ValueError, match="holds no key"):
        prefer.Config(run=run, judge="llm", model="m", base_url="https://judge.example/v1")
    with pytest.raises(ValueError, match="no finished choices 'mine'"):
        curate.run(curate.Config(runs=(run,), out=str(tmp_path / "x"), choice="mine"))
    with pytest.raises(ValueError, match="not published"):
        prefer.run(prefer.Config(run=str(tmp_path / "none")))


class Summarising(QuotaServer):
    """Shortens to the same words whatever the caption was."""

    says = "Solid nodule."

    def text(self, asked: dict[str, Any], seen: Seen) -> str:
        return self.says


def test_a_set_in_several_lengths(run: str, tmp_path: Path) -> None:
    chosen_set, lengths = str(tmp_path / "set-1"), ("sentence", "keyword")
    curate.run(curate.Config(runs=(run,), out=chosen_set, best_of_samples=False, max_same_text=1))
    by_rule = shorten.run(shorten.Config(source=chosen_set, out=str(tmp_path / "rule"), lengths=lengths))
    assert by_rule.num_captions == 3
    assert by_rule.added["keyword"] > 0
    table = CaptionTable.read(caption_files(str(tmp_path / "rule")))
    assert len(table.texts) == 3 + sum(by_rule.added.values())
    assert json.loads((tmp_path / "rule/curation.json").read_text())["shortened"]["by"] == "rule"
    assert shorten.run(shorten.Config(source=chosen_set, out=str(tmp_path / "rule"), lengths=lengths)) == by_rule
    with pytest.raises(ValueError, match="begun with other settings"):
        shorten.run(shorten.Config(source=chosen_set, out=str(tmp_path / "rule")))
    with Summarising(Quota(None, latency_s=(0.0, 0.0))) as server:
        cfg = shorten.Config(
            source=chosen_set, out=str(tmp_path / "llm"), lengths=("sentence",), by="llm", model="m",
            base_url=server.url, retention="inside", api_key_env="NO",
        )  # fmt: skip
        found = shorten.run(cfg)
        assert len(server.seen) == 3
        assert found.added["sentence"] + sum(found.dropped.values()) == 3
        assert any("otherwise than the caption" in why for why in found.dropped)  # it was no nodule that was solid
        assert shorten.run(cfg) == found
        assert len(server.seen) == 3
