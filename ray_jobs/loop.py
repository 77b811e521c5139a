"""Captions become data, and data a better model: caption, judge, curate, finetune, benchmark, round after round.

    meddam loop --config loop.yaml --out s3://lab/loops/one
    meddam loop --model /weights/DAM-3B --labelled s3://lab/known --labelled-caption s3://lab/sets/known \\
        --unlabelled s3://lab/rest --development s3://lab/dev --test s3://lab/locked --test-judge '{judge: llm, ...}' \\
        --arm curated --arm uncurated --out s3://lab/loops/one

    OUT/loop.json                    every round with its counts and scores
    OUT/report.html                  the curve over rounds, what was dropped, the test
    OUT/start/                       the first model, where it is trained here
    OUT/truth/                       the captions of labelled phantoms, made from their truth
    OUT/ARM/round-N/captions         what the model of the round before says of unlabelled regions, and its judging
    OUT/ARM/round-N/judged           the question table that those captions were judged by
    OUT/ARM/round-N/set              what curation chose, and what it dropped and why
    OUT/ARM/round-N/ft               the training and its model
    OUT/development, OUT/test        the benchmarks: runs, judgings, leaderboards

Run the same command again after anything: finished stages are left alone, half-done ones go on.

Invariants, each checked and not only meant:
- labelled and unlabelled, development and test shards share no picture; with development and test no patient either;
- nothing known about unlabelled regions decides anything (unless pool_labels says so);
- the test is read once: which models it reads is written down before, and no round can follow;
- the test is judged by another judge than the one that curated, with question wordings that are used nowhere else;
- arms are told apart by curation alone: they share the first model, seeds, steps, and the captions of round 1.
"""

from __future__ import annotations

import logging
import runpy
import sys
from datetime import UTC, datetime

from pydantic import BaseModel

from meddam_core import storage
from meddam_core.reports.loop_report import loop_report
from ray_jobs.fingerprint import differences
from ray_jobs.judges import judge_id
from ray_jobs.lease import Lease
from ray_jobs.loop_config import Arm, Config
from ray_jobs.loop_sets import check_apart
from ray_jobs.loop_stages import Stages, Unfinished
from ray_jobs.loop_state import LOOP, ArmState, LoopState, Reading, Round, Score, read_state
from ray_jobs.module_command import run_as
from ray_jobs.run_directory import RunDirectory
from ray_jobs.session import session
from ray_jobs.summary import EXIT_INCOMPLETE

logger = logging.getLogger(__name__)

REPORT = "report.html"
FREE = frozenset({"out", "max_rounds", "patience", "min_gain", "num_cpus", "weights"})
"""Settings that may change between sessions, as long as the test is locked."""
START = "start"
"""Name of the first model among the scores."""


class Summary(BaseModel):
    """How a loop stands."""

    out: str
    state: LoopState

    @property
    def exit_code(self) -> int:
        """0 when the test has been read."""
        return 0 if self.state.state == "complete" else EXIT_INCOMPLETE

    def lines(self) -> list[str]:
        """For a person."""
        state, text = self.state, []
        if state.why:
            text.append(f"{state.state}: {state.why}; run the same command again")
        if state.start is not None:
            text.append(f"development, first model          {_points(state.start)}")
        for arm in state.arms:
            for r in arm.done():
                kept = f"{r.num_kept:,} of {r.num_captions:,} captions kept" if r.captions else "no pseudo-labels"
                assert r.development is not None
                text.append(f"development, {arm.name}, round {r.number:<2}  {_points(r.development)}   {kept}")
        if state.test is not None:
            text += [f"test, {name:<28}  {_points(score)}" for name, score in state.test.scores.items()]
            text += [
                f"  {p.first} less {p.second}: {100 * p.difference.value:+.1f} (p {p.p:.3f})" for p in state.test.pairs
            ]
        return [*text, *state.remarks, f"report: {storage.join(self.out, REPORT)}"]


def run(cfg: Config) -> Summary:
    """Goes on until the test has been read.

    Raises ValueError for settings that cannot work, sets that are not apart, or a loop that was begun with others;
    LeaseHeld where another driver is at it.
    """
    directory = RunDirectory(cfg.out)
    storage.check_writable(directory.uri)
    with Lease(directory.uri):
        state = _open(cfg, directory)
        if state.state == "complete":
            _report(directory, state)
            return Summary(out=cfg.out, state=state)
        loop = _Loop(cfg, directory, state)
        try:
            with session(cfg.num_cpus):
                loop.go()
        except Unfinished as stopped:
            state.state, state.why = "incomplete", str(stopped)
        loop.note()
    return Summary(out=cfg.out, state=state)


def _open(cfg: Config, directory: RunDirectory) -> LoopState:
    """The state of this loop, new or begun. Raises ValueError where what was begun is another loop."""
    fingerprint = {k: v for k, v in cfg.model_dump(mode="json").items() if k not in FREE}
    state = read_state(directory)
    if state is None:
        sets = {n: getattr(cfg, n) for n in ("labelled", "unlabelled", "development", "test")}
        return LoopState(
            fingerprint=fingerprint, config=cfg.model_dump(mode="json"), num_images=check_apart(sets),
            judge=judge_id(cfg.pool_judging("run", "questions")), arms=[ArmState(name=a) for a in cfg.arms],
            remarks=_remarks(cfg),
        )  # fmt: skip
    if changed := differences(state.fingerprint, fingerprint):
        raise ValueError(f"{cfg.out} was begun with other settings: {'; '.join(changed)}. Use these, or another --out")
    rules = ("max_rounds", "patience", "min_gain")
    if state.test is not None and any(state.config[n] != getattr(cfg, n) for n in rules):
        raise ValueError(
            f"the test of {cfg.out} has been read: to go on with other rules would be to choose by it. Begin another "
            "loop, with another test set"
        )
    state.config, state.why = cfg.model_dump(mode="json"), None
    if state.state != "complete":
        state.state = "running"
    return state


def _remarks(cfg: Config) -> list[str]:
    found = []
    if cfg.same_judge and judge_id(cfg.pool_judging("run", "questions")) == judge_id(cfg.test_judging):
        found.append(
            "One judge both curated and read the test (--same-judge): captions may have been chosen to please it. Only "
            "the wording and the choice of the questions differ."
        )
    if cfg.pool_labels == "used":
        found.append("Labels of the unlabelled regions asked the questions that curation went by (pool_labels: used).")
    return found


class _Loop:
    """A loop at work."""

    def __init__(self, cfg: Config, directory: RunDirectory, state: LoopState) -> None:
        self.cfg, self.directory, self.state, self.stages = cfg, directory, state, Stages(cfg)

    def go(self) -> None:
        """Everything that is left to do."""
        state = self.state
        if state.test is None:
            state.start_model = self.stages.first_model()
            self.note()
            state.start = self._developed(START, state.start_model)
            for arm in state.arms:
                self._rounds(arm)
            self._open_test()
        self._read_test()

    def note(self) -> None:
        """Writes the state and the page."""
        self.state.updated_at = _now()
        self.directory.write_json(self.state.model_dump(mode="json"), LOOP)
        _report(self.directory, self.state)

    # -- rounds ----------------------------------------------------------------------------------------------------

    def _rounds(self, arm: ArmState) -> None:
        """Rounds of one arm until its development score stops rising."""
        assert self.state.start is not None
        arm.ended = None
        while arm.ended is None:
            scores = [self.state.start, *(r.development for r in arm.done() if r.development is not None)]
            arm.chosen = max(range(len(scores)), key=lambda i: scores[i].value)
            arm.ended = _ended(self.cfg, scores)
            if arm.ended is None:
                self._round(arm, len(scores))
            self.note()

    def _round(self, arm: ArmState, number: int) -> None:
        arm.rounds = [*arm.rounds[: number - 1], Round(number=number)]
        record, stages, name = arm.rounds[-1], self.stages, _arm(arm)
        before = self._model(arm, number - 1)
        logger.info("%s, round %d", name, number)
        chosen = self._choose(arm, record, before) if name != "labelled" else None
        first = self._model(arm, 0) if self.cfg.restart else before
        trained = stages.train(first, self._at(arm, number, "ft"), number, stages.labelled_captions(), chosen)
        record.num_examples, record.num_steps, record.loss = trained.num_examples, trained.num_steps, trained.loss
        record.model = stages.at_hand(trained.model, f"{name}-round-{number}")
        self.note()
        record.development = self._developed(f"{name}-round-{number}", record.model)

    def _choose(self, arm: ArmState, record: Round, model: str) -> str:
        """Captions, verdicts and the set of a round; returns the set."""
        stages, name = self.stages, _arm(arm)
        by = self.state.arms[self.cfg.arms.index("curated")] if "curated" in self.cfg.arms else arm
        shared = record.number == 1  # the same model with the same seeds: arms share the captions of round 1
        record.captions = self._at(by if shared else arm, record.number, "captions")
        stages.caption(record.captions, model, record.number)
        if name == "curated":
            stages.judge(record.captions, self._at(arm, record.number, "judged"))
        out = self._at(arm, record.number, "set")
        found = stages.choose(record.captions, out, name)
        record.num_captions, record.num_kept, record.dropped = found.num_captions, found.num_kept, found.dropped
        self.note()
        if not found.num_kept:
            raise Unfinished(
                f"curation kept none of {found.num_captions:,} captions in {out}: its rules are too strict"
            )
        return out

    def _developed(self, name: str, model: str) -> Score:
        """The development score of a model."""
        models = {START: self.state.start_model or model}
        for arm in self.state.arms:
            models |= {f"{arm.name}-round-{r.number}": r.model for r in arm.done() if r.model is not None}
        return self.stages.score({**models, name: model}, test=False).scores[name]

    def _model(self, arm: ArmState, number: int) -> str:
        model = arm.rounds[number - 1].model if number else self.state.start_model
        assert model is not None
        return model

    def _at(self, arm: ArmState, number: int, *parts: str) -> str:
        return storage.join(self.cfg.out, arm.name, f"round-{number}", *parts)

    # -- the test --------------------------------------------------------------------------------------------------

    def _open_test(self) -> None:
        """Writes down what will be read, before it is: the first model, and of each arm the chosen and the last."""
        models = {START: self.state.start_model or ""}
        for arm in self.state.arms:
            for number in sorted({arm.chosen, len(arm.done())} - {0}):
                models[f"{arm.name}-round-{number}"] = self._model(arm, number)
        judge = judge_id(self.cfg.test_judging)
        self.state.test = Reading(opened_at=_now(), judge=judge, models=models)
        self.note()

    def _read_test(self) -> None:
        test = self.state.test
        assert test is not None
        board = self.stages.score(test.models, test=True)
        test.scores, test.pairs, test.judge = board.scores, board.pairs, board.judge
        test.num_questions, test.num_regions = board.num_questions, board.num_regions
        self.state.state = "complete"


def _ended(cfg: Config, scores: list[Score]) -> str | None:
    """Why an arm ends, given the development scores of the first model and of its rounds; None: it goes on."""
    best, since = scores[0].value, 0
    for score in scores[1:]:
        since = 0 if score.value > best + cfg.min_gain / 100 else since + 1
        best = max(best, score.value)
    if since >= cfg.patience:
        return f"the development score has not risen for {since} round{'' if since == 1 else 's'}"
    return f"{cfg.max_rounds} rounds were asked for" if len(scores) > cfg.max_rounds else None


def _arm(arm: ArmState) -> Arm:
    return arm.name  # type: ignore[return-value]


def _report(directory: RunDirectory, state: LoopState) -> None:
    title = directory.uri.rstrip("/").rpartition("/")[2]
    storage.write_bytes(directory.at(REPORT), loop_report(title, state.model_dump(mode="json")).encode())


def _points(score: Score) -> str:
    around = "" if score.low is None or score.high is None else f" [{100 * score.low:.1f}, {100 * score.high:.1f}]"
    return f"{100 * score.value:.1f}{around}"


def _now() -> str:
    return datetime.now(UTC).isoformat(sep=" ", timespec="seconds")


if __name__ == "__main__":  # the same options as `meddam loop`; an import of the command line here would be a cycle
    sys.argv.insert(1, "loop")
    runpy.run_module("ray_jobs.cli", run_name="__main__")


if __name__ == "__main__":  # the same options as `meddam loop`
    run_as("loop")
