"""The stages of a loop: each hands a folder to the job that does it, and does nothing where the folder is finished.

stages = Stages(cfg)
stages.caption(out, model, number); stages.judge(run, out); stages.choose(run, out, arm); stages.train(...)
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from meddam_core import storage
from ray_jobs import benchmark, caption, curate, fetch_weights, finetune, judge, qa
from ray_jobs.curate import CURATION
from ray_jobs.finetune_config import Config as FinetuneConfig
from ray_jobs.judge_summary import Summary as JudgeSummary
from ray_jobs.loop_config import Arm, Config
from ray_jobs.loop_sets import write_truth_captions
from ray_jobs.loop_state import Pair, Score
from ray_jobs.run_directory import RUN, SUMMARY, RunDirectory
from ray_jobs.summary import Summary as CaptionSummary

logger = logging.getLogger(__name__)
WORDINGS = 6
"""Captions of each labelled phantom."""


class Unfinished(Exception):
    """A stage ended without its result; run again to go on."""


@dataclass(frozen=True, slots=True)
class Board:
    """The scores of some models on one set."""

    scores: dict[str, Score]
    pairs: list[Pair]
    judge: str
    num_questions: int
    num_regions: int


@dataclass(frozen=True, slots=True)
class Stages:
    """The jobs of a loop, with its settings."""

    cfg: Config

    def first_model(self) -> str:
        """The first model: trained where the settings ask for it. Its folder, on this machine."""
        if self.cfg.start is None:
            return self.cfg.model
        found = _trained(self.cfg.starting(self._at("start")))
        return self._at_hand(found.model, "start")

    def labelled_captions(self) -> tuple[str, ...]:
        """The captions of the labelled shards; those of phantoms are written once."""
        cfg, out = self.cfg, self._at("truth")  # not "labelled": an arm is called that
        if cfg.labelled_captions:
            return cfg.labelled_captions
        if not storage.exists(storage.join(out, "captions.parquet")):
            write_truth_captions(cfg.labelled, out, cfg.prompt, WORDINGS, cfg.seed)
        return (out,)

    def caption(self, out: str, model: str, number: int) -> CaptionSummary:
        """Describes the unlabelled regions."""
        import ray

        found = caption.run(self.cfg.captioning(out, model, number))
        ray.data.DataContext.get_current().checkpoint_config = None  # of the caption job alone
        assert isinstance(found, CaptionSummary)
        if found.state != "complete":
            raise Unfinished(f"captions of {out} are {found.state}: {found.why}")
        return found

    def judge(self, run: str, out: str) -> None:
        """Judges captions of unlabelled regions, where there is anything to judge them by."""
        if not self.cfg.judges_pool:
            return
        asked = qa.run(self.cfg.asking(run, out))
        if not asked.num_questions:
            raise Unfinished(
                f"{run}: there is no question about any region: captions agree on nothing that the question library "
                "knows, or no template set fits the dataset (see `questions` and `meddam qa show`)"
            )
        found = judge.run(self.cfg.pool_judging(run, out, self.spent_usd()))
        assert isinstance(found, JudgeSummary)
        if found.state != "complete":
            raise Unfinished(f"the judging of {run} is {found.state}: {found.why}")

    def choose(self, run: str, out: str, arm: Arm) -> curate.Summary:
        """Chooses captions to learn from."""
        cfg = self.cfg.curating(run, out, arm)
        document = RunDirectory(out).read_json(CURATION)
        if document is not None and document["config"] == cfg.model_dump(mode="json"):
            return curate.Summary.model_validate({k: document[k] for k in curate.Summary.model_fields})
        return curate.run(cfg)

    def train(
        self, model: str, out: str, number: int, labelled_captions: tuple[str, ...], chosen: str | None
    ) -> finetune.Summary:
        """Trains the round's model."""
        return _trained(self.cfg.training(model, out, number, labelled_captions, chosen))

    def at_hand(self, model: str, name: str) -> str:
        """A trained model as a folder that captioning can read."""
        return self._at_hand(model, name)

    def score(self, models: dict[str, str], *, test: bool) -> Board:
        """Describes, judges and ranks on development or on the test; what is finished is left alone."""
        cfg = self.cfg.scoring(
            self._at("test" if test else "development"), models, test=test, spent_usd=self.spent_usd()
        )
        found = benchmark.run(cfg)
        if found.exit_code:
            open_cells = [f"{c.model}: {c.state} {c.why or ''}".strip() for c in found.cells if c.state != "judged"]
            raise Unfinished(f"scoring in {cfg.out}: {'; '.join(open_cells)}")
        figures = RunDirectory(cfg.out).read_json("leaderboard", "leaderboard.json")
        assert figures is not None and found.board is not None
        return _board(figures, models, self.cfg.prompt)

    def spent_usd(self) -> float:
        """Dollars that the curating judge has taken so far: of the pool and, by its own count, not of this grid."""
        total = 0.0
        for file in storage.list_files(self._at(), SUMMARY, recursive=True):
            parts = file.path.split("/")
            if "judging" in parts and "captions" in parts[-4:]:
                prefix = "s3://" if storage.is_s3(self.cfg.out) else ""
                document = RunDirectory(prefix + "/".join(parts[:-1])).read_json(SUMMARY) or {}
                total += float(document.get("calls", {}).get("spent_usd", 0.0))
        return total

    def _at(self, *parts: str) -> str:
        return storage.join(self.cfg.out, *parts)

    def _at_hand(self, model: str, name: str) -> str:
        if not storage.is_s3(model):
            return model
        from pathlib import Path

        assert self.cfg.weights is not None
        target = Path(self.cfg.weights) / name
        return fetch_weights.run(fetch_weights.Config(source=model, target=target)).target


def _trained(cfg: FinetuneConfig) -> finetune.Summary:
    directory = RunDirectory(cfg.out)
    summary, begun = directory.read_json(SUMMARY), directory.read_json(RUN)
    if summary is not None and begun is not None and begun["config"] == cfg.model_dump(mode="json"):
        return finetune.Summary.model_validate(summary)
    return finetune.run(cfg)


def _board(figures: dict[str, Any], models: dict[str, str], prompt: str) -> Board:
    names = {f"{name}, {prompt}": name for name in models} | {name: name for name in models}
    scores = {}
    for system in figures["systems"]:
        strict = system["scores"]["strict"]
        value, low, high = strict["average"]
        name = names.get(system["name"], system["name"].removeprefix("control:"))
        scores[name] = Score(
            value=value, low=low, high=high, positive=strict["positive"][0], negative=strict["negative"][0]
        )
    pairs = []
    for pair in figures["pairs"]:
        value, low, high = pair["difference"]
        first, second = names[pair["first"]], names[pair["second"]]
        difference = Score(value=value, low=low, high=high)
        pairs.append(Pair(first=first, second=second, difference=difference, p=pair["p_corrected"]))
    return Board(scores, pairs, figures["judge"], figures["num_questions"], figures["num_regions"])
