"""One long run of the small model that is killed again and again, with its figures.

    python -m tests.faults.long_run --regions 100000 --kills 5
    python -m tests.faults.long_run --regions 2000 --kills 2                    the same in small
    python -m tests.faults.long_run --regions 100000 --kills 0 --folder DIR   the same set, undisturbed

The pictures are phantoms, painted and ingested by `meddam ingest phantoms`. To save hours of painting they are used in
turn: each row has an id, a key and a study of its own, and 16 regions, the phantom's own and further boxes at random
places, so that nearly every region is another one. The captions are meddam-tiny's.

The driver dies by SIGKILL at a random moment of each of KILLS + 1 parts of the run, and the same command is started
again. Ends with 1 unless every caption is there exactly once.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

from meddam_core import storage
from meddam_core.models import default_model
from meddam_core.records import Image, Region, image_id, region_id
from meddam_core.shards import read_shard, write_shard
from ray_jobs.audit import audit
from ray_jobs.checkpoints import PENDING
from ray_jobs.progress import duration
from ray_jobs.run_directory import RunDirectory
from tests.faults.processes import PeakMemory, kill

REGIONS_PER_IMAGE = 16
IMAGES_PER_SHARD = 500
IMAGES_PER_FILE = 100
MIN_FILES = 20
"""So that a short run, too, has moments to be killed in."""
NUM_PHANTOMS = 120
SIDE_PX = 512
POLL_S = 0.1


@dataclass(slots=True)
class Life:
    """One driver, from its start to its end."""

    seconds: float = 0.0
    first_file_s: float | None = None
    """From its start to the first part file it committed."""
    killed_after: int | None = None
    """Part files of the run when it was killed."""
    lost_s: float = 0.0
    """From the last part file before its death to that death: work that is done again, at most."""


@dataclass(slots=True)
class Story:
    """What happened."""

    seconds: float
    peak_mib: float
    lives: list[Life] = field(default_factory=list)


def make_set(folder: Path, num_images: int) -> str:
    """Shards of `num_images` rows below `folder`, made from NUM_PHANTOMS phantoms."""
    painted = folder / "phantoms"
    command = ["ingest", "phantoms", "--count", str(NUM_PHANTOMS), "--size", str(SIDE_PX), "--out", str(painted)]
    subprocess.run([sys.executable, "-m", "ray_jobs.cli", *command], check=True, stdout=subprocess.DEVNULL)
    shards = storage.list_files(str(painted / "shards"), ".parquet")
    phantoms = [image for shard in shards for image in read_shard(shard.path)]
    for shard in range(-(-num_images // IMAGES_PER_SHARD)):
        rows = range(min(IMAGES_PER_SHARD, num_images - shard * IMAGES_PER_SHARD))
        made = (_row(phantoms[(shard * IMAGES_PER_SHARD + row) % len(phantoms)], shard, row) for row in rows)
        write_shard(str(folder / f"set/shards/shard-{shard:06d}.parquet"), made)
    return str(folder / "set")


def _row(phantom: Image, shard: int, row: int) -> Image:
    ident = image_id(shard, row)
    name = f"{phantom.image_key}-{ident}"
    own = [replace(region, region_id=region_id(ident, i)) for i, region in enumerate(phantom.regions)]
    regions = [*own, *_boxes(ident, len(own), phantom.width, phantom.height)][:REGIONS_PER_IMAGE]
    return replace(phantom, image_id=ident, image_key=name, patient_key=name, study_key=name, regions=regions)


def _boxes(ident: int, first: int, width: int, height: int) -> Iterator[Region]:
    rng = random.Random(ident)
    for ordinal in range(first, REGIONS_PER_IMAGE):
        w, h = rng.randint(24, width // 3), rng.randint(24, height // 3)
        x, y = rng.randint(0, width - w), rng.randint(0, height - h)
        yield Region(region_id=region_id(ident, ordinal), box=(x, y, x + w, y + h))


def run_through(command: list[str], out: str, num_files: int, kills: int, rng: random.Random, log: Path) -> Story:
    """Starts the job until it ends well; kills its driver on the way, `kills` times."""
    moments = [(k + rng.uniform(0.3, 0.9)) * num_files / (kills + 1) for k in range(kills)]
    begun, story = time.monotonic(), Story(0.0, 0.0)
    while True:
        life, started, before = Life(), time.monotonic(), _num_files(out)
        last, at = before, started
        with log.open("ab") as stream:
            process = subprocess.Popen(
                command, stdout=stream, stderr=stream, env=os.environ | {"RAY_AUTH_MODE": "disabled"}
            )
        with PeakMemory(process.pid) as memory:
            while process.poll() is None:
                if (files := _num_files(out)) > last:
                    last, at = files, time.monotonic()
                    life.first_file_s = life.first_file_s or at - started
                    if moments and files >= moments[0]:
                        time.sleep(rng.uniform(0, 2 * POLL_S))
                        moments.pop(0)
                        kill(process.pid)
                        life.killed_after, life.lost_s = files, time.monotonic() - at
                time.sleep(POLL_S)
        life.seconds = time.monotonic() - started
        story.lives.append(life)
        story.peak_mib = max(story.peak_mib, memory.peak_mib)
        if process.returncode == 0:
            story.seconds = time.monotonic() - begun
            return story
        if process.returncode not in (-9, 4):
            raise AssertionError(f"exit code {process.returncode}, see {log}\n{log.read_text()[-3000:]}")


def _num_files(out: str) -> int:
    """Part files that Ray has committed; what was committed before the checkpoint was cleared no longer counts."""
    infos = storage.list_files(RunDirectory(out).checkpoint(1), ".parquet")
    return sum(not info.path.endswith(PENDING) for info in infos)


def tell(story: Story, num_regions: int) -> None:
    """Prints what it took."""
    for number, life in enumerate(story.lives):
        first = "none" if life.first_file_s is None else f"{life.first_file_s:.0f} s"
        end = "to its end" if life.killed_after is None else f"killed after {life.killed_after} files"
        print(f"  driver {number + 1}: {duration(life.seconds)}, first file after {first}, {end}")
    deaths = len(story.lives) - 1
    lost_s = sum((life.first_file_s or 0.0) for life in story.lives[1:])
    print(
        f"{duration(story.seconds)} in all, {num_regions / story.seconds:.1f} regions/s, peak {story.peak_mib:.0f} MiB"
    )
    if deaths:
        print(f"time lost a kill, from the start of the next driver to its first file: {lost_s / deaths:.0f} s")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--regions", type=int, default=100_000)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-new-tokens", type=int, default=64, help="enough for every caption to come to its end")
    parser.add_argument("--num-captioners", type=int, default=2)
    parser.add_argument("--slots", type=int, default=256)
    parser.add_argument("--folder", type=Path, help="where the set lies already, or is made and kept")
    args = parser.parse_args(argv)
    num_images = -(-args.regions // REGIONS_PER_IMAGE)
    images_per_file = max(1, min(IMAGES_PER_FILE, num_images // MIN_FILES))
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="meddam-long-")))
        folder = args.folder or scratch
        if not (folder / "set").exists():
            begun = time.monotonic()
            make_set(folder, num_images)
            print(f"{num_images:,} rows made in {duration(time.monotonic() - begun)}", flush=True)
        out = str(scratch / "run")
        command = [
            sys.executable, "-m", "ray_jobs.caption", str(folder / "set"), "--out", out, "--model", default_model(),
            "--prompt", "dam-default", "--max-new-tokens", str(args.max_new_tokens), "--slots", str(args.slots),
            "--images-per-file", str(images_per_file), "--images-per-batch", "16",
            "--num-captioners", str(args.num_captioners),
        ]  # fmt: skip
        num_files = num_images // images_per_file
        story = run_through(command, out, num_files, args.kills, random.Random(args.seed), scratch / "log")
        found = audit(RunDirectory(out))
        tell(story, found.num_published)
        print(json.dumps({k: v for k, v in found.to_json().items() if k != "missing_regions"}))
    return 0 if found.clean and found.num_published == num_images * REGIONS_PER_IMAGE else 1


if __name__ == "__main__":
    sys.exit(main())
