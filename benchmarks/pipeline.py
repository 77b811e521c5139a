"""What the caption job itself costs, around a captioner that only waits.

    python -m benchmarks.pipeline                         the whole job's rate against that captioner's own, in one run
    python -m benchmarks.pipeline --steps-ms 40,80,160    the same for slower captioners too, one after the other
    python -m benchmarks.pipeline --uneven                one film in forty is 6,000 pixels wide
    python -m benchmarks.pipeline --memory                peak memory at 400 films and at ten times as many

The captioner takes 40 ms for 8 regions and no CPU, as a GPU does. In front of it stands the real work: 1024-pixel
16-bit images read from Parquet, decoded from PNG, windowed, cropped. Ratios belong in LOG.md. For --memory the smaller
set must be larger than the object store already, or filling it is what is measured; 400 films are 1.9 GB of views and
the store has 1.5.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.waiting_engine import REGIONS_PER_STEP, path_of
from meddam_core.imaging.png import encode_png, preview_jpeg
from meddam_core.records import EncodedImage, Image, Region, Rescale, Window, image_id, region_id
from meddam_core.shards import write_shard
from ray_jobs.caption import run
from ray_jobs.caption_config import Config
from ray_jobs.session import session
from tests.faults.processes import PeakMemory

SIDE_PX = 1024
HUGE_PX = 6000
HUGE_EVERY = 40
REGIONS_PER_IMAGE = 8
IMAGES_PER_SHARD = 100
NUM_PICTURES = 8
MODEL_SIDE_PX = 384
"""Views as large as DAM-3B's, so that as many bytes move between the actors."""


Picture = tuple[bytes, bytes, int]
"""PNG, preview, and the side in pixels."""


def make_films(root: str, num_images: int, huge_every: int | None = None) -> str:
    """Shards of 16-bit films, every `huge_every`-th of them huge. A few pictures are used again and again."""
    rng = np.random.default_rng(0)
    pictures = [_picture(rng, SIDE_PX) for _ in range(NUM_PICTURES)]
    huge = _picture(rng, HUGE_PX) if huge_every else None
    for shard in range((num_images + IMAGES_PER_SHARD - 1) // IMAGES_PER_SHARD):
        rows = range(min(IMAGES_PER_SHARD, num_images - shard * IMAGES_PER_SHARD))
        films = (
            _film(shard, row, huge if huge and huge_every and row % huge_every == 7 else pictures[row % NUM_PICTURES])
            for row in rows
        )
        write_shard(f"{root}/shards/shard-{shard:06d}.parquet", films)
    return root


def _picture(rng: np.random.Generator, side: int) -> Picture:
    coarse = rng.integers(0, 4096, (-(-side // 16), -(-side // 16))).astype(np.float32)
    smooth = np.kron(coarse, np.ones((16, 16), np.float32))[:side, :side] + rng.normal(0, 8, (side, side))
    stored = np.clip(smooth, 0, 4095).astype(np.uint16)
    return encode_png(stored), preview_jpeg(np.repeat((stored >> 4).astype(np.uint8)[..., None], 3, 2)), side


def _film(shard: int, row: int, picture: Picture) -> Image:
    ident, side, scale = image_id(shard, row), picture[2], picture[2] / SIDE_PX
    places = [(60 + 110 * i, 80 + 90 * i, 200 + 110 * i, 230 + 90 * i) for i in range(REGIONS_PER_IMAGE)]
    boxes = [(int(a * scale), int(b * scale), int(c * scale), int(d * scale)) for a, b, c, d in places]
    return Image(
        image_id=ident, image_key=str(ident), dataset="films", recipe="chest-film", modality="DX",
        image=EncodedImage(bytes=picture[0]), preview=EncodedImage(bytes=picture[1]), width=side, height=side,
        stored_bits=12, photometric="MONOCHROME2", rescale=Rescale(), window=Window(center=2048, width=4096),
        regions=[Region(region_id=region_id(ident, i), box=box) for i, box in enumerate(boxes)],
    )  # fmt: skip


def job(shards: str, out: str, model: str, step_ms: int = 40) -> float:
    """Captions the shards and returns regions/s from the captioner's start to its last caption, after warm-up."""
    summary = run(
        Config(
            shards=(shards,), out=out, model=model, engine=path_of(step_ms),
            prompts=("dam-default",), images_per_file=200,
        )
    )  # fmt: skip
    assert summary.exit_code == 0, summary
    print("  " + summary.lines()[-1])
    return float(summary.session["regions_per_s"])


def throughput(root: str, num_images: int, steps_ms: list[int], huge_every: int | None) -> None:
    """The whole job's rate against the captioner's own, for each captioner in turn."""
    shards = make_films(f"{root}/films", num_images, huge_every)
    with session():
        for step_ms in steps_ms:
            ideal = 1000 * REGIONS_PER_STEP / step_ms
            rate = job(shards, f"{root}/run-{step_ms}", model_folder(root), step_ms)
            print(f"pipeline {rate:.1f} regions/s, captioner alone {ideal:.1f} regions/s: ratio {rate / ideal:.3f}")


def memory(root: str, num_images: int, store_mb: int) -> None:
    """Peak of PSS (which counts shared pages once) of the job and all its processes, at two sizes."""
    peaks = []
    for size in (num_images, 10 * num_images):
        make_films(f"{root}/films-{size}", size)
        command = [
            sys.executable, "-m", "benchmarks.pipeline", "--store-mb", str(store_mb),
            "--one", f"{root}/films-{size}", model_folder(root),
        ]  # fmt: skip
        process = subprocess.Popen(command)
        with PeakMemory(process.pid, every_s=0.3) as watched:
            assert process.wait() == 0
        peaks.append(watched.peak_mib)
        print(f"{size} images: peak {peaks[-1]:.0f} MiB")
    print(f"ten times the images, {peaks[1] / peaks[0]:.3f} times the peak memory")


def model_folder(root: str) -> str:
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
    parser.add_argument("--images", type=int, help="1200; 400 for --memory")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--store-mb", type=int, default=1500, help="the object store of --memory")
    parser.add_argument("--steps-ms", type=lambda text: [int(ms) for ms in text.split(",")], default=[40])
    parser.add_argument("--uneven", action="store_true")
    parser.add_argument("--one", nargs=2, metavar=("SHARDS", "MODEL"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        with tempfile.TemporaryDirectory() as out, session(object_store_bytes=args.store_mb * 10**6):
            job(args.one[0], f"{out}/run", args.one[1])
        return
    with tempfile.TemporaryDirectory() as root:
        print(f"{os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}")
        if args.memory:
            memory(root, args.images or 400, args.store_mb)
        else:
            throughput(root, args.images or 1200, args.steps_ms, HUGE_EVERY if args.uneven else None)


if __name__ == "__main__":
    main()
