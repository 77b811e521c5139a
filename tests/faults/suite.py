"""The fault suite: every way a run is disturbed, each on a fresh run directory.

    python -m tests.faults.suite                                all cases once: minutes
    python -m tests.faults.suite --rounds 20                    twenty times in a row: hours
    python -m tests.faults.suite --rounds 20 --notes FILE       as many of them as FILE does not hold yet, for this code
    python -m tests.faults.suite --only memory,clock            some of them
    python -m tests.faults.suite --short                        a few that tell most

Cases run two at once (`--at-once`): a job alone leaves half a core idle, and one that starts beside makes it harder.

A line a case: what was done, the time it cost against the undisturbed run of the same place, what the audit
counts, and whether the captions equal the undisturbed run's. Ends with 1 if anything is missing, twice or different.
Everything is real: the job in a process of its own, Ray, an S3 server, more raylets, signals.
"""

from __future__ import annotations

import argparse
import functools
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path

import pyarrow.compute as pc

from ray_jobs.audit import audit
from ray_jobs.run_directory import RunDirectory
from tests.faults import cases, cluster_cases
from tests.faults.kill_and_resume import captions, differences, s3_server
from tests.faults.notes import RoundNotes, code_hash
from tests.faults.scene import Case, Scene, Skipped, Told

CASES = (*cluster_cases.CASES, *cases.CASES)  # those that take longest first
OF_THE_RUN = ["attempt", "engine"]
"""Columns that name the run rather than its captions: an engine with a fault has its own name."""


def verdict(scene: Scene, told: Told) -> tuple[bool, str]:
    """Whether a case's run is whole and right, and what to print of it."""
    found = audit(RunDirectory(told.out))
    counts = f"missing {found.num_missing}, twice {found.num_duplicated}, unexpected {found.num_unexpected}"
    table = captions(told.out)
    failed = table.filter(pc.equal(table["status"], "failed"))
    wrong = dict(zip(failed["image_id"].to_pylist(), failed["reason"].to_pylist(), strict=True))
    kept = pc.invert(pc.is_in(table["image_id"], value_set=failed["image_id"].combine_chunks()))
    calm = scene.undisturbed(told.out)
    if len(table) == len(calm):
        differing = differences(table.filter(kept).drop_columns(OF_THE_RUN), calm.filter(kept).drop_columns(OF_THE_RUN))
    else:
        differing = {"captions": abs(len(table) - len(calm))}
    counts += f", failed {len(failed)}" + (f" ({', '.join(sorted(set(wrong.values())))})" if wrong else "")
    counts += f", CAPTIONS DIFFER {differing}" if differing else ", captions equal"
    return found.clean and not differing and wrong == told.failed, counts


def run_case(case: Case, scene: Scene) -> bool:
    """Runs one case and prints its line. Returns whether all is well, or the case could not be staged."""
    try:
        told = case.run(scene)
        good, counts = verdict(scene, told)
    except Skipped as why:
        print(f"  {case.name:<11} skipped: {why}", flush=True)
        return True
    except (AssertionError, OSError, subprocess.SubprocessError) as error:
        print(f"  {case.name:<11} FAILED: {type(error).__name__}: {error}", flush=True)
        return False
    lost = f"{told.seconds - told.undisturbed_s:+.1f} s on {told.undisturbed_s:.1f} s"
    print(f"  {case.name:<11} {'clean' if good else 'UNCLEAN'}: {counts}; {lost}; {told.what}", flush=True)
    return good


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--only", type=lambda text: text.split(","), metavar="NAME,...", help="these cases")
    parser.add_argument("--short", action="store_true", help=", ".join(c.name for c in CASES if c.short))
    parser.add_argument("--list", action="store_true", help="the names of all cases")
    parser.add_argument("--images", type=int, default=30, help="images in each of two shards")
    parser.add_argument("--at-once", type=int, default=2, help="cases that run at the same time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--notes", type=Path, metavar="FILE", help="note rounds here; those noted are not run again")
    args = parser.parse_args(argv)
    names = [c.name for c in CASES]
    if args.list:
        print("\n".join(names))
        return 0
    if unknown := set(args.only or ()) - set(names):
        parser.error(f"no case {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    chosen = [c for c in CASES if c.name in (args.only or names) and (c.short or not args.short)]
    what = {"code": code_hash(), "seed": args.seed, "images": args.images, "cases": [c.name for c in chosen]}
    notes = RoundNotes(args.notes, what)
    noted, bad = notes.num_in_a_row, 0
    if noted:
        print(f"{noted} clean rounds of this code are noted in {args.notes}", flush=True)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mfs", ignore_cleanup_errors=True)))
        scene = Scene(folder=folder, s3_endpoint=s3_server(stack), seed=args.seed, num_images=args.images)
        scene.round = notes.num_rounds
        lanes = stack.enter_context(ThreadPoolExecutor(args.at_once))
        for number in range(noted, args.rounds):
            print(f"round {number + 1} of {args.rounds}, {len(chosen)} cases, load {os.getloadavg()[0]:.1f}",
                  flush=True)  # fmt: skip
            begun, began = time.monotonic(), datetime.now(UTC).isoformat(timespec="seconds")
            unclean = list(lanes.map(functools.partial(run_case, scene=scene), chosen)).count(False)
            notes.add(unclean, time.monotonic() - begun, began)
            print(f"  {time.monotonic() - begun:.0f} s", flush=True)
            bad += unclean
            scene.round += 1
    rounds = max(noted, args.rounds)
    print(f"{rounds * len(chosen)} faults in {rounds} rounds, {bad or 'none'} of them unclean")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
