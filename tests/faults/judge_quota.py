"""Judge a run against a server that enforces a quota and misbehaves, and kill the job on the way.

    python -m tests.faults.judge_quota --requests-per-min 600 --seconds 75
    python -m tests.faults.judge_quota --tokens-per-min 120000 --seconds 75
    python -m tests.faults.judge_quota --kills 3

Everything is real: `meddam judge` on Ray, in a process of its own, and an HTTP server. It fails unless
- no minute held more than the quota, and a minute of steady work at least 97 % of it (without kills);
- every caption has exactly one row and every question exactly one verdict, after any number of kills;
- the calls paid more than once are at most those in flight at the kills.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from meddam_core.records import EncodedImage, Image, Label, Region, Rescale, Window, image_id, region_id
from meddam_core.shards import write_shard
from ray_jobs import captions_import, qa
from ray_jobs.judging_directory import Judging, list_judgings
from ray_jobs.question_files import open_questions
from ray_jobs.run_directory import RunDirectory
from tests.faults.processes import descendants, title
from tests.faults.quota_server import SHARES, Quota, QuotaServer, Seen, busiest_minute, paid_more_than_once

MAX_CONCURRENT = 64


@dataclass(frozen=True, slots=True)
class Made:
    """A run and its question table."""

    run: str
    questions: str
    num_questions: int


def make_run(folder: Path, num_images: int, captions_per_region: str = "A sharp nodule, number {}.") -> Made:
    """Labelled shards without pixels, captions of their own for each region, and questions about them."""
    write_shard(str(folder / "set/shards/shard-000000.parquet"), (_image(row) for row in range(num_images)))
    lines = [
        f"{region_id(image_id(0, row), i)},{captions_per_region.format(f'{row}.{i}')!r}".replace("'", '"')
        for row in range(num_images)
        for i in (0, 1)
    ]
    (folder / "captions.csv").write_text("region_id,text\n" + "\n".join(lines) + "\n")
    captions_import.run(
        captions_import.Config(
            table=str(folder / "captions.csv"), shards=(str(folder / "set"),), out=str(folder / "run"), model="made"
        )
    )
    cfg = qa.Config(shards=(str(folder / "set"),), out=str(folder / "questions"), num_cpus=1)
    return Made(str(folder / "run"), cfg.out, qa.run(cfg).num_questions)


def _image(row: int) -> Image:
    ident = image_id(0, row)
    labels = [Label(name="margin", value="5", trust=1.0), Label(name="spiculation", value="1", trust=1.0),
              Label(name="texture", value="5", trust=1.0), Label(name="lobulation", value="1", trust=1.0)]  # fmt: skip
    return Image(
        image_id=ident, image_key=f"key-{ident}", patient_key=f"patient-{row % 50}", dataset="lidc-idri",
        recipe="lidc-idri", modality="CT", image=EncodedImage(bytes=b"none"), preview=EncodedImage(bytes=b""),
        width=512, height=512, rescale=Rescale(), window=Window(center=-600, width=1500), licence="CC BY 3.0", regions=[
            Region(region_id=region_id(ident, i), box=(200 * i, 10, 200 * i + 20, 30), labels=labels) for i in (0, 1)
        ],
    )  # fmt: skip


def start(made: Made, server: QuotaServer, log: Path, *options: str) -> subprocess.Popen[bytes]:
    """`meddam judge` in a process group of its own; its output goes to `log`."""
    quota = server.quota
    command = [
        sys.executable, "-m", "ray_jobs.cli", "judge", made.run, "--questions", made.questions, "--judge", "llm",
        "--model", "m", "--base-url", server.url, "--retention", "inside", "--control", "none", "--num-cpus", "2",
        "--max-concurrent", str(MAX_CONCURRENT), "--timeout-s", "8", "--captions-per-file", "40", *options,
    ]  # fmt: skip
    for name, value in (("requests", quota.requests_per_min), ("tokens", quota.tokens_per_min)):
        command += [f"--{name}-per-min", f"{value:g}"] if value is not None else []
    with log.open("ab") as stream:
        return subprocess.Popen(command, stdout=stream, stderr=stream, env=os.environ | {"RAY_AUTH_MODE": "disabled"},
                                start_new_session=True)  # fmt: skip


def end(process: subprocess.Popen[bytes], victim: str) -> None:
    """kill -9 of the driver and of everything it started (machine), of the driver, or of the actor that calls."""
    below = descendants(process.pid)
    pids = [process.pid, *below] if victim == "machine" else [process.pid]
    if victim == "actor":
        pids = [pid for pid in below if "JudgeCaptions" in title(pid)]
        assert pids, "no actor is at work"
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    if victim != "actor":
        process.wait()


def check(made: Made) -> tuple[Judging, Counter[str]]:
    """Every caption one row, every question one verdict. Returns the judging and counts of its outcomes."""
    (judging,) = list_judgings(RunDirectory(made.run))
    assert judging.complete, judging.read_json("summary.json")
    rows = list(judging.rows())
    keys = Counter((r.region_id, r.caption_key) for r in rows)
    assert set(keys.values()) == {1}, "a caption was judged twice"
    verdicts = Counter(v.question_id for r in rows for v in r.verdicts)
    expected = {q.question_id for q in open_questions(made.questions).all()}
    assert set(verdicts) == expected, f"{len(expected - set(verdicts))} verdicts are missing"
    assert set(verdicts.values()) == {1}, "a question was judged twice"
    return judging, Counter(v.outcome if v.reason is None else str(v.reason) for r in rows for v in r.verdicts)


def steady_share(seen: list[Seen], server: QuotaServer) -> tuple[float, float]:
    """(share of the quota used in the best whole minute, and in the first minute) of arrivals."""
    tokens = server.quota.tokens_per_min is not None
    limit = (server.quota.tokens_per_min if tokens else server.quota.requests_per_min) or 1.0
    first = [s for s in seen if s.at < seen[0].at + 60.0]
    in_first = sum(s.tokens for s in first) if tokens else len(first)
    return busiest_minute(seen, "tokens" if tokens else "requests") / limit, in_first / limit


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests-per-min", type=float)
    parser.add_argument("--tokens-per-min", type=float)
    parser.add_argument("--seconds", type=float, default=75, help="of work, about")
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--victim", choices=("machine", "driver", "actor"), default="machine")
    parser.add_argument("--no-faults", action="store_true")
    args = parser.parse_args(argv)
    if args.requests_per_min is None and args.tokens_per_min is None:
        args.requests_per_min = 600
    rate = args.requests_per_min or args.tokens_per_min / 340
    rng = random.Random(args.seed)
    spell = None if args.no_faults else (8.0, 12.0)
    quota = Quota(args.requests_per_min, args.tokens_per_min, shares={} if args.no_faults else SHARES,
                  limited_spell_s=spell, seed=args.seed)  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="meddam-judge-") as scratch, QuotaServer(quota) as server:
        folder = Path(scratch)
        made = make_run(folder, max(4, round(rate / 60 * args.seconds / 10)))
        print(f"{made.num_questions} questions", flush=True)
        in_flight = _to_the_end(made, server, folder / "log", args.kills, rng, args.victim)
        judging, outcomes = check(made)
        seen = sorted(server.seen, key=lambda s: s.at)
        return _report(judging, outcomes, seen, server, in_flight, args.kills)


def _to_the_end(made: Made, server: QuotaServer, log: Path, kills: int, rng: random.Random, victim: str) -> list[int]:
    """Runs the job through its kills to its end; the calls in flight at each, as the server saw them."""
    in_flight: list[int] = []
    while True:
        process, before = start(made, server, log), len(server.seen)
        moment = rng.uniform(4.0, 12.0)
        while process.poll() is None:
            time.sleep(0.02)
            began = server.seen[before].at if len(server.seen) > before else None
            if len(in_flight) < kills and began is not None and time.monotonic() - began > moment:
                end(process, victim)
                in_flight.append(sum(s.answered is None and s.outcome in ("ok", "lie", "prose", "letter", "empty")
                                     for s in list(server.seen)))  # fmt: skip
                before = len(
                    server.seen
                )  # an actor is started again by Ray: the next moment counts from its first call
                print(f"killed after {moment:.1f} s of work, {in_flight[-1]} calls unanswered", flush=True)
        if process.returncode == 0:
            return in_flight
        assert process.returncode in (-9, 3), f"exit code {process.returncode}\n{log.read_text()[-3000:]}"


def _report(
    judging: Judging, outcomes: Counter[str], seen: list[Seen], server: QuotaServer, in_flight: list[int], kills: int
) -> int:
    best, first = steady_share(seen, server)
    over = sum(s.outcome == "over" for s in seen)
    twice = paid_more_than_once(seen)
    calls = (judging.read_json("summary.json") or {})["calls"]
    print(f"server: {dict(Counter(s.outcome for s in seen))}")
    print(f"verdicts: {dict(outcomes)}, each exactly once")
    print(f"quota used: {best:.1%} in the busiest minute, {first:.1%} in the first; {over} requests over it")
    print(f"paid more than once: {twice}; unanswered at the kills: {sum(in_flight)}, bound {kills * MAX_CONCURRENT}; "
          f"counted by the job: at most {calls['num_lost']:.0f}")  # fmt: skip
    good = over == 0 and best <= 1.0 and twice <= calls["num_lost"] + sum(in_flight) and twice <= kills * MAX_CONCURRENT
    if not kills:
        good = good and best >= 0.97
    print("as it should be" if good else "NOT as it should be")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
