"""Ten million image rows through snapshot, resume, audit and publish: seconds and peak memory of each.

    python -m benchmarks.scale --rows 10000000                 all stages; about 4 GB of disk below --folder
    python -m benchmarks.scale --rows 1000000 --stages resume audit
    python -m benchmarks.scale --rows 1000000 --stages publish --json

Rows are synthetic: 8 x 8 pixels, one region each, shards of 100,000 rows, part files and checkpoint files of 1,000
images as a caption job writes them. `resume` finds nine tenths of the rows done. Each stage runs in a process of its
own, whose peak resident memory is its figure; publish's is the driver's, Ray's workers come on top.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image as PilImage

from meddam_core.records import (
    REGION_BITS,
    ROW_BITS,
    CaptionedImage,
    EncodedImage,
    Image,
    Region,
    RegionCaption,
    arrow_schema,
    to_row,
)
from meddam_core.shards import shard_schema
from ray_jobs.audit import audit
from ray_jobs.checkpoints import committed_ids, repair
from ray_jobs.publish import flatten, publish
from ray_jobs.run_directory import MANIFEST, RUN, SUMMARY, RunDirectory
from ray_jobs.session import session
from ray_jobs.snapshot import snapshot

ROWS_A_SHARD, ROWS_A_PART = 100_000, 1_000
STAGES = ("snapshot", "resume", "publish", "audit")


def replicated(schema: pa.Schema, record: Any, ids: NDArray[np.int64]) -> pa.Table:
    """The record once for each image id, its regions' and captions' ids with it."""
    one = pa.Table.from_pylist([to_row(record)], schema=schema)
    table = one.take(pa.array(np.zeros(len(ids), np.int64)))
    offsets = pa.array(np.arange(len(ids) + 1, dtype=np.int32))
    columns = dict(zip(table.column_names, table.columns, strict=True)) | {"image_id": pa.array(ids)}
    for name in {"regions", "captions"} & set(schema.names):
        flat = table[name].combine_chunks().flatten()
        fields = [flat.field(i) for i in range(flat.type.num_fields)]
        fields[flat.type.get_field_index("region_id")] = pa.array(ids << REGION_BITS)
        kind = schema.field(name).type.value_type
        columns[name] = pa.ListArray.from_arrays(offsets, pa.StructArray.from_arrays(fields, fields=list(kind)))
    return pa.table([columns[n] for n in schema.names], schema=schema)


def make(folder: Path, rows: int) -> None:
    """Shards, and a run with nine tenths of its parts and checkpoint, and a whole generation of captions."""
    region = Region(region_id=0, box=(1, 1, 7, 7))
    sink = io.BytesIO()
    PilImage.fromarray(np.zeros((8, 8, 3), np.uint8)).save(sink, "PNG")
    shared: dict[str, Any] = {"dataset": "scale", "split": "all", "recipe": "generic", "modality": "XC"}
    picture = EncodedImage(bytes=sink.getvalue())
    image = Image(
        image_id=0, image_key="k", image=picture, preview=picture, width=8, height=8, regions=[region], **shared
    )
    caption = RegionCaption(region_id=0, prompt_id="p", text="a small grey square", num_tokens=5, finish_reason="stop")
    captioned = CaptionedImage(
        image_id=0, image_key="k", width=8, height=8, licence="CC0", egress="open", regions=[region],
        captions=[caption], **shared,
    )  # fmt: skip
    run = RunDirectory(str(folder / "run"))
    names = ("set/shards", "run/parts/attempt=1", "run/checkpoint/attempt=1", "run/captions/gen=1")
    shards, parts, checkpoint, generation = (folder / name for name in names)
    for place in (shards, parts, checkpoint, generation):
        place.mkdir(parents=True)
    files: list[dict[str, Any]] = []
    for shard in range(-(-rows // ROWS_A_SHARD)):
        ids = np.arange(min(ROWS_A_SHARD, rows - shard * ROWS_A_SHARD), dtype=np.int64) + (shard << ROW_BITS)
        table = replicated(shard_schema({}), image, ids)
        pq.write_table(table, shards / f"shard-{shard:06d}.parquet", row_group_size=10_000)
        part = replicated(arrow_schema(CaptionedImage), captioned, ids)
        flat = flatten(part)
        for start in range(0, len(ids), ROWS_A_PART):
            name, some = f"x_{len(files):06}", slice(start, start + ROWS_A_PART)
            if shard * ROWS_A_SHARD + start < 0.9 * rows:
                pq.write_table(part[some], parts / f"{name}-0.parquet")
                pq.write_table(pa.table({"image_id": ids[some]}), checkpoint / f"{name}.parquet")
            pq.write_table(flat[some], generation / f"captions-{len(files):06d}.parquet", compression="zstd")
            files.append({"name": f"captions-{len(files):06d}.parquet"})
    run.write_json({"fingerprint": {"prompts": {"p": "1"}, "num_samples": 1}}, RUN)
    run.write_json({"files": files}, "captions", "gen=1", MANIFEST)
    run.write_json({"generation": 1}, SUMMARY)
    run.write_inputs(snapshot([str(folder / "set")]))


def _snapshot(folder: Path) -> dict[str, Any]:
    shards = snapshot([str(folder / "set")])
    return {"shards": len(shards), "images": sum(s.num_images for s in shards)}


def _resume(folder: Path) -> dict[str, Any]:
    """What a driver does before it captions again: the snapshot compared, the checkpoint mended, what is left found."""
    run = RunDirectory(str(folder / "run"))
    shards = snapshot([str(folder / "set")])
    repair(run.checkpoint(1), run.parts(1))
    done = committed_ids(run.checkpoint(1))
    found = [np.searchsorted(done, s.last_id, "right") - np.searchsorted(done, s.first_id) for s in shards]
    left = [s for s, num in zip(shards, found, strict=True) if num < s.num_images]
    return {"done": len(done), "shards_left": len(left), "shards": len(shards)}


def _publish(folder: Path) -> dict[str, Any]:
    with session(num_cpus=2, object_store_bytes=300_000_000):
        made = publish(RunDirectory(str(folder / "run")))
    return {"files": len(made.files)}


def _audit(folder: Path) -> dict[str, Any]:
    found = audit(RunDirectory(str(folder / "run")))
    assert found.clean, found
    return {"captions": found.num_published}


WORK: dict[str, Callable[[Path], dict[str, Any]]] = {
    "snapshot": _snapshot, "resume": _resume, "publish": _publish, "audit": _audit,
}  # fmt: skip


def measure(stage: str, folder: Path) -> dict[str, Any]:
    """The stage in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.scale", "--only", stage, "--folder", str(folder)]
    found: dict[str, Any] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return found


def peak_mb() -> float:
    """Most memory that this process ever had resident; getrusage would give its parent's, from before exec."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) / 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--folder", type=Path, help="where rows are made, or lie already; by default a temporary one")
    parser.add_argument("--only", choices=STAGES, help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.only is not None:
        started = time.perf_counter()
        found = WORK[args.only](args.folder)
        print(json.dumps({"seconds": time.perf_counter() - started, "peak_mb": peak_mb(), **found}))
        return
    with tempfile.TemporaryDirectory(prefix="meddam-scale-") as scratch:
        folder = args.folder or Path(scratch)
        if not (folder / "run").exists():
            started = time.perf_counter()
            make(folder, args.rows)
            print(f"{args.rows:,} rows made in {time.perf_counter() - started:.0f} s", file=sys.stderr)
        for stage in args.stages:
            found = {"stage": stage, "rows": args.rows, **measure(stage, folder)}
            facts = ", ".join(f"{k} {v:,}" for k, v in found.items() if isinstance(v, int))
            line = f"{stage:10} {found['seconds']:8.1f} s {found['peak_mb']:8.0f} MB  {facts}"
            print(json.dumps(found) if args.json else line)


if __name__ == "__main__":
    main()
