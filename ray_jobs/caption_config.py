"""The settings of a caption run: options of `meddam caption`, keys of its YAML file, and fields of run.json alike."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from meddam_core.engines.base import Sampling
from meddam_core.judging.egress import Retention

REMOTE = "remote"


class Config(BaseModel):
    """What `meddam caption` does."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    shards: tuple[str, ...] = Field(min_length=1)
    """Folders of image shards (or single .parquet files), on S3 or disk."""
    out: str
    """The run directory, on S3 or disk. Run again with the same to resume."""
    model: str
    """DAM checkpoint folder, in the official layout; with --engine remote the name of a model."""
    prompts: tuple[str, ...] = ("meddam-v1",)
    """Prompt ids (see `meddam_core.prompts`) or text files; every region is described once for each."""
    num_samples: int = Field(1, ge=1)
    """Captions a region and prompt; more than one needs a temperature above 0."""
    max_new_tokens: int = Field(256, ge=1)
    """Longest caption, tokens."""
    temperature: float = Field(0.0, ge=0)
    """0 is greedy."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Nucleus of the distribution to sample from."""
    top_k: int = Field(0, ge=0)
    """Sample from the k likeliest tokens; 0 is off."""
    seed: int = 0
    """With the caption's identity it gives the caption's own random stream."""
    aspect: str | None = Field(None, pattern="^(stretch|pad)$")
    """How a view is brought to a square; by default the recipe's choice."""
    margin: float | None = Field(None, ge=0, le=2)
    """Share of a box's width and height added on each side; by default the recipe's."""
    window: str | None = None
    """Window preset for all images; by default the recipe's."""
    engine: str = "auto"
    """auto, torch, mii, remote, or module:Class of your own."""
    device: str = "auto"
    """auto, cpu or cuda."""
    dtype: str = Field("auto", pattern="^(auto|float32|bfloat16|float16)$")
    """auto is bfloat16 on a GPU and float32 on a CPU."""
    slots: int | None = Field(None, ge=1)
    """Captions an engine decodes at once; by default the engine's choice."""
    num_captioners: int | None = Field(None, ge=1)
    """Actors that hold the model: by default one a GPU of the cluster, or one."""
    wait_for_gpus: int | None = Field(None, ge=1)
    """Begin when the cluster has so many GPUs, and ask an autoscaler for them; by default with those that are there."""
    wait_for_gpus_s: float = Field(3600.0, gt=0)
    """Longest wait for them, seconds; then the run ends with exit code 4, and the same command goes on."""
    num_extractors: int | None = Field(None, ge=1)
    """Most actors that prepare images; by default what the CPUs allow."""
    images_per_batch: int = Field(16, ge=1)
    """Images a captioner is handed at once."""
    images_per_file: int = Field(1000, ge=1)
    """Images a part file; also how much work a killed driver can lose."""
    max_failed_share: float = Field(0.2, gt=0, le=1)
    """Stop when more than this share of the images fails."""
    canary_images: int = Field(8, ge=1)
    """Stop when the first so many images all fail."""
    num_cpus: int | None = Field(None, ge=2)
    """CPUs of a Ray session started on this machine."""
    base_url: str | None = None
    """remote: the OpenAI-compatible endpoint, http(s)://HOST/v1."""
    retention: Retention = "retains"
    """remote: what you declare about the endpoint: inside (of the cluster), zero-retention, or retains."""
    api_key_env: str = "OPENAI_API_KEY"
    """remote: environment variable that holds the endpoint's key."""
    show: Literal["both", "crop", "full"] = "both"
    """remote: the whole image and the crop of the region, or one of them."""
    draw_box: bool = True
    """remote: draw a box around the region in the whole image."""
    view_size: int = Field(1024, ge=64, le=4096)
    """remote: side of the pictures it is shown, pixels."""
    requests_per_min: float | None = Field(None, ge=1)
    """remote: what the endpoint allows; all jobs of the cluster share it."""
    tokens_per_min: float | None = Field(None, ge=1)
    """remote: what the endpoint allows."""
    max_concurrent: int = Field(32, ge=1)
    """remote: calls in flight, at most."""
    timeout_s: float = Field(120.0, gt=0)
    """remote: a call that takes longer is tried again."""
    dry_run: bool = False
    """Count the input, measure a few images, say what the run would take, and write nothing."""

    @model_validator(mode="after")
    def _remote(self) -> Config:
        if (self.engine == REMOTE) != (self.base_url is not None):
            raise ValueError("--engine remote needs --base-url, the endpoint of --model, and no other engine takes one")
        return self

    @property
    def sampling(self) -> Sampling:
        """The captions' sampling, without their own seeds."""
        return Sampling(
            max_new_tokens=self.max_new_tokens, temperature=self.temperature, top_p=self.top_p, top_k=self.top_k,
            seed=self.seed,
        )  # fmt: skip
