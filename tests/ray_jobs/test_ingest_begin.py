"""How an ingest begins, and begins again where it was cut off before its first shard. Without Ray."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from meddam_core import storage
from ray_jobs import ingest
from ray_jobs.ingest_config import PhantomsConfig
from tests.ray_jobs.made_shards import make_shards


def test_a_start_after_a_kill_between_the_parts_and_the_plan_writes_the_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = PhantomsConfig(out=str(tmp_path), count=9, images_per_shard=3)
    source, write = cfg.source(), storage.write_bytes
    fingerprint = ingest._fingerprint(cfg, source, None)

    def killed_at_the_plan(uri: str, data: bytes) -> None:
        if uri.endswith(ingest.PLAN):
            raise KeyboardInterrupt
        write(uri, data)

    with monkeypatch.context() as killed:
        killed.setattr(storage, "write_bytes", killed_at_the_plan)
        with pytest.raises(KeyboardInterrupt):
            ingest._begin(cfg, source, None, b"salt", fingerprint)
    assert (tmp_path / "_work/parts.json").exists() and not (tmp_path / ingest.PLAN).exists()
    assert ingest._finished(cfg, fingerprint) is None
    assert ingest._begin(cfg, source, None, b"salt", fingerprint) == 3
    make_shards(str(tmp_path), 1, 3)
    assert ingest._finished(cfg, fingerprint) is None, "and the starts after that go on too"
    assert json.loads((tmp_path / ingest.PLAN).read_text())["config"]["count"] == 9


def test_a_set_that_was_made_before_labels_could_be_left_out_is_still_the_same_ingest(tmp_path: Path) -> None:
    cfg = PhantomsConfig(out=str(tmp_path), count=9)
    settings = cfg.model_dump(mode="json", exclude={"out", "labels", *ingest._PRIVATE})
    facts = [ingest.VERSION, 1, "PhantomsConfig", settings, cfg.source().fingerprint(), None]
    before = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    assert ingest._fingerprint(cfg, cfg.source(), None) == before
    without = cfg.model_copy(update={"labels": False})
    assert ingest._fingerprint(without, cfg.source(), None) != before
