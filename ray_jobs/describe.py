"""Describe one region of one image: the path of `meddam caption`, for a single picture and without Ray.

    meddam describe film.dcm --box 410,1180,760,1490 --model /weights/DAM-3B
    meddam describe photo.jpg --mask lesion.png --model /weights/DAM-3B --prompt meddam-v1-dermatology+sentence

The same pixels, region, prompt and weights give the caption that a run publishes for them (greedy decoding; sampled
captions also depend on the region's id).
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from meddam_core import storage
from meddam_core.captioner import RegionPreparer, ViewRules, load_captioner
from meddam_core.dam.config import read_config
from meddam_core.datasets.recipes import AUTO, resolve_recipe
from meddam_core.engines.base import Sampling
from meddam_core.focal import Aspect
from meddam_core.imaging.decode import decode
from meddam_core.imaging.decoded import Decoded
from meddam_core.imaging.deidentify import image_fields
from meddam_core.models import default_model
from meddam_core.prompts import load_prompt
from meddam_core.records import Image, Reason, Region, RegionCaption, RowError, Status, image_id, region_id
from meddam_core.regions.geometry import checked_box, tight_box
from meddam_core.regions.masks import mask_of_png, rle_of
from ray_jobs.module_command import run_as


class Config(BaseModel):
    """What `meddam describe` does."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    image: str
    """DICOM, PNG, JPEG, TIFF, WebP or NIfTI file, on S3 or disk."""
    model: str = Field(default_factory=default_model)
    """DAM checkpoint folder, in the official layout; by default the small model, which knows synthetic images only."""
    box: tuple[float, float, float, float] | None = None
    """The region as x0,y0,x1,y1 in pixels, x1 and y1 outside."""
    mask: str | None = None
    """The region as a PNG of the image's size: nonzero inside (of RGBA, where alpha is above 0)."""
    prompt: str = "meddam-v1"
    """A prompt id (see docs/prompts.md) or a text file."""
    recipe: str = AUTO
    """Rules of margin, window and views; auto goes by the image's modality."""
    frame: int | None = Field(None, ge=0)
    """Which frame or slice of the file, from 0."""
    margin: float | None = Field(None, ge=0, le=2)
    """Share of the box's width and height added on each side; by default the recipe's."""
    window: str | None = None
    """Window preset (such as lung); by default the recipe's."""
    aspect: Aspect | None = None
    """How a view is brought to a square; by default the recipe's."""
    max_new_tokens: int = Field(256, ge=1)
    """Longest caption, tokens."""
    temperature: float = Field(0.0, ge=0)
    """0 is greedy."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Nucleus of the distribution to sample from."""
    top_k: int = Field(0, ge=0)
    """Sample from the k likeliest tokens; 0 is off."""
    seed: int = 0
    """For a temperature above 0."""
    engine: str = "auto"
    """auto, torch or mii."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model runs; auto takes a GPU if there is one."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """auto is bfloat16 on a GPU and float32 on a CPU."""

    @model_validator(mode="after")
    def _one_region(self) -> Config:
        if (self.box is None) == (self.mask is None):
            raise ValueError("say which region to describe: give either --box x0,y0,x1,y1 or --mask FILE.png")
        return self


class Description(BaseModel):
    """One caption and how it came about."""

    model_config = ConfigDict(frozen=True)

    text: str
    status: Status
    num_tokens: int
    mean_logprob: float | None
    prompt_id: str
    box: tuple[int, int, int, int]
    modality: str
    recipe: str
    engine: str
    kernels: str

    @property
    def exit_code(self) -> int:
        """A caption, even one cut at its limit, is a success."""
        return 0

    def lines(self) -> list[str]:
        """For a person."""
        return [self.text]


def run(cfg: Config) -> Description:
    """The caption of the region. Raises ValueError (or RowError, which is one) for whatever stands in its way."""
    prompt = load_prompt(cfg.prompt)
    size = read_config(cfg.model).view.size
    decoded = decode(storage.read_bytes(cfg.image), name=cfg.image, frame=cfg.frame)
    image = _image(cfg, decoded)
    rules = ViewRules(size=size, aspect=cfg.aspect, margin=cfg.margin, window=cfg.window)
    (prepared,) = RegionPreparer(rules).prepare(image)
    if prepared.error is not None:
        raise prepared.error
    device = _device(cfg.device)
    captioner = load_captioner(
        cfg.model,
        engine=cfg.engine,
        device=device,
        dtype=cfg.dtype if cfg.dtype != "auto" else "bfloat16" if device == "cuda" else "float32",
        prompts=[prompt],
        sampling=Sampling(
            max_new_tokens=cfg.max_new_tokens,
            temperature=cfg.temperature,
            top_p=cfg.top_p,
            top_k=cfg.top_k,
            seed=cfg.seed,
        ),
    )
    (captions,) = captioner.describe([prepared])
    captioner.loop.close()
    return _description(captions[0], image, captioner.loop.engine.name, captioner.loop.engine.kernels)


def _image(cfg: Config, decoded: Decoded) -> Image:
    """The file as an image row with one region, as ingest would make it."""
    size = (decoded.width, decoded.height)
    if cfg.mask is not None:
        mask_HW = mask_of_png(storage.read_bytes(cfg.mask), size)
        box, mask = tight_box(mask_HW), rle_of(mask_HW)
    else:
        assert cfg.box is not None
        box, mask = checked_box(cfg.box, size), None
    recipe = resolve_recipe("generic-mask" if mask and cfg.recipe == AUTO else cfg.recipe, decoded.modality)
    number = image_id(0, 0)
    return Image(
        image_id=number,
        image_key="",
        dataset="describe",
        recipe=recipe.name,
        regions=[Region(region_id=region_id(number, 0), box=box, mask=mask, source="prompted")],
        **image_fields(decoded, cfg.window or recipe.window),
    )


def _device(wanted: str) -> str:
    if wanted != "auto":
        return wanted
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _description(caption: RegionCaption, image: Image, engine: str, kernels: str) -> Description:
    if caption.text is None:
        raise RowError(Reason(caption.reason or Reason.ENGINE_ERROR), caption.detail or "the engine gave no caption")
    return Description(
        text=caption.text,
        status=caption.status,
        num_tokens=caption.num_tokens,
        mean_logprob=caption.mean_logprob,
        prompt_id=caption.prompt_id,
        box=image.regions[0].box,
        modality=image.modality,
        recipe=image.recipe,
        engine=engine,
        kernels=kernels,
    )


if __name__ == "__main__":  # the same options as `meddam describe`
    run_as("describe")
