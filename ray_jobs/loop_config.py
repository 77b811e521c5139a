"""The settings of `meddam loop`, and those of each stage that follow from them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from meddam_core import storage
from ray_jobs import benchmark, qa
from ray_jobs.caption_config import Config as CaptionConfig
from ray_jobs.curate import Config as CurateConfig
from ray_jobs.finetune_config import Config as FinetuneConfig
from ray_jobs.judge_config import Config as JudgeConfig
from ray_jobs.judges import judge_id

Settings = dict[str, Any]
Arm = Literal["curated", "uncurated", "labelled"]
JUDGING = "loop"
"""Name of the judging of what a round captions."""
OF_SAMPLES = ("num_samples", "temperature", "top_p", "top_k", "seed")
"""Settings of `meddam caption` that development and test do without: they are described once, greedily."""
EVERYTHING: Settings = {
    "min_words": 0, "max_words": 100_000, "max_hedges": None, "max_repetition": 1.0, "best_of_samples": False
}  # fmt: skip
"""Rules of `meddam curate` that let every finished caption pass: the control."""


class Config(BaseModel):
    """What `meddam loop` does."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    out: str
    """Folder of the loop, on S3 or disk. Run again with the same to resume."""
    model: str
    """DAM checkpoint folder to start from; `tiny` for a small one from scratch, which needs `start`."""
    labelled: tuple[str, ...] = Field(min_length=1)
    """Image shards whose captions are known; they stay in the mix."""
    labelled_captions: tuple[str, ...] = ()
    """Their captions: runs or curated sets; without any, phantoms get captions made from their truth."""
    unlabelled: tuple[str, ...] = Field(min_length=1)
    """Image shards that the model describes itself, to learn from what curation leaves."""
    development: tuple[str, ...] = Field(min_length=1)
    """Labelled shards, one folder a dataset: their score decides how many rounds there are, and which model is best."""
    test: tuple[str, ...] = Field(min_length=1)
    """Labelled shards, one folder a dataset, locked: read once, after the last round."""
    arms: tuple[Arm, ...] = ("curated",)
    """curated; uncurated: every finished caption; labelled: as many steps, without pseudo-labels. Several compare."""
    max_rounds: int = Field(3, ge=1)
    """Rounds, at most."""
    patience: int = Field(1, ge=1)
    """Rounds without a rise of the development score after which an arm ends."""
    min_gain: float = Field(0.0, ge=0)
    """Rise of the development score, in points of 100, that counts as one."""
    restart: bool = False
    """Train each round from the first model again, instead of from the model of the round before."""
    repeat_labelled: int = Field(1, ge=0)
    """How often an epoch of a round shows each labelled region, against once each pseudo-label."""
    pool_labels: Literal["hidden", "used"] = "hidden"
    """hidden: nothing known about unlabelled regions is looked at. used: they are judged by their weak labels."""
    prompt: str = "meddam-v1"
    """The prompt of all stages."""
    start: Settings | None = None
    """Settings of `meddam finetune` on the labelled shards alone, before round 1; none: take the model as it is."""
    caption: Settings = {"num_samples": 4, "temperature": 0.7}
    """Settings of `meddam caption` on unlabelled regions."""
    judge: Settings = {}
    """Settings of `meddam judge`: the curating judge, who judges development too; max_usd is for both together."""
    curate: Settings = {"min_verdicts": 0.8}
    """Settings of `meddam curate`."""
    finetune: Settings = {}
    """Settings of `meddam finetune` of every round."""
    test_judge: Settings = {}
    """Settings of `meddam judge` for the test: another judge than the curating one."""
    same_judge: bool = False
    """Let the curating judge read the test too, where there is no other; the report says so."""
    seed: int = 0
    """Of samples, training and questions."""
    weights: str | None = None
    """Where OUT is on S3: local folder, the same on all nodes, that models are copied to."""
    num_cpus: int | None = Field(None, ge=2)
    """CPUs of a Ray session started on this machine."""

    @model_validator(mode="after")
    def _can_work(self) -> Config:
        if self.model == "tiny" and self.start is None:
            raise ValueError("a model from scratch knows nothing to begin with; give `start` settings of its training")
        if storage.is_s3(self.out) and self.weights is None:
            raise ValueError("with OUT on S3 models are captioned with from a local folder; name one with --weights")
        if len(set(self.arms)) != len(self.arms) or not self.arms:
            raise ValueError("name each arm once, and at least one")
        if "min_verdicts" in self.curate and not self.judges_pool and "curated" in self.arms:
            raise ValueError(
                "min_verdicts needs verdicts on unlabelled regions: caption with num_samples above 1, so that samples "
                "can be held against what most of them say, or set pool_labels to used"
            )
        if judge_id(self.pool_judging("run", "questions")) == judge_id(self.test_judging) and not self.same_judge:
            raise ValueError(
                "the test must be read by another judge than the one that curates; give `test_judge` settings, or "
                "--same-judge where there is no other: the report then says so"
            )
        self.captioning("out", "model", 1)
        self.curating("run", "out", self.arms[0])
        self.training("model", "out", 1, ("captions",), "set")
        if self.start is not None:
            self.starting("out")
        return self

    @property
    def judges_pool(self) -> bool:
        """Whether there is anything to judge captions of unlabelled regions by."""
        return self.pool_labels == "used" or int(self.caption.get("num_samples", 1)) > 1

    @property
    def test_judging(self) -> JudgeConfig:
        """The judge of the test, without a run."""
        return _checked(JudgeConfig, self.test_judge, "test_judge", run="run", questions="questions")

    # -- the stages ------------------------------------------------------------------------------------------------

    def starting(self, out: str) -> FinetuneConfig:
        """Training before the first round, on the labelled shards."""
        return _checked(
            FinetuneConfig, {"prompts": (self.prompt,), "seed": self.seed, **(self.start or {})}, "start",
            shards=self.labelled, captions=self.labelled_captions, model=self.model, out=out, num_cpus=self.num_cpus,
        )  # fmt: skip

    def captioning(self, out: str, model: str, number: int) -> CaptionConfig:
        """The captions of a round; each round draws its own samples."""
        return _checked(
            CaptionConfig, {"seed": self.seed + number, **self.caption}, "caption", shards=self.unlabelled, out=out,
            model=model, prompts=(self.prompt,), num_cpus=self.num_cpus,
        )  # fmt: skip

    def asking(self, run: str, out: str) -> qa.Config:
        """The questions about unlabelled regions: by their weak labels, or by what most captions say."""
        hidden = self.pool_labels == "hidden"
        return qa.Config(
            shards=(run,) if hidden else self.unlabelled, out=out, seed=self.seed, consensus=hidden, num_cpus=1
        )

    def pool_judging(self, run: str, questions: str, spent_usd: float = 0.0) -> JudgeConfig:
        """The curating judge on the captions of a round; no controls, which would need labels."""
        settings = {**self.judge, "controls": ("none",)}
        if settings.get("max_usd") is not None:
            settings["max_usd"] = max(0.0, float(settings["max_usd"]) - spent_usd)
        return _checked(
            JudgeConfig, settings, "judge", run=run, questions=questions, name=JUDGING, num_cpus=self.num_cpus
        )

    def curating(self, run: str, out: str, arm: Arm) -> CurateConfig:
        """What is chosen of a round's captions."""
        chosen = arm == "curated"
        return _checked(
            CurateConfig, self.curate if chosen else EVERYTHING, "curate", runs=(run,), out=out,
            judging=JUDGING if chosen and self.judges_pool else None,
            hide_truth=self.pool_labels == "hidden" or not chosen,
        )  # fmt: skip

    def training(
        self, model: str, out: str, number: int, labelled_captions: tuple[str, ...], chosen: str | None
    ) -> FinetuneConfig:
        """Training of a round: on the labelled shards, and on the round's set where it has one."""
        shards, captions = self.labelled, labelled_captions
        if chosen is not None:
            shards = self.labelled * self.repeat_labelled + self.unlabelled
            captions = (*(captions if self.repeat_labelled else ()), chosen)
        return _checked(
            FinetuneConfig, {"seed": self.seed + number, **self.finetune}, "finetune", shards=shards,
            captions=captions, model=model, out=out, num_cpus=self.num_cpus,
        )  # fmt: skip

    def scoring(self, out: str, models: dict[str, str], *, test: bool, spent_usd: float = 0.0) -> benchmark.Config:
        """The grid of the development set, or of the test: its questions are others, and worded otherwise."""
        sets, name = (self.test, "test") if test else (self.development, "development")
        names = [name] if len(sets) == 1 else [f"{name}-{i}" for i in range(1, len(sets) + 1)]
        judge = dict(self.test_judge if test else {"controls": ("none",), **self.judge})
        if judge.get("max_usd") is not None and not test:
            judge["max_usd"] = max(0.0, float(judge["max_usd"]) - spent_usd)
        return benchmark.Config(
            out=out, datasets=dict(zip(names, sets, strict=True)),
            models={n: {"model": m} for n, m in models.items()}, prompts=(self.prompt,),
            caption={k: v for k, v in self.caption.items() if k not in OF_SAMPLES}, judge=judge,
            questions={"seed": self.seed + test, "wording": "held-out" if test else "usual", "num_cpus": 1},
            title="Locked test" if test else "Development", num_cpus=self.num_cpus,
        )  # fmt: skip


def _checked(kind: type[Any], settings: Settings, where: str, **decided: Any) -> Any:
    """A stage's config; what the loop itself decides cannot be set."""
    if taken := decided.keys() & settings.keys() - {"seed"}:
        raise ValueError(f"the loop itself decides {', '.join(sorted(taken))}; leave it out of {where}")
    try:
        return kind.model_validate({**settings, **decided})
    except ValidationError as error:
        said = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'settings'}: {e['msg']}" for e in error.errors())
        raise ValueError(f"{where}: {said}") from error
