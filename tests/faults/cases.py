"""Faults of processes, rows, memory, the clock and the store: each a function from a scene to what came of it."""

from __future__ import annotations

import shutil
import subprocess

from tests.faults.clock import jumping_clock
from tests.faults.faulty_s3 import Faults, faulty
from tests.faults.kill_and_resume import committed
from tests.faults.processes import title
from tests.faults.scene import POISONED_IMAGE, Case, Killer, Scene, Skipped, Told
from tests.faults.torch_engines import NOTES

HOUR_S = 3600


def _killed(scene: Scene, killer: Killer, out: str, what: str, max_starts: int = 1) -> Told:
    undisturbed_s = scene.undisturbed_s("disk")
    seconds = scene.to_the_end(scene.job("disk"), out, max_starts=max_starts, during=killer)
    assert killer.killed, f"no {killer.victim} was there to be killed"
    return Told(what=what, out=out, seconds=seconds, undisturbed_s=undisturbed_s)


def _extractor(scene: Scene) -> Told:
    out = f"{scene.root('disk')}/extractor"
    killer = Killer("extractor", lambda: True, at_work=True)
    return _killed(scene, killer, out, "kill -9 of the Ray worker that prepares images, with rows in hand")


def _captioner(scene: Scene) -> Told:
    out = f"{scene.root('disk')}/captioner"
    return _killed(scene, Killer("captioner", committed(out)), out, "kill -9 of the captioner, after a commit")


def _driver(scene: Scene) -> Told:
    out = f"{scene.root('disk')}/driver"
    killer = Killer("driver", committed(out))
    return _killed(scene, killer, out, "kill -9 of the driver, after a commit; run again", max_starts=2)


def _poison(scene: Scene) -> Told:
    out = f"{scene.root('disk')}/poison"
    undisturbed_s = scene.undisturbed_s("disk")
    job = scene.job("disk", engine="tests.faults.torch_engines:KillingTorch")
    return Told(
        what="an image whose captioning kills its process, each time", out=out, undisturbed_s=undisturbed_s,
        seconds=scene.to_the_end(job, out), failed={POISONED_IMAGE: "killed_process"},
    )  # fmt: skip


def _memory(scene: Scene) -> Told:
    out, notes = f"{scene.root('disk')}/memory", scene.folder / "notes"
    undisturbed_s = scene.undisturbed_s("disk")
    job = scene.job("disk", engine="tests.faults.torch_engines:HungryTorch")
    seconds = scene.to_the_end(job, out, env={NOTES: str(notes)})
    refused = [int(line) for line in notes.read_text().split()]
    assert max(refused) > 2, f"only the giant was refused memory: {refused}"
    return Told(
        what=f"memory refused to a captioner {len(refused)} times, for up to {max(refused)} regions; one never fits",
        out=out, undisturbed_s=undisturbed_s, seconds=seconds, failed={POISONED_IMAGE: "out_of_memory"},
    )  # fmt: skip


def _clock(scene: Scene) -> Told:
    """The wall clock of all the run's processes, Ray's too, is set an hour ahead, then an hour behind."""
    if shutil.which("cc") is None:
        raise Skipped("there is no C compiler to build a clock that can be set for some processes only")
    out = f"{scene.root('s3')}/clock"
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
    out = f"{scene.root('s3')}/{name}"
    undisturbed_s = scene.undisturbed_s("s3")
    with faulty(scene.s3_endpoint, faults) as server:

        def renewed(process: subprocess.Popen[bytes], start: int) -> None:
            faults.expired_after = faults.expired_after if start == 0 else None

        env = {"AWS_ENDPOINT_URL": server.url}
        seconds = scene.to_the_end(scene.job("s3"), out, env=env, max_starts=4, during=renewed)
    assert server.given[given] > 2, server.given
    what = f"{what}: {server.given[given]} of {server.given['requests']} requests"
    return Told(what=what, out=out, seconds=seconds, undisturbed_s=undisturbed_s)


def _throttled(scene: Scene) -> Told:
    faults = Faults(throttled=0.1, reset=0.02, seed=scene.rng.randrange(1 << 30))
    return _store(scene, "s3-503", faults, "throttled", "S3 answers 503, or closes connections")


def _slow(scene: Scene) -> Told:
    faults = Faults(slow=0.3, slow_s=0.1, seed=scene.rng.randrange(1 << 30))
    return _store(scene, "s3-slow", faults, "slow", "S3 sends bodies in drips")


def _cut(scene: Scene) -> Told:
    faults = Faults(cut=0.15, seed=scene.rng.randrange(1 << 30))
    return _store(scene, "s3-cut", faults, "cut", "S3 ends bodies in the middle")


def _expired(scene: Scene) -> Told:
    faults = Faults(expired_after=60, seed=scene.rng.randrange(1 << 30))
    return _store(
        scene, "s3-expired", faults, "expired", "credentials expire in mid-run, are renewed, and it is run again"
    )


CASES = (
    Case(name="extractor", run=_extractor),
    Case(name="captioner", run=_captioner),
    Case(name="driver", run=_driver),
    Case(name="poison", run=_poison),
    Case(name="memory", run=_memory, short=True),
    Case(name="clock", run=_clock, short=True),
    Case(name="s3-503", run=_throttled),
    Case(name="s3-slow", run=_slow),
    Case(name="s3-cut", run=_cut),
    Case(name="s3-expired", run=_expired),
)
