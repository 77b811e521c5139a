"""Kill a caption job at random moments, run it again, and see that nothing is lost, doubled or changed.

    python -m tests.faults.kill_and_resume --times 20 --store s3 --seed 1
    python -m tests.faults.kill_and_resume --times 20 --store disk --victim driver

Each round captions the same shards into a new run directory. Up to four times its driver, a captioner or an extractor
is killed with SIGKILL, and the job is started again until it ends well. The round fails unless the audit is clean and
the captions equal those of an undisturbed run. Rounds go on until `--times` processes were killed. Everything is real:
`python -m ray_jobs.caption`, Ray, an S3 server.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import boto3
import pyarrow as pa
import pyarrow.parquet as pq

from meddam_core import storage
from ray_jobs.audit import Audit, audit
from ray_jobs.checkpoints import PENDING
from ray_jobs.run_directory import RunDirectory
from tests.faults.processes import Victim, kill, victims
from tests.ray_jobs.made_shards import make_shards

MODEL = str(Path(__file__).parents[1] / "data/oracle/dam_tiny/checkpoint")
VICTIMS: tuple[Victim, ...] = ("driver", "captioner", "extractor")
BUCKET = "s3://faults"
MAX_STARTS = 12
KILLS_A_ROUND = 4
ROUNDING = 1e-5


@dataclass(slots=True)
class Job:
    """How the shards are captioned, always the same way."""

    shards: str
    options: list[str] = field(default_factory=list)

    def start(self, out: str, log: Path, env: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
        """Starts the job as its own process, with `env` on top of this one's; its output goes to `log`."""
        command = [
            sys.executable, "-m", "ray_jobs.caption", self.shards, "--out", out, "--model", MODEL, "--prompt",
            "dam-default", "--max-new-tokens", "16", "--images-per-file", "10", "--images-per-batch", "4",
            "--num-cpus", "2", *self.options,
        ]  # fmt: skip
        whole = os.environ | {"RAY_AUTH_MODE": "disabled"} | dict(env or {})
        with log.open("ab") as stream:
            return subprocess.Popen(command, stdout=stream, stderr=stream, env=whole)


def committed(out: str) -> Callable[[], bool]:
    """Whether Ray has committed a part file of a first attempt: a later resume then filters by id."""
    folder = RunDirectory(out).checkpoint(1)
    return lambda: any(not i.path.endswith(PENDING) for i in storage.list_files(folder, ".parquet"))


def captions(out: str) -> pa.Table:
    """The published captions of a run, in a fixed order, without what differs between attempts."""
    files = RunDirectory(out).published()
    assert files is not None, f"{out} is not published"
    tables = [pq.read_table(path, filesystem=fs, partitioning=None) for fs, path in map(storage.open_uri, files)]
    return pa.concat_tables(tables).sort_by([("region_id", "ascending"), ("prompt_id", "ascending")])


def disturbed(job: Job, out: str, log: Path, rng: random.Random, kinds: tuple[Victim, ...], span_s: float) -> list[str]:
    """Runs the job to its end through up to KILLS_A_ROUND kills. Returns what was killed, and when.

    Raises AssertionError where the job does not end well.
    """
    story: list[str] = []
    for _ in range(MAX_STARTS):
        process = job.start(out, log)
        started = time.monotonic()
        moment, victim = rng.uniform(0.1, 0.6) * span_s, rng.choice(kinds)
        while process.poll() is None:
            alive = victims(process.pid, victim) if time.monotonic() - started > moment else []
            if alive and len(story) < KILLS_A_ROUND:
                kill(rng.choice(alive))
                story.append(f"{victim} after {time.monotonic() - started:.1f} s")
                moment, victim = time.monotonic() - started + rng.uniform(0.02, 0.2) * span_s, rng.choice(kinds)
            time.sleep(0.02)
        if process.returncode == 0:
            return story
        if process.returncode not in (-9, 4):
            raise AssertionError(f"exit code {process.returncode}, see {log}\n{log.read_text()[-3000:]}")
    raise AssertionError(f"no good end after {MAX_STARTS} starts, see {log}")


def check(out: str, undisturbed: pa.Table) -> Audit:
    """The audit of a run that was disturbed. Raises unless it is clean and its captions equal the others."""
    found = audit(RunDirectory(out))
    assert found.clean, found
    differing = differences(captions(out), undisturbed)
    assert not differing, f"of {undisturbed.num_rows} captions some differ from the undisturbed run's: {differing}"
    return found


def differences(found: pa.Table, undisturbed: pa.Table) -> dict[str, int]:
    """How many captions differ, by column; {} where all are equal. Which attempt made them does not count.

    Log-probabilities may differ by rounding: two threads of a CPU add up in an order that depends on the batch.
    """
    return {
        name: num
        for name in undisturbed.column_names
        if name != "attempt" and (num := _num_different(found[name], undisturbed[name]))
    }


def _num_different(found: pa.ChunkedArray, told: pa.ChunkedArray) -> int:
    if found.equals(told):
        return 0
    pairs = zip(found.to_pylist(), told.to_pylist(), strict=True)
    if pa.types.is_floating(told.type):
        return sum((a is None) != (b is None) or (a is not None and abs(a - b) > ROUNDING) for a, b in pairs)
    return sum(a != b for a, b in pairs)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=20, help="processes to kill in all")
    parser.add_argument("--store", choices=("s3", "disk"), default="s3")
    parser.add_argument("--victim", choices=VICTIMS, help="always the same kind; by default one at random each time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--images", type=int, default=60, help="images in each of two shards")
    parser.add_argument("--engine", default="torch")
    args = parser.parse_args(argv)
    rng = random.Random(args.seed)
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="meddam-faults-")))
        if args.store == "s3":
            s3_server(stack)
        root = BUCKET if args.store == "s3" else str(scratch)
        job = Job(make_shards(f"{root}/set", 2, args.images), ["--engine", args.engine])
        started = time.monotonic()
        assert job.start(f"{root}/undisturbed", scratch / "undisturbed.log").wait() == 0, (
            scratch / "undisturbed.log"
        ).read_text()[-3000:]
        span_s = time.monotonic() - started
        table = captions(f"{root}/undisturbed")
        print(f"undisturbed: {table.num_rows} captions in {span_s:.0f} s", flush=True)
        num_kills = number = 0
        while num_kills < args.times:
            kinds = (args.victim,) if args.victim else VICTIMS
            story = disturbed(job, f"{root}/run-{number}", scratch / f"{number}.log", rng, kinds, span_s)
            found = check(f"{root}/run-{number}", table)
            num_kills += len(story)
            number += 1
            print(f"round {number}: missing {found.num_missing}, twice {found.num_duplicated}; {', '.join(story)}",
                  flush=True)  # fmt: skip
    print(f"{num_kills} processes killed in {number} rounds, every round clean")
    return 0


def s3_server(stack: ExitStack) -> str:
    """Starts an S3 server with the bucket BUCKET, which this process and those below it then use. Returns its URL.

    It is a process of its own: in a thread of this one it would wait for all that is looked at here.
    """
    from ray_jobs import demo

    log = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="meddam-s3-"))) / "s3.log"
    os.environ |= stack.enter_context(demo.s3_server(log))
    boto3.client("s3").create_bucket(Bucket=BUCKET.removeprefix("s3://"))
    return os.environ["AWS_ENDPOINT_URL"]


if __name__ == "__main__":
    sys.exit(main())
