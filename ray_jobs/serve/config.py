"""The settings of `meddam serve`: options of the command, keys of its YAML file, arguments of the Serve application."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

LOOPBACK = ("127.0.0.1", "::1", "localhost")


class ApiKey(BaseModel):
    """One client's key, as the configuration knows it: by its hash."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    """SHA-256 of the key; `meddam serve --new-key NAME` makes a key and prints this line."""
    requests_per_minute: int | None = Field(None, ge=1)
    """Most requests a minute; as many may come at once."""
    captions_per_day: int | None = Field(None, ge=1)
    """Most captions a day (UTC)."""


class Config(BaseModel):
    """What `meddam serve` does."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    model: str | None = None
    """DAM checkpoint folder, in the official layout; by default the small model that comes with the package."""
    host: str = "127.0.0.1"
    """Address to listen on; one that others can reach needs keys, or --open."""
    port: int = Field(8000, ge=1, le=65535)
    """Port to listen on."""
    open: bool = False
    """Serve without keys on an address that others can reach."""
    keys: dict[str, ApiKey] = Field(default_factory=dict)
    """API keys by client's name: {ward-7: {sha256: ..., requests_per_minute: 60, captions_per_day: 10000}}."""
    new_key: str | None = Field(None, pattern="^[A-Za-z0-9._-]{1,64}$")
    """Print a fresh key for this client and its entry for the configuration, and end."""
    model_name: str | None = None
    """The model's name in the API; by default the folder's."""
    joint: bool = False
    """The checkpoint is a joint image/video one: prompts begin with "Image:" or "Video:"."""
    prompt: str = "meddam-v1"
    """Prompt (see docs/prompts.md) for requests that ask nothing themselves."""
    max_tokens: int = Field(256, ge=1)
    """Longest caption where a request does not say."""
    most_tokens: int = Field(1024, ge=1)
    """Longest caption that a request may ask for; more is cut to this."""
    temperature: float = Field(0.0, ge=0, le=2)
    """Where a request does not say; 0 is greedy."""
    engine: str = "auto"
    """auto, torch, mii, or module:Class of your own."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model runs; auto takes a GPU if there is one."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """auto is bfloat16 on a GPU and float32 on a CPU."""
    slots: int | None = Field(None, ge=1)
    """Captions an engine decodes at once; by default the engine's choice."""
    num_threads: int | None = Field(None, ge=1)
    """torch's threads in a replica on a CPU."""
    num_decoders: int = Field(4, ge=1)
    """Threads of a replica that read images and cut out regions."""
    segmenter: str | None = None
    """SAM, SAM 2 or MedSAM folder that makes masks of points; without it a point stands for a disc."""
    min_replicas: int = Field(1, ge=1)
    """Replicas (one model each) that are always there."""
    max_replicas: int = Field(1, ge=1)
    """Most replicas under load."""
    target_ongoing: int = Field(32, ge=1)
    """Requests in flight a replica above which another one is started."""
    max_ongoing: int = Field(128, ge=1)
    """Requests in flight a replica; more are told to come back (503 with Retry-After)."""
    upscale_delay_s: float = Field(10, ge=0)
    """High load must last this long before another replica is started."""
    downscale_delay_s: float = Field(300, ge=0)
    """Low load must last this long before a replica is taken away."""
    drain_s: float = Field(60, ge=0)
    """A replica that is replaced or taken away gets this long to finish what it holds."""
    request_timeout_s: float = Field(120, gt=0)
    """Time limit of one request."""
    body_timeout_s: float = Field(30, gt=0)
    """A request's body must have arrived within this time."""
    max_body_mb: float = Field(64, gt=0)
    """Largest request."""
    max_pixels: int = Field(50_000_000, ge=1)
    """Largest picture, rows x columns; checked before decoding."""
    max_regions: int = Field(64, ge=1, le=256)
    """Most regions in one request."""
    url_hosts: tuple[str, ...] = ()
    """Hosts that images may be fetched from by https, with a port where it is not 443; by default none."""
    keep_pictures_mb: float = Field(256, ge=0)
    """Memory of a replica for decoded pictures that their client may ask about again, within ten minutes."""
    num_cpus: int | None = Field(None, ge=2)
    """CPUs of a Ray session started on this machine."""

    @model_validator(mode="after")
    def _closed(self) -> Config:
        if self.host not in LOOPBACK and not self.keys and not self.open:
            raise ValueError(
                f"{self.host} can be reached by others: configure keys (`meddam serve --new-key NAME` makes one), "
                "or say --open"
            )
        if self.max_replicas < self.min_replicas:
            raise ValueError(f"max_replicas is {self.max_replicas}, below min_replicas {self.min_replicas}")
        return self
