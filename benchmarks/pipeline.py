"""What the caption job itself costs, around a captioner that only waits.

    python -m benchmarks.pipeline                    the whole job's rate against that captioner's own, in one run
    python -m benchmarks.pipeline --memory           peak memory at one size and at ten times that size

The captioner takes 40 ms for 8 regions and no CPU, as a GPU does. In front of it stands the real work: 1024-pixel
16-bit images read from Parquet, decoded from PNG, windowed, cropped. Both ratios belong in LOG.md.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

from benchmarks.waiting_engine import REGIONS_PER_STEP, STEP_S
from meddam_core.imaging.png import encode_png, preview_jpeg
from meddam_core.records import EncodedImage, Image, Region, Rescale, Window, image_id, region_id
from meddam_core.shards import write_shard
from ray_jobs.caption import run
from ray_jobs.caption_config import Config
from ray_jobs.session import session

SIDE_PX = 1024
REGIONS_PER_IMAGE = 8
IMAGES_PER_SHARD = 100
NUM_PICTURES = 8
MODEL_SIDE_PX = 384
"""Views as large as DAM-3B's, so that as many bytes move between the actors."""


def make_films(root: str, num_images: int) -> str:
    """Shards of 16-bit films. A few pictures are reused: their content is nothing to the pipeline."""
    rng = np.random.default_rng(0)
    pictures = []
    for _ in range(NUM_PICTURES):
        coarse = rng.integers(0, 4096, (SIDE_PX // 16, SIDE_PX // 16)).astype(np.float32)
        smooth = np.kron(coarse, np.ones((16, 16), np.float32)) + rng.normal(0, 8, (SIDE_PX, SIDE_PX))
        stored = np.clip(smooth, 0, 4095).astype(np.uint16)
        pictures.append((encode_png(stored), preview_jpeg(np.repeat((stored >> 4).astype(np.uint8)[..., None], 3, 2))))
    for shard in range((num_images + IMAGES_PER_SHARD - 1) // IMAGES_PER_SHARD):
        rows = range(min(IMAGES_PER_SHARD, num_images - shard * IMAGES_PER_SHARD))
        films = (_film(shard, row, pictures[row % NUM_PICTURES]) for row in rows)
        write_shard(f"{root}/shards/shard-{shard:06d}.parquet", films)
    return root


def _film(shard: int, row: int, picture: tuple[bytes, bytes]) -> Image:
    ident = image_id(shard, row)
    boxes = [(60 + 110 * i, 80 + 90 * i, 200 + 110 * i, 230 + 90 * i) for i in range(REGIONS_PER_IMAGE)]
    return Image(
        image_id=ident, image_key=str(ident), dataset="films", recipe="chest-film", modality="DX",
        image=EncodedImage(bytes=picture[0]), preview=EncodedImage(bytes=picture[1]), width=SIDE_PX, height=SIDE_PX,
        stored_bits=12, photometric="MONOCHROME2", rescale=Rescale(), window=Window(center=2048, width=4096),
        regions=[Region(region_id=region_id(ident, i), box=box) for i, box in enumerate(boxes)],
    )  # fmt: skip


def job(shards: str, out: str, model: str) -> float:
    """Captions the shards and returns regions/s from the captioner's start to its last caption, after warm-up."""
    summary = run(
        Config(
            shards=(shards,), out=out, model=model, engine="benchmarks.waiting_engine:WaitingEngine",
            prompts=("dam-default",), images_per_file=200,
        )
    )  # fmt: skip
    assert summary.exit_code == 0, summary
    print("  " + summary.lines()[-1])
    return float(summary.session["regions_per_s"])


def throughput(root: str, num_images: int) -> None:
    ideal = REGIONS_PER_STEP / STEP_S
    shards = make_films(f"{root}/films", num_images)
    with session():
        rate = job(shards, f"{root}/run", _model(root))
    print(f"pipeline {rate:.1f} regions/s, captioner alone {ideal:.1f} regions/s: ratio {rate / ideal:.3f}")


def memory(root: str, num_images: int) -> None:
    """Peak of PSS (which counts shared pages once) of the job and all its processes, at two sizes."""
    peaks = []
    for size in (num_images, 10 * num_images):
        make_films(f"{root}/films-{size}", size)
        command = [sys.executable, "-m", "benchmarks.pipeline", "--one", f"{root}/films-{size}", _model(root)]
        process = subprocess.Popen(command)
        peak = [0]
        watcher = threading.Thread(target=_watch, args=(process.pid, peak), daemon=True)
        watcher.start()
        assert process.wait() == 0
        peaks.append(peak[0] / 2**20)
        print(f"{size} images: peak {peaks[-1]:.0f} MiB")
    print(f"ten times the images, {peaks[1] / peaks[0]:.3f} times the peak memory")


def _watch(pid: int, peak: list[int]) -> None:
    from tests.faults.processes import descendants

    while Path(f"/proc/{pid}").exists():
        peak[0] = max(peak[0], sum(_pss_bytes(p) for p in [pid, *descendants(pid)]))
        time.sleep(0.3)


def _pss_bytes(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)


def _model(root: str) -> str:
    """A checkpoint folder with DAM-3B's view size; the waiting captioner never loads its weights."""
    import json
    import shutil

    source = Path(__file__).parents[1] / "tests/data/oracle/dam_tiny/checkpoint"
    target = Path(root) / "model"
    if not target.exists():
        shutil.copytree(source, target)
        for name in ("vision_tower/config", "vision_tower/preprocessor_config", "context_provider/config"):
            path = target / f"{name}.json"
            config = json.loads(path.read_text())
            if "image_size" in config:
                config["image_size"] = MODEL_SIDE_PX
            if "size" in config:
                config["size"] = {"height": MODEL_SIDE_PX, "width": MODEL_SIDE_PX}
            path.write_text(json.dumps(config))
    return str(target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1200)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--one", nargs=2, metavar=("SHARDS", "MODEL"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        with tempfile.TemporaryDirectory() as out, session(object_store_bytes=1_500_000_000):
            job(args.one[0], f"{out}/run", args.one[1])
        return
    with tempfile.TemporaryDirectory() as root:
        print(f"{os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}")
        (memory if args.memory else throughput)(root, args.images)


if __name__ == "__main__":
    main()
