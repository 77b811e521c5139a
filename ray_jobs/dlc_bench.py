"""DLC-Bench, the public benchmark of detailed localized captions, by its own rules: score, run, verify.

    meddam dlc-bench score --answers dam_3b_v1_eval.json
    meddam dlc-bench run --bench DLC-bench --model /weights/DAM-3B --base-url http://judge:8000/v1 --out results
    meddam dlc-bench verify --bench DLC-bench --model /weights/DAM-3B --predictions dam_3b_v1.json

`run` writes predictions.json and evaluation.json in the benchmark's own forms; run again it goes on where it stopped,
annotation by annotation. A hundred captions and a thousand calls: this needs no Ray.

The benchmark's own judge is meta-llama/Meta-Llama-3.1-8B-Instruct; with another judge the figures are not comparable,
and say so.
"""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from meddam_core.judging.budget import Limits
from meddam_core.judging.dlc_bench import (
    RegionScore,
    headline,
    judge_message,
    read_predictions,
    read_questions,
    rescore,
    score_region,
    write_evaluation,
    write_predictions,
)
from meddam_core.judging.dlc_bench_images import QUERY, bench_regions, verify
from meddam_core.judging.dlc_bench_rules import JUDGE_MODEL, JUDGE_SETTINGS, Question
from meddam_core.judging.egress import Endpoint, Retention
from meddam_core.judging.llm import BYTES_PER_TOKEN, JudgeCallError, complete, make_client
from meddam_core.records import Region, Status
from ray_jobs.judge_calls import RetryRules
from ray_jobs.module_command import run_as
from ray_jobs.permits import Grant, Permits, Settled

EXIT_DIFFERENT = 1


class _Config(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class ScoreConfig(_Config):
    """Score stored judge replies afresh, by the benchmark's rules."""

    answers: str
    """An evaluation file of the benchmark: questions and judge replies by annotation."""
    skip_unscorable: bool = False
    """Leave out annotations with replies on which the benchmark's own scorer stops, and list them."""


class RunConfig(_Config):
    """Caption the benchmark's regions, ask the judge, and score."""

    bench: str
    """The DLC-bench folder: annotations.json, images/, qa.json, class_names.json."""
    out: str
    """Folder for predictions.json and evaluation.json."""
    model: str | None = None
    """DAM checkpoint folder that describes the regions."""
    predictions: str | None = None
    """Captions made before, in the benchmark's form, instead of a --model."""
    base_url: str
    """The judge's OpenAI-compatible endpoint."""
    judge_model: str = JUDGE_MODEL
    """The judge; the benchmark's own by default."""
    retention: Retention = "retains"
    """inside, zero-retention or retains: as of `meddam judge`. The benchmark's pictures are public."""
    api_key_env: str = "OPENAI_API_KEY"
    """Environment variable that holds the endpoint's key."""
    requests_per_min: float | None = Field(None, ge=1)
    """What the endpoint allows."""
    max_concurrent: int = Field(16, ge=1)
    """Calls in flight, at most."""
    timeout_s: float = Field(60.0, gt=0)
    """A call that takes longer is tried again."""
    engine: str = "auto"
    """auto, torch or mii."""
    device: str = "auto"
    """auto, cpu or cuda."""
    max_new_tokens: int = Field(512, ge=1)
    """Longest caption, tokens."""
    skip_unscorable: bool = False
    """Leave out annotations with replies on which the benchmark's own scorer stops, and list them."""

    @model_validator(mode="after")
    def _one_source(self) -> RunConfig:
        if (self.model is None) == (self.predictions is None):
            raise ValueError("give either --model, or --predictions with captions made before")
        return self


class VerifyConfig(_Config):
    """Compare the likelihood of published captions with shuffled ones: tests a checkpoint and what it is shown."""

    bench: str
    """The DLC-bench folder: annotations.json and images/."""
    model: str
    """DAM checkpoint folder."""
    predictions: str
    """The published captions: a predictions or an evaluation file of that model."""
    query: str = QUERY
    """What they were asked with, where the file does not say."""
    device: str = "auto"
    """auto, cpu or cuda."""
    num_regions: int | None = Field(None, ge=2)
    """Only the first so many, for a quick look; by default all."""


class Scores(BaseModel):
    """The benchmark's figures."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    avg: float
    avg_pos: float
    avg_neg: float
    num_keys: int
    num_recognition_wrong: int
    num_unmatched_replies: int
    unscorable: dict[str, str] = {}
    per_key: dict[str, dict[str, Any]] = {}
    judge: str | None = None
    note: str | None = None

    @property
    def exit_code(self) -> int:
        """What the process ends with."""
        return 0

    def lines(self) -> list[str]:
        """As a person reads it."""
        text = [
            f"DLC-Bench over {self.num_keys} regions: positive {self.avg_pos:.4f}, negative {self.avg_neg:.4f}, "
            f"average {self.avg:.4f}",
            f"  {self.num_recognition_wrong:>5}  not recognised",
            f"  {self.num_unmatched_replies:>5}  replies that name no choice, which count 0",
        ]
        text += [f"  left out: {key}, because {why}" for key, why in list(self.unscorable.items())[:10]]
        return text + ([self.note] if self.note else [])


class Verified(BaseModel):
    """What `verify` found."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    passed: bool
    num_regions: int
    num_likelier: int
    share: float
    share_low: float
    share_high: float
    needed: float
    mean_logprob_own: float
    mean_logprob_other: float

    @property
    def exit_code(self) -> int:
        """1 where the captions are not this model's, or it was not shown what they describe."""
        return 0 if self.passed else EXIT_DIFFERENT

    def lines(self) -> list[str]:
        """As a person reads it."""
        return [
            f"{'passed' if self.passed else 'NOT passed'}: of {self.num_regions} regions {self.num_likelier} "
            f"({self.share:.0%}, [{self.share_low:.0%}, {self.share_high:.0%}]) find their own caption likelier than "
            f"another region's; {self.needed:.0%} are needed, chance is half",
            f"  log-probability a token: own {self.mean_logprob_own:.3f}, other {self.mean_logprob_other:.3f}",
        ]


def score(cfg: ScoreConfig) -> Scores:
    """Raises ValueError where the file is none of the benchmark's, or a reply stops its scorer."""
    if not Path(cfg.answers).is_file():
        raise ValueError(f"there is no file {cfg.answers}")
    try:
        found = rescore(cfg.answers, skip_unscorable=cfg.skip_unscorable).to_json()
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{cfg.answers} is no evaluation file of the benchmark ({type(error).__name__})") from error
    return Scores(**found)


def run(cfg: RunConfig) -> Scores:
    """Captions, judges and scores. Raises ValueError for files that do not fit, or an endpoint that does not answer."""
    bench, out = Path(cfg.bench), Path(cfg.out)
    questions = read_questions(bench / "qa.json", bench / "class_names.json")
    endpoint = Endpoint(cfg.base_url, cfg.retention)
    out.mkdir(parents=True, exist_ok=True)
    captions = _captions(cfg, bench, out, list(questions))
    if missing := [k for k in questions if k not in captions]:
        raise ValueError(f"{len(missing)} regions have no caption, such as {missing[0]}")
    replies = asyncio.run(_replies(cfg, endpoint, questions, captions, out / "replies.json"))
    regions: dict[str, RegionScore] = {}
    unscorable: dict[str, str] = {}
    for key, asked in questions.items():
        try:
            regions[key] = score_region(asked, replies[key])
        except (IndexError, ValueError) as error:  # what the benchmark's own scorer stops on
            unscorable[key] = str(error)
    if unscorable and not cfg.skip_unscorable:
        raise ValueError(
            f"{len(unscorable)} annotations have replies on which the benchmark's scorer stops, such as that of "
            f"{next(iter(unscorable))}; --skip-unscorable leaves them out and lists them"
        )
    write_evaluation(out / "evaluation.json", captions, regions)
    found = headline(regions)
    return Scores(
        avg=found.average, avg_pos=found.positive, avg_neg=found.negative, num_keys=len(regions),
        num_recognition_wrong=sum(not r.recognized for r in regions.values()),
        num_unmatched_replies=sum(a.choice is None for r in regions.values() for a in r.answers), unscorable=unscorable,
        judge=cfg.judge_model, note=None if cfg.judge_model == JUDGE_MODEL else
        f"judged by {cfg.judge_model}: not comparable with published figures, whose judge is {JUDGE_MODEL}",
    )  # fmt: skip


def verify_checkpoint(cfg: VerifyConfig) -> Verified:
    """Raises ValueError where files do not fit together."""
    import torch

    from meddam_core.dam.checkpoint import load_dam
    from meddam_core.engines.likelihood import caption_likelihoods

    captions, query = _published(cfg)
    regions = list(bench_regions(cfg.bench, list(captions)))[: cfg.num_regions]
    device = _device(cfg.device)
    dam = load_dam(cfg.model, device=device, dtype=torch.bfloat16 if device == "cuda" else torch.float32)

    def likelihoods(views: Any, texts: Any) -> list[float]:
        return [found.mean for found in caption_likelihoods(dam, views, query, texts)]

    return Verified(**verify(regions, captions, likelihoods, dam.config.view_size).to_json())


def _published(cfg: VerifyConfig) -> tuple[dict[str, str], str]:
    """Captions and their prompt, from a predictions file or an evaluation file."""
    content = json.loads(Path(cfg.predictions).read_text(encoding="utf-8"))
    evaluated = {k: v["pred"] for k, v in content.items() if isinstance(v, dict) and "pred" in v}
    captions, query = (evaluated, None) if evaluated else read_predictions(cfg.predictions)
    query = query or cfg.query
    return captions, query if "<image>" in query else f"<image>\n{query}"


def _captions(cfg: RunConfig, bench: Path, out: Path, keys: list[str]) -> dict[str, str]:
    """Captions made before, or by the checkpoint; written down as they come."""
    if cfg.predictions is not None:
        return read_predictions(cfg.predictions)[0]
    assert cfg.model is not None
    file = out / "predictions.json"
    captions = read_predictions(file)[0] if file.is_file() else {}
    left = [r for r in bench_regions(bench, keys) if r.key not in captions]
    if not left:
        return captions
    from meddam_core.captioner import PreparedRegion, load_captioner
    from meddam_core.dam.config import read_config
    from meddam_core.engines.base import Sampling
    from meddam_core.prompts import load_prompt

    device, size = _device(cfg.device), read_config(cfg.model).view.size
    prompt = load_prompt("dam-default")
    captioner = load_captioner(
        cfg.model, engine=cfg.engine, device=device, dtype="bfloat16" if device == "cuda" else "float32",
        prompts=[prompt], sampling=Sampling(max_new_tokens=cfg.max_new_tokens),
    )  # fmt: skip
    for start in range(0, len(left), 16):
        group = left[start : start + 16]
        prepared = [
            PreparedRegion(region=Region(region_id=start + i, box=(0, 0, 1, 1)), views_N8SS=region.views(size))
            for i, region in enumerate(group)
        ]
        for region, (caption,) in zip(group, captioner.describe(prepared), strict=True):
            if caption.status is Status.FAILED or caption.text is None:
                raise ValueError(f"region {region.key} could not be described: {caption.detail}")
            captions[region.key] = caption.text
        write_predictions(file, captions, prompt.text)
    captioner.loop.close()
    return captions


async def _replies(
    cfg: RunConfig, endpoint: Endpoint, questions: dict[str, list[Question]], captions: dict[str, str], file: Path
) -> dict[str, list[str]]:
    """The judge's reply to every question, an annotation at a time; those of an earlier start are kept."""
    key = os.environ.get(cfg.api_key_env) or "none"
    client = make_client(endpoint, key, timeout_s=cfg.timeout_s)
    permits = Permits(Limits(requests_per_min=cfg.requests_per_min, max_concurrent=cfg.max_concurrent))
    await permits.join("dlc-bench", permits.limits, None, None, timeout_s=cfg.timeout_s)
    stored: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    wanted = {"judge": cfg.judge_model, "captions": {k: captions[k] for k in questions}}
    if stored and {k: stored[k] for k in wanted} != wanted:
        raise ValueError(f"{file} holds replies about other captions, or of another judge; give another --out")
    replies: dict[str, list[str]] = stored.get("replies", {})
    lines = asyncio.Semaphore(cfg.max_concurrent)

    async def ask(question: Question, caption: str) -> str:
        async with lines:
            return await _ask(client, cfg, permits, judge_message(caption, question))

    for annotation, asked in questions.items():
        if annotation not in replies:
            replies[annotation] = list(await asyncio.gather(*(ask(q, captions[annotation]) for q in asked)))
            beside = file.with_suffix(".tmp")
            beside.write_text(json.dumps({**wanted, "replies": replies}))
            beside.replace(file)
    await client.close()
    return replies


async def _ask(client: Any, cfg: RunConfig, permits: Permits, message: str) -> str:
    """One reply, tried again where that helps. Raises ValueError where the endpoint does not give one."""
    rules, failures = RetryRules(timeout_s=cfg.timeout_s), 0
    request = {"model": cfg.judge_model, "messages": [{"role": "user", "content": message}], **JUDGE_SETTINGS}
    while True:
        grant = await permits.acquire("dlc-bench", len(message) / BYTES_PER_TOKEN + 300, 0.0)
        if not isinstance(grant, Grant):
            raise ValueError(grant.why)
        try:
            completion, _ = await complete(client, request)
        except JudgeCallError as failed:
            error = failed
        else:
            await permits.settle([Settled(id=grant.id, ending="answered", replied_ago_s=0.0)])
            choices = getattr(completion, "choices", None) or []
            return str((choices[0].message.content or "") if choices else "")
        limited = error.kind == "rate limit"
        await permits.settle([Settled(id=grant.id, ending="limited" if limited else "failed", replied_ago_s=0.0,
                                      retry_after_s=error.retry_after_s)])  # fmt: skip
        failures += not limited
        if not error.retryable or failures >= rules.max_same_failures:
            raise ValueError(f"{error}; run the same command again to go on")
        await asyncio.sleep(rules.first_wait_s * 2**failures)


def _device(wanted: str) -> str:
    if wanted != "auto":
        return wanted
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


if __name__ == "__main__":  # the same options as `meddam dlc-bench`
    run_as("dlc-bench")
