"""Judge the captions of a run: does each caption bear out what is known about its region?

    meddam judge s3://bucket/runs/one --questions s3://bucket/questions
    meddam judge s3://bucket/runs/one --questions s3://bucket/questions --judge llm --model llama-3.1-8b \\
        --base-url http://judge:8000/v1 --retention inside --requests-per-min 600

Run the same command again after any failure, or with more --max-usd: it goes on where it stopped. Exit codes: see
ray_jobs.summary. What is written: ray_jobs.judging_directory.

Invariants:
- one-to-one over captions, partitioned like the caption files; each verdict file has a name of its own and appears
  whole, so that a second driver, or a second attempt of an actor, writes the same file again;
- nothing is paid for twice but calls that were in flight when a process was killed;
- the driver holds ids and counts, never captions.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from meddam_core import storage
from meddam_core.judging.protocol import Unscored
from ray_jobs.fingerprint import differences
from ray_jobs.judge_actor import JudgeCaptions
from ray_jobs.judge_config import Config
from ray_jobs.judge_estimate import Estimate, estimate
from ray_jobs.judge_plan import Plan, Slice, make_plan, write_controls
from ray_jobs.judge_summary import Summary, finish, now
from ray_jobs.judging_directory import JUDGE, RUN_SET
from ray_jobs.lease import Lease, give_way
from ray_jobs.module_command import run_as
from ray_jobs.permits import end_permits, start_permits
from ray_jobs.question_files import open_questions
from ray_jobs.run_directory import SUMMARY, RunDirectory
from ray_jobs.session import session

logger = logging.getLogger(__name__)
LOG_EVERY_S = 10.0
CALLS_PER_ACTOR = 4
"""Verdict files that an actor works on at once, so that the end of one does not leave the endpoint idle."""


def run(cfg: Config) -> Summary | Estimate:
    """Judges what is not judged yet, and scores it.

    Raises ValueError for what cannot work, before the first call; LeaseHeld where another driver is at it.
    """
    plan = make_plan(cfg, RunDirectory(cfg.run), open_questions(cfg.questions))
    if cfg.dry_run:
        return estimate(plan)
    earlier = plan.judging.read_json(SUMMARY)
    if earlier is not None and earlier["state"] == "complete" and not cfg.retry_unscored:
        _check_same(plan)
        return Summary.model_validate(earlier)
    storage.check_writable(plan.judging.at())
    with Lease(plan.judging.at(), on_lost=give_way):
        _begin(plan)
        with session(cfg.num_cpus):
            return _judge(plan)


def _begin(plan: Plan) -> None:
    """judge.json and the controls, where this is a new judging."""
    if plan.judging.read_json(JUDGE) is None:
        write_controls(plan)
        plan.judging.write_json(
            {
                "judge": plan.judge, "questions": {"uri": plan.questions.uri, "digest": plan.questions.digest},
                "generation": plan.generation, "fingerprint": plan.fingerprint,
                "config": plan.cfg.model_dump(mode="json"), "begun_at": now(),
            },
            JUDGE,
        )  # fmt: skip
    _check_same(plan)
    if plan.cfg.retry_unscored:
        _forget_unscored(plan)


def _check_same(plan: Plan) -> None:
    described = plan.judging.read_json(JUDGE)
    then = described["fingerprint"] if described is not None else {}
    if changed := differences(then, plan.fingerprint):
        listed = "\n".join(f"  {c}" for c in changed)
        raise ValueError(f"{plan.judging.at()} is another judging:\n{listed}\nGive another --name, or none.")


def _forget_unscored(plan: Plan) -> None:
    """Removes the summary, the ledger, and the verdict files with questions that a judge did not decide."""
    storage.delete(plan.judging.at(SUMMARY))
    for info in storage.list_files(plan.judging.at("ledger"), recursive=True):
        plan.judging.run.filesystem.delete_file(info.path)
    for of in (RUN_SET, *plan.cfg.extra_sets):
        open_files = {
            uri for uri in plan.judging.verdict_files(of)
            for row in plan.judging.rows_of(uri)
            if any(v.reason not in (None, Unscored.NO_CAPTION) for v in row.verdicts)
        }  # fmt: skip
        for uri in open_files:
            storage.delete(uri)


def _judge(plan: Plan) -> Summary:
    started = time.monotonic()
    cfg, name = plan.cfg, plan.judging.at()
    slices = plan.slices()
    done = {uri for of in (RUN_SET, *cfg.extra_sets) for uri in plan.judging.verdict_files(of)}
    left = [s for s in slices if s.out not in done]
    actors: dict[str, Any] = {}
    urls = sorted({e.base_url for e in cfg.endpoints})
    for i, url in enumerate(urls):
        actors[url] = start_permits(
            url, cfg.limits, run=name, max_usd=None if cfg.max_usd is None else cfg.max_usd / len(urls),
            state_uri=plan.judging.at(f"budget-{i}.json"), timeout_s=cfg.timeout_s, patience_s=cfg.patience_s,
        )  # fmt: skip
    try:
        stopped, counts = _run(plan, left, actors) if left else (None, Counter())
    finally:
        totals = [t for actor in actors.values() if (t := end_permits(actor, name))]
    return finish(plan, slices, stopped, counts, totals, time.monotonic() - started)


def _run(plan: Plan, slices: list[Slice], actors: dict[str, Any]) -> tuple[str | None, Counter[str]]:
    """Judges the slices. Returns why it was stopped, or None, and counts."""
    import ray

    cfg = plan.cfg
    cpus = ray.cluster_resources().get("CPU", 1.0)
    paid = cfg.judge != "lexical"
    num = cfg.num_judges or (1 if paid else max(1, int(cpus) - 1))
    ray.data.DataContext.get_current().checkpoint_config = None  # the names of the files say what is done
    jobs = ray.data.from_items([asdict(s) for s in slices], override_num_blocks=len(slices))
    verdicts = jobs.map_batches(  # 1:1  a slice of a caption file -> its verdict file; calls wait, they take no CPU
        JudgeCaptions, fn_constructor_args=(cfg, plan.questions, actors, plan.judging.at()), batch_size=1,
        batch_format="pyarrow", num_cpus=0.25 if paid else 1, compute=ray.data.ActorPoolStrategy(
            size=min(num, len(slices)), max_concurrent_calls_per_actor=CALLS_PER_ACTOR if paid else 1,
            max_tasks_in_flight_per_actor=2 * CALLS_PER_ACTOR if paid else 2,
        ),
    )  # fmt: skip
    total: Counter[str] = Counter()
    stopped: str | None = None
    with _progress(actors, plan.judging.at(), sum(s.num for s in slices), total):
        for row in verdicts.iter_rows():
            stopped = stopped or row["stopped"]
            total.update(json.loads(row["counts"]))
    return stopped, total


@contextmanager
def _progress(actors: dict[str, Any], name: str, num_captions: int, done: Counter[str]) -> Iterator[None]:
    """A line in the log every few seconds while the block runs: verdict files come late, calls all the time."""
    import ray

    stop = threading.Event()

    def show() -> None:
        while not stop.wait(LOG_EVERY_S):
            parts = [f"{done['captions']:,}/{num_captions:,} captions"]
            for actor in actors.values():
                now = ray.get(actor.totals.remote(name))
                parts.append(f"{now['num_answered']:,} answers, {now['num_running']} calls running")
                parts += [f"{now['spent_usd']:.2f} dollars"] if now["spent_usd"] else []
                parts += [f"{now['num_limited']:,} rate-limited"] if now["num_limited"] else []
                parts += [f"{now['num_failed']:,} failed"] if now["num_failed"] else []
                parts += ["the endpoint seems to be down"] if now["outage"] else []
            logger.info(" · ".join(parts))

    thread = threading.Thread(target=show, name="judge-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(timeout=LOG_EVERY_S)


if __name__ == "__main__":  # the same options as `meddam judge`
    run_as("judge")
