"""Faults of processes, rows, memory, the clock and the store: each a function from a scene to what came of it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time

from benchmarks.pipeline import make_films, model_folder
from benchmarks.waiting_engine import path_of
from meddam_core import storage
from ray_jobs.checkpoints import PENDING
from ray_jobs.run_directory import RunDirectory
from tests.faults.clock import jumping_clock
from tests.faults.faulty_s3 import Faults, faulty
from tests.faults.full_disk import ENVIRONMENT, STORE_BYTES
from tests.faults.kill_and_resume import Job, committed
from tests.faults.processes import title
from tests.faults.scene import DEADLINE_S, POISONED_IMAGE, Case, Killer, Scene, Skipped, Told
from tests.faults.torch_engines import NOTES

HOUR_S = 3600
NUM_FILMS = 40
"""Their views are 190 MB."""


def _killed(scene: Scene, killer: Killer, out: str, what: str, max_starts: int = 1) -> Told:
    undisturbed_s = scene.undisturbed_s("disk")
    seconds = scene.to_the_end(scene.job("disk"), out, max_starts=max_starts, during=killer)
    assert killer.killed, f"no {killer.victim} was there to be killed"
    return Told(what=what, out=out, seconds=seconds, undisturbed_s=undisturbed_s)


def _extractor(scene: Scene) -> Told:
    out = scene.out("disk", "extractor")
    killer = Killer("extractor", lambda: True, at_work=True)
    return _killed(scene, killer, out, "kill -9 of the Ray worker that prepares images, with rows in hand")


def _captioner(scene: Scene) -> Told:
    out = scene.out("disk", "captioner")
    return _killed(scene, Killer("captioner", committed(out)), out, "kill -9 of the captioner, after a commit")


def _driver(scene: Scene) -> Told:
    out = scene.out("disk", "driver")
    killer = Killer("driver", committed(out))
    return _killed(scene, killer, out, "kill -9 of the driver, after a commit; run again", max_starts=2)


def _commit(scene: Scene) -> Told:
    """A rename on S3 is a copy and a delete: Ray alone would delete the data and count its ids as done."""
    out = scene.out("s3", "commit")
    undisturbed_s, killer = scene.undisturbed_s("s3"), Killer("driver", committed(out))

    def halve(process: subprocess.Popen[bytes], start: int) -> None:
        killer(process, start)
        if killer.killed and start == 0:
            process.wait()
            files = [info.path for info in storage.list_files(RunDirectory(out).checkpoint(1), ".parquet")]
            done = next((path for path in files if not path.endswith(PENDING)), None)
            assert done is not None, "the run was published before its driver could be killed"
            filesystem, _ = storage.open_uri(out)
            filesystem.copy_file(done, done.removesuffix(".parquet") + PENDING)

    seconds = scene.to_the_end(scene.job("s3"), out, max_starts=2, during=halve)
    assert killer.killed, "the driver was not killed"
    return Told(
        what="kill -9 of the driver between the two halves of a commit on S3; run again", out=out, seconds=seconds,
        undisturbed_s=undisturbed_s,
    )  # fmt: skip


def _rivals(scene: Scene) -> Told:
    """Without the lease they wrote 1,580 rows for 1,000 and both reported success."""
    out = scene.out("s3", "rivals")
    undisturbed_s, begun = scene.undisturbed_s("s3"), time.monotonic()
    rivals = [scene.job("s3").start(out, scene.log(out)) for _ in range(2)]
    try:
        codes = sorted(process.wait(DEADLINE_S) for process in rivals)
    finally:
        for process in rivals:
            process.kill()
    # the one that comes too late is turned away, or, where the other is done by then, finds a finished run
    assert codes in ([0, 5], [0, 0]), f"exit codes {codes}\n{scene.log(out).read_text()[-3000:]}"
    return Told(
        what=f"the same run started twice at once; exit codes {codes}", out=out, undisturbed_s=undisturbed_s,
        seconds=time.monotonic() - begun,
    )  # fmt: skip


def _poison(scene: Scene) -> Told:
    out = scene.out("disk", "poison")
    undisturbed_s = scene.undisturbed_s("disk")
    job = scene.job("disk", engine="tests.faults.torch_engines:KillingTorch")
    return Told(
        what="an image whose captioning kills its process, each time", out=out, undisturbed_s=undisturbed_s,
        seconds=scene.to_the_end(job, out), failed={POISONED_IMAGE: "killed_process"},
    )  # fmt: skip


def _memory(scene: Scene) -> Told:
    out, notes = scene.out("s3", "memory"), scene.folder / f"notes-{scene.round}"
    undisturbed_s = scene.undisturbed_s("s3")
    job = scene.job("s3", engine="tests.faults.torch_engines:HungryTorch")
    seconds = scene.to_the_end(job, out, env={NOTES: str(notes)})
    refused = [int(line) for line in notes.read_text().split()]
    assert max(refused) > 2, f"only the giant was refused memory: {refused}"
    return Told(
        what=f"memory refused to a captioner {len(refused)} times, for up to {max(refused)} regions; one never fits",
        out=out, undisturbed_s=undisturbed_s, seconds=seconds, failed={POISONED_IMAGE: "out_of_memory"},
    )  # fmt: skip


def _disk(scene: Scene) -> Told:
    """More views than the store can hold must pass through it, and none can be spilled."""
    films = scene.root("films")
    if not scene.is_noted("films"):
        make_films(films, NUM_FILMS)
        probe = [sys.executable, "-m", "tests.faults.full_disk"]
        assert subprocess.run(probe, env=os.environ | ENVIRONMENT, check=False).returncode == 0, "the disk is not full"
    job = Job(films, ["--engine", path_of(40), "--model", model_folder(films)])
    undisturbed_s, out = scene.undisturbed_s("films", job), scene.out("films", "disk")
    return Told(
        what=f"a disk with no room to spill to, and an object store of {STORE_BYTES // 10**6} MB", out=out,
        seconds=scene.to_the_end(job, out, env=ENVIRONMENT), undisturbed_s=undisturbed_s,
    )  # fmt: skip


def _clock(scene: Scene) -> Told:
    """The wall clock of all the run's processes, Ray's too, is set an hour ahead, then an hour behind."""
    if shutil.which("cc") is None:
        raise Skipped("there is no C compiler to build a clock that can be set for some processes only")
    out = scene.out("s3", "clock")
    undisturbed_s, is_begun, jumps = scene.undisturbed_s("s3"), committed(out), [0]
    with jumping_clock(scene.folder) as clock:

        def jump(process: subprocess.Popen[bytes], start: int) -> None:
            if len(jumps) == 1 and any("DescribeRegions" in title(pid) for pid in clock.followers(process.pid)):
                clock.set(HOUR_S)
                jumps.append(HOUR_S)
            elif len(jumps) == 2 and is_begun():
                clock.set(-HOUR_S)
                jumps.append(-HOUR_S)

        seconds = scene.to_the_end(scene.job("s3"), out, env=clock.environment, during=jump)
    assert len(jumps) == 3, f"the clock was set {len(jumps) - 1} times"
    return Told(
        what="the wall clock set an hour ahead, then an hour behind, under a run on S3 and its lease", out=out,
        seconds=seconds, undisturbed_s=undisturbed_s,
    )  # fmt: skip


def _store(scene: Scene, name: str, faults: Faults, given: str, what: str) -> Told:
    out = scene.out("s3", name)
    undisturbed_s = scene.undisturbed_s("s3")
    with faulty(scene.s3_endpoint, faults) as server:

        def renewed(process: subprocess.Popen[bytes], start: int) -> None:
            faults.expired_after = faults.expired_after if start == 0 else None

        env = {"AWS_ENDPOINT_URL": server.url}
        seconds = scene.to_the_end(scene.job("s3"), out, env=env, max_starts=4, during=renewed)
    assert server.given[given], f"the store did nothing of the kind: {server.given}"
    what = f"{what}: {server.given[given]} of {server.given['requests']} requests"
    return Told(what=what, out=out, seconds=seconds, undisturbed_s=undisturbed_s)


def _throttled(scene: Scene) -> Told:
    faults = Faults(throttled=0.1, reset=0.02, seed=scene.random("s3-503").randrange(1 << 30))
    return _store(scene, "s3-503", faults, "throttled", "S3 answers 503, or closes connections")


def _slow(scene: Scene) -> Told:
    faults = Faults(slow=0.3, slow_s=0.1, seed=scene.random("s3-slow").randrange(1 << 30))
    return _store(scene, "s3-slow", faults, "slow", "S3 sends bodies in drips")


def _cut(scene: Scene) -> Told:
    faults = Faults(cut=0.15, seed=scene.random("s3-cut").randrange(1 << 30))
    return _store(scene, "s3-cut", faults, "cut", "S3 ends bodies in the middle")


def _expired(scene: Scene) -> Told:
    faults = Faults(expired_after=60, seed=scene.random("s3-expired").randrange(1 << 30))
    return _store(
        scene, "s3-expired", faults, "expired", "credentials expire in mid-run, are renewed, and it is run again"
    )


CASES = (
    Case(name="extractor", run=_extractor),
    Case(name="captioner", run=_captioner),
    Case(name="driver", run=_driver),
    Case(name="commit", run=_commit),
    Case(name="rivals", run=_rivals),
    Case(name="poison", run=_poison),
    Case(name="memory", run=_memory, short=True),
    Case(name="disk", run=_disk),
    Case(name="clock", run=_clock, short=True),
    Case(name="s3-503", run=_throttled),
    Case(name="s3-slow", run=_slow),
    Case(name="s3-cut", run=_cut),
    Case(name="s3-expired", run=_expired),
)
