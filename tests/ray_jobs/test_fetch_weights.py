"""`meddam fetch-weights`: a checkpoint folder from a bucket, whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from meddam_core import storage
from ray_jobs.fetch_weights import Config, run

CHECKPOINT = Path(__file__).parents[1] / "data/oracle/dam_tiny/checkpoint"


@pytest.mark.s3
def test_a_checkpoint_comes_whole_and_once(s3_bucket: str, tmp_path: Path) -> None:
    files = {p.relative_to(CHECKPOINT).as_posix(): p.read_bytes() for p in CHECKPOINT.rglob("*") if p.is_file()}
    for name, data in files.items():
        storage.write_bytes(f"{s3_bucket}/weights/DAM/{name}", data)
    cfg = Config(source=f"{s3_bucket}/weights/DAM", target=tmp_path / "node" / "DAM")
    found = run(cfg)
    assert found.copied and found.num_files == len(files) and found.num_bytes == sum(map(len, files.values()))
    assert {p.relative_to(cfg.target).as_posix(): p.read_bytes() for p in cfg.target.rglob("*") if p.is_file()} == files
    assert not run(cfg).copied
    (cfg.target / "config.json").write_text("cut")
    assert run(cfg).copied and (cfg.target / "config.json").read_bytes() == files["config.json"]
    assert [p.name for p in cfg.target.parent.iterdir()] == ["DAM"], "no half copy is left"


def test_a_folder_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "readme.txt").write_text("nothing")
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        run(Config(source=str(tmp_path), target=tmp_path / "to"))
    assert not (tmp_path / "to").exists()
