"""The settings of `meddam judge`: options, keys of its YAML file, and what judge.json records."""

from __future__ import annotations

import os
from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

from meddam_core.judging.budget import Limits
from meddam_core.judging.egress import Endpoint, Retention

Control = Literal["blank", "shuffled", "majority", "truth"]
RETEST = "retest"
"""The set of the run's own captions that a judge is asked about again."""
CONTROLS: tuple[Control, ...] = get_args(Control)


class Config(BaseModel):
    """What `meddam judge` does."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    run: str
    """The finished run to judge, on S3 or disk."""
    questions: str
    """Its question table (`meddam qa build`)."""
    judge: Literal["lexical", "llm", "panel", "llm-score"] = "lexical"
    """lexical: by rules, offline. llm: a language model. panel: each --model, and the lexical judge. llm-score: a model
    rates fluency, relevance, factual correctness and clinical plausibility."""
    models: tuple[str, ...] = ()
    """Model of an OpenAI-compatible endpoint; several for a panel."""
    base_urls: tuple[str, ...] = ()
    """The endpoint, http(s)://HOST/v1; one for all models, or one each."""
    retention: Retention = "retains"
    """What you declare about the endpoint: inside (of the cluster), zero-retention, or retains."""
    api_key_env: str = "OPENAI_API_KEY"
    """Environment variable that holds the endpoint's key."""
    lexical_member: bool = True
    """Whether the lexical judge sits on a panel."""
    requests_per_min: float | None = Field(None, ge=1)
    """What the endpoint allows; all jobs of the cluster share it."""
    tokens_per_min: float | None = Field(None, ge=1)
    """What the endpoint allows, prompt and reply together."""
    max_concurrent: int = Field(64, ge=1)
    """Calls in flight, at most; also what a kill can make you pay for twice."""
    max_usd: float | None = Field(None, ge=0)
    """Stop before more is spent. Run again with more to go on."""
    price_prompt: float = Field(0.0, ge=0)
    """Dollars a million prompt tokens."""
    price_reply: float = Field(0.0, ge=0)
    """Dollars a million reply tokens."""
    timeout_s: float = Field(60.0, gt=0)
    """A call that takes longer is tried again."""
    patience_s: float = Field(600.0, gt=0)
    """Stop when the endpoint has answered nothing for so long. Run again to go on."""
    controls: tuple[str, ...] = CONTROLS
    """Controls to judge beside the run: blank, shuffled, majority, truth; none for none."""
    retest: bool = False
    """Ask a model again, with another seed, about the captions of the controls' regions: does it agree with itself?"""
    control_regions: int | None = Field(None, ge=1)
    """Regions whose controls are judged, chosen by --seed: by default 2000, or 200 where calls are paid."""
    library: str | None = None
    """Folder of a lab's own question templates."""
    cache: str | None = None
    """Verdicts that runs share, on S3 or disk; by default the run's own folder."""
    name: str | None = Field(None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._@-]*$")
    """Name of the folder RUN/judging/NAME; by default made from the judge and its settings."""
    seed: int = 0
    """Chooses the regions of the controls."""
    captions_per_file: int = Field(500, ge=1)
    """Captions of one verdict file."""
    num_judges: int | None = Field(None, ge=1)
    """Actors: by default one for a model, which can keep hundreds of calls in flight, and one a CPU for the lexical."""
    num_cpus: int | None = Field(None, ge=2)
    """CPUs of a Ray session started on this machine."""
    retry_unscored: bool = False
    """Ask again what the judge did not decide, in a finished judging too."""
    dry_run: bool = False
    """Count calls, tokens and dollars, and do nothing."""

    @model_validator(mode="after")
    def _check(self) -> Config:
        if unknown := set(self.controls) - set(CONTROLS) - {"none"}:
            raise ValueError(f"there is no control {', '.join(sorted(unknown))}; use {', '.join(CONTROLS)} or none")
        if self.judge == "lexical":
            if self.retest:
                raise ValueError("the lexical judge gives the same verdict each time; --retest is for models")
            if self.models or self.base_urls:
                raise ValueError("the lexical judge uses no model; give --judge llm or panel with --model")
            return self
        if not self.models or not self.base_urls:
            raise ValueError(f"--judge {self.judge} needs --model and --base-url")
        if self.judge in ("llm", "llm-score") and len(self.models) != 1:
            raise ValueError(f"--judge {self.judge} takes one --model; several make a panel")
        if len(self.base_urls) not in (1, len(self.models)):
            raise ValueError("give one --base-url for all models, or one for each")
        if len(self.models) + self.lexical_member < 2 and self.judge == "panel":
            raise ValueError("a panel needs at least two judges")
        if self.max_usd is not None and not (self.price_prompt or self.price_reply):
            raise ValueError("--max-usd needs --price-prompt and --price-reply; without them every call is free")
        for endpoint in self.endpoints:
            if endpoint.retention != "inside" and not os.environ.get(self.api_key_env):
                raise ValueError(f"the environment variable {self.api_key_env} holds no key for {endpoint.host}")
        return self

    @property
    def endpoints(self) -> list[Endpoint]:
        """One for each model."""
        urls = self.base_urls if len(self.base_urls) > 1 else self.base_urls * len(self.models)
        return [Endpoint(url, self.retention) for url in urls]

    @property
    def limits(self) -> Limits:
        """The endpoint's limits, without dollars."""
        return Limits(
            requests_per_min=self.requests_per_min, tokens_per_min=self.tokens_per_min,
            max_concurrent=self.max_concurrent,
        )  # fmt: skip

    @property
    def wanted_controls(self) -> tuple[str, ...]:
        """Controls to judge, in a fixed order."""
        if self.judge == "llm-score":  # its controls would need labels of their own
            return ()
        return () if "none" in self.controls else tuple(c for c in CONTROLS if c in self.controls)

    @property
    def extra_sets(self) -> tuple[str, ...]:
        """What is judged beside the run: controls, and captions a second time."""
        return (*self.wanted_controls, *((RETEST,) if self.retest else ()))

    @property
    def num_control_regions(self) -> int:
        """How many regions the controls are judged on."""
        return self.control_regions or (2000 if self.judge == "lexical" else 200)
