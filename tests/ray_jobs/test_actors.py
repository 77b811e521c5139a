"""The two actors of the caption job, called as Ray calls them: what becomes of a batch that does not fit in memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from benchmarks.waiting_engine import WaitingEngine
from meddam_core.captioner import Captioner, PreparedRegion, ViewRules
from meddam_core.engines.base import Sampling
from meddam_core.engines.loop import EngineLoop
from meddam_core.prompts import load_prompt
from meddam_core.records import REGION_BITS, RegionCaption
from ray_jobs.actors import DescribeRegions, ExtractRegions
from ray_jobs.monitor import start_monitor
from tests.ray_jobs.made_shards import make_shards

SIDE_PX = 32


class _Hungry(Captioner):
    """Asks for more memory than there is when it is shown more than `most` regions at once, or that of `giant`."""

    def __init__(self, most: int, giant: int | None) -> None:
        loop = EngineLoop(WaitingEngine("", device="cpu", dtype="float32"))
        super().__init__(loop, [load_prompt("dam-default")], Sampling())
        self.most, self.giant = most, giant
        self.shown: list[int] = []

    def describe(self, regions: Sequence[PreparedRegion]) -> list[list[RegionCaption]]:
        self.shown.append(len(regions))
        if len(regions) > self.most or any(r.region.region_id >> REGION_BITS == self.giant for r in regions):
            np.empty(1 << 60, np.uint8)
        return super().describe(regions)


def _described(folder: Path, most: int, giant: int | None = None) -> tuple[list[dict[str, Any]], list[int]]:
    """The rows of a shard of eight images after both actors, and how many regions were described at a time."""
    shards = make_shards(str(folder / "set"), 1, 8)
    table = pq.read_table(f"{shards}/shards/shard-000000.parquet")
    monitor = start_monitor(0.5, 8, 100)
    prepared = ExtractRegions(ViewRules(size=SIDE_PX), monitor)(table)
    captioner = _Hungry(most, giant)
    rows = DescribeRegions(lambda: captioner, SIDE_PX, monitor, 1, "m")(prepared)
    captioner.loop.close()
    return rows.to_pylist(), captioner.shown


def test_a_batch_that_does_not_fit_is_halved_and_its_captions_stay_the_same(ray_session: None, tmp_path: Path) -> None:
    whole, _ = _described(tmp_path / "whole", most=100)
    halved, shown = _described(tmp_path / "halved", most=4)
    assert halved == whole and {row["status"] for row in whole} == {"ok"}
    assert shown[0] > 4 and min(shown) >= 1 and sum(n <= 4 for n in shown) > 1


def test_an_image_that_never_fits_fails_alone_and_says_why(ray_session: None, tmp_path: Path) -> None:
    rows, _ = _described(tmp_path, most=100, giant=5)
    assert [row["image_id"] for row in rows if row["status"] == "failed"] == [5]
    assert {c["reason"] for row in rows for c in row["captions"] if c["reason"]} == {"out_of_memory"}
    assert len(rows[5]["captions"]) == len(rows[5]["regions"]) > 0
