"""What a judging would take: calls, tokens, dollars and minutes. `meddam judge ... --dry-run`.

The calls of the run are exact, those of the controls about right; tokens are upper estimates from a sample of captions.
What a cache knows already is not taken off.
"""

from __future__ import annotations

from statistics import fmean

from pydantic import BaseModel, ConfigDict

from meddam_core.judging.llm import LlmJudge
from meddam_core.judging.llm_score import FACTORS, RatingJudge, rating_questions
from ray_jobs.judge_calls import Prices
from ray_jobs.judge_plan import Plan, read_slice
from ray_jobs.judges import make_judges

SOME_FACTS = "There is a sharp, solid, round nodule in the right lower zone. " * 2
"""As long as what is known about a region usually is."""
SAMPLE = 200
"""Captions that are measured."""


class Estimate(BaseModel):
    """What it would take. Nothing was written and nobody was called."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    judge: str
    num_captions: int
    num_verdicts: int
    num_control_verdicts: int
    num_calls: int
    """Of all models together; the lexical judge makes none."""
    num_prompt_tokens: int
    num_reply_tokens: int
    usd: float
    minutes: float | None
    """At the rates given; None where there is no limit."""

    @property
    def exit_code(self) -> int:
        """What the process ends with."""
        return 0

    def lines(self) -> list[str]:
        """The estimate as a person reads it."""
        text = [
            f"dry run: {self.num_verdicts:,} verdicts on {self.num_captions:,} captions, about "
            f"{self.num_control_verdicts:,} on the controls, by {self.judge}",
            f"  {self.num_calls:>12,}  calls at most",
            f"  {self.num_prompt_tokens:>12,}  prompt tokens and {self.num_reply_tokens:,} reply tokens at most",
            f"  {self.usd:>12,.2f}  dollars at most",
        ]
        if self.minutes is not None:
            text.append(f"  {self.minutes:>12,.0f}  minutes at the rates given")
        return text


def estimate(plan: Plan) -> Estimate:
    """Counts, and measures a few captions. Writes nothing and calls nobody."""
    cfg, coverage = plan.cfg, plan.coverage
    models = [m for m in make_judges(cfg)[0] if isinstance(m, LlmJudge | RatingJudge)]
    share = min(cfg.num_control_regions, coverage.num_regions) / coverage.num_regions
    controls = round(coverage.num_verdicts * share) * len(cfg.extra_sets)
    asked = coverage.num_rated * len(FACTORS) if cfg.judge == "llm-score" else coverage.num_verdicts
    calls = (asked + controls) * len(models)
    prompt, reply = _tokens(plan, models[0]) if models else (0.0, 0)
    prompt_tokens, reply_tokens = round(calls * prompt), calls * reply
    rates = ((calls, cfg.requests_per_min), (prompt_tokens + reply_tokens, cfg.tokens_per_min))
    return Estimate(
        judge=plan.judge, num_captions=coverage.num_captions, num_verdicts=asked,
        num_control_verdicts=controls, num_calls=calls, num_prompt_tokens=prompt_tokens, num_reply_tokens=reply_tokens,
        usd=round(Prices(cfg.price_prompt, cfg.price_reply).cost(prompt_tokens, reply_tokens), 4),
        minutes=max((amount / limit for amount, limit in rates if limit is not None and models), default=None),
    )  # fmt: skip


def _tokens(plan: Plan, model: LlmJudge | RatingJudge) -> tuple[float, int]:
    """(prompt, reply) tokens of a call: the mean of upper estimates over the first captions, and the reply's limit."""
    rows = read_slice(plan.slices(controls=False)[0])[:SAMPLE]
    questions = plan.questions.of({r["region_id"] for r in rows})
    sizes = [
        model.reserve_tokens(q, row["text"] or "") - model.max_reply_tokens
        for row in rows
        for q in (
            questions.get(row["region_id"], [])
            if isinstance(model, LlmJudge)
            else rating_questions(row["region_id"], row["dataset"], SOME_FACTS)
        )
    ]
    return (fmean(sizes) if sizes else 500.0), model.max_reply_tokens
