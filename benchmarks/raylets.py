"""What a region costs the driver, the GCS and the raylets as raylets are added, and what the permit actor can grant.

    python -m benchmarks.raylets --raylets 1,2,4,8
    python -m benchmarks.raylets --raylets 8 --images-per-raylet 400 --step-ms 160 --json

Each raylet of this machine has two CPUs and one captioner that only waits (8 regions in `--step-ms`). Pictures are
small, so that two cores can prepare enough of them, and blocks hold as many images as blocks of real films do, because
it is blocks and calls that the driver pays for. Processor time is counted between the first committed part file and the
last, so a busy machine changes the rates and hardly the costs. The permit actor is asked by one process a raylet.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.waiting_engine import REGIONS_PER_STEP, path_of
from meddam_core import storage
from meddam_core.judging.budget import Limits
from ray_jobs import caption
from ray_jobs.caption_config import Config
from ray_jobs.checkpoints import PENDING
from ray_jobs.permits import Grant, Settled, start_permits
from ray_jobs.run_directory import RunDirectory
from ray_jobs.session import session
from tests.faults.kill_and_resume import MODEL
from tests.faults.processes import descendants, title
from tests.ray_jobs.made_shards import make_shards

IMAGES_PER_FILE = 25
IMAGES_PER_BLOCK = 7
"""A film of 8 regions is 4.7 MB of views, a block 32 MB."""
STORE_BYTES = 100_000_000
PERMIT_S = 5.0
PERMIT_CALLS_AT_ONCE = 64
GROUPS = {
    "gcs_server": "GCS", "raylet/raylet": "raylets", "Monitor": "monitor", "Permits": "permits",
    "ExtractRegions": "extractors", "DescribeRegions": "captioners", "Agent": "agents",
}  # fmt: skip
"""Part of a process's title, and what it is counted as."""
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(slots=True)
class Sample:
    """The processor time of each group so far."""

    at: float
    num_files: int
    cpu_s: Counter[str] = field(default_factory=Counter)


@contextmanager
def cluster(num_raylets: int) -> Iterator[None]:
    """A head without captioners and `num_raylets` nodes on this machine; the driver is this process."""
    import ray
    from ray.cluster_utils import Cluster

    common = {"object_store_memory": STORE_BYTES, "include_dashboard": False}
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **common})
    try:
        for _ in range(num_raylets):
            made.add_node(num_cpus=2, object_store_memory=STORE_BYTES)
        made.wait_for_nodes()
        os.environ["RAY_ADDRESS"] = made.address
        with session():
            yield
    finally:
        os.environ.pop("RAY_ADDRESS", None)
        ray.shutdown()
        made.shutdown()


def sampled(out: str, samples: list[Sample], ended: threading.Event) -> None:
    """Looks at all processes below this one, twice a second."""
    checkpoint = RunDirectory(out).checkpoint(1)
    while not ended.wait(0.5):
        infos = storage.list_files(checkpoint, ".parquet")
        num_files = sum(not i.path.endswith(PENDING) for i in infos)
        samples.append(Sample(time.monotonic(), num_files, cpu_by_group()))


def cpu_by_group() -> Counter[str]:
    """Processor seconds of this process and those below it, by what they are."""
    found: Counter[str] = Counter({"driver": sum(os.times()[:2])})
    for pid in descendants(os.getpid()):
        text = title(pid)
        group = next((name for part, name in GROUPS.items() if part in text), "other workers")
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        found[group] += (int(fields[11]) + int(fields[12])) / _TICKS
    return found


def captioned(folder: Path, num_raylets: int, images_per_raylet: int, step_ms: int) -> dict[str, Any]:
    """Runs the job on the cluster that is there. Regions/s, and milliseconds of each group a thousand regions."""
    shards = make_shards(str(folder / f"set-{num_raylets}"), num_raylets, images_per_raylet, side_px=64)
    out, samples, ended = str(folder / f"run-{num_raylets}"), [], threading.Event()
    thread = threading.Thread(target=sampled, args=(out, samples, ended), daemon=True)
    thread.start()
    summary = caption.run(
        Config(
            shards=(shards,), out=out, model=MODEL, engine=path_of(step_ms), prompts=("dam-default",),
            images_per_file=IMAGES_PER_FILE, num_captioners=num_raylets, num_extractors=num_raylets,
        )
    )  # fmt: skip
    ended.set()
    thread.join()
    assert summary.exit_code == 0, summary
    steady = [s for s in samples if s.num_files]
    first, last = steady[0], next(s for s in steady if s.num_files == max(s.num_files for s in steady))
    regions = (last.num_files - first.num_files) * IMAGES_PER_FILE * summary.num_regions / summary.num_images
    ideal = num_raylets * REGIONS_PER_STEP * 1000 / step_ms
    rate = float(summary.session["regions_per_s"])
    used = {group: last.cpu_s[group] - first.cpu_s[group] for group in last.cpu_s}
    return {
        "raylets": num_raylets, "regions_per_s": rate, "ratio": rate / ideal, "measured_regions": round(regions),
        "ms_per_1000_regions": {g: round(1e6 * s / max(regions, 1), 1) for g, s in sorted(used.items())},
        "share_of_a_core": {g: round(s / (last.at - first.at), 3) for g, s in sorted(used.items())},
    }  # fmt: skip


def granted(folder: Path, num_raylets: int) -> dict[str, Any]:
    """Grants a second of one permit actor without limits, and the share of a core that it takes."""
    import ray

    limits, run = Limits(max_concurrent=10**6), "bench"
    actor = start_permits(
        "http://127.0.0.1:9/v1", limits, run=run, max_usd=None, state_uri=str(folder / "budget.json"), timeout_s=60,
        patience_s=60,
    )  # fmt: skip
    asking = ray.remote(_ask).options(num_cpus=0.5, scheduling_strategy="SPREAD")
    ray.get([asking.remote(actor, run, 0.1) for _ in range(num_raylets)])
    before, begun = cpu_by_group()["permits"], time.monotonic()
    counts = ray.get([asking.remote(actor, run, PERMIT_S) for _ in range(num_raylets)])
    wall_s = time.monotonic() - begun
    share = (cpu_by_group()["permits"] - before) / wall_s
    ray.kill(actor)
    return {"grants_per_s": round(sum(counts) / PERMIT_S, 1), "permits_share_of_a_core": round(share, 3)}


def _ask(actor: Any, run: str, seconds: float) -> int:
    async def one(deadline: float) -> int:
        count = 0
        while time.monotonic() < deadline:
            grant = await actor.acquire.remote(run, 100.0, 0.0)
            assert isinstance(grant, Grant)
            await actor.settle.remote([Settled(id=grant.id, ending="answered", tokens=100.0, usd=0.0)])
            count += 1
        return count

    async def all_of_them() -> int:
        deadline = time.monotonic() + seconds
        return sum(await asyncio.gather(*(one(deadline) for _ in range(PERMIT_CALLS_AT_ONCE))))

    return asyncio.run(all_of_them())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--raylets", type=lambda text: [int(n) for n in text.split(",")], default=[1, 2, 4, 8])
    parser.add_argument("--images-per-raylet", type=int, default=600)
    parser.add_argument("--step-ms", type=int, default=160)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    print(f"{os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}, 8 regions in {args.step_ms} ms a captioner")
    caption.BLOCK_BYTES = IMAGES_PER_BLOCK * 2 * 8 * 112 * 112  # two regions an image, eight channels
    for number in args.raylets:
        with tempfile.TemporaryDirectory(prefix="meddam-raylets-") as scratch, cluster(number):
            found = captioned(Path(scratch), number, args.images_per_raylet, args.step_ms)
            found |= granted(Path(scratch), number)
        if args.json:
            print(json.dumps(found), flush=True)
            continue
        print(
            f"{number} raylets: {found['regions_per_s']:.1f} regions/s, ratio {found['ratio']:.3f}; "
            f"{found['grants_per_s']:.0f} permits/s at {found['permits_share_of_a_core']:.2f} of a core"
        )
        for group, ms in found["ms_per_1000_regions"].items():
            print(f"    {group:<14} {ms:9.1f} ms a 1,000 regions, {found['share_of_a_core'][group]:.3f} of a core")


if __name__ == "__main__":
    main()
