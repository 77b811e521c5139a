"""What the API accepts and answers. The OpenAPI document is made from these models, and bodies are checked by them.

Unknown fields are refused by name: a misspelt `temprature` that changes nothing would be worse.
"""

from __future__ import annotations

import itertools
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator
from pydantic.config import JsonDict

from meddam_core.focal import Aspect
from meddam_core.prompts import Length

MAX_REGIONS = 256
Coordinate = Annotated[float, Field(ge=-1e6, le=1e6, allow_inf_nan=False)]
Point = Annotated[list[Coordinate], Field(min_length=2, max_length=2, description="x, y in pixels")]
Name = Annotated[str, StringConstraints(min_length=1, max_length=200)]
Stop = Annotated[str, StringConstraints(min_length=1, max_length=200)]
Text = Annotated[str, StringConstraints(max_length=20_000)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class RunLengths(_Strict):
    """A mask as COCO run lengths."""

    size: Annotated[list[Annotated[int, Field(ge=1, le=65535)]], Field(min_length=2, max_length=2)]
    """Height, width: those of the image."""
    counts: str | Annotated[list[Annotated[int, Field(ge=0, le=1 << 32)]], Field(max_length=200_000, fail_fast=True)]
    """Compressed string, or list of run lengths."""


_WHERES = ("box", "mask", "polygon", "points")


def _both(a: str, b: str) -> JsonDict:
    given: JsonDict = {"not": {"type": "null"}}
    return {"required": [a, b], "properties": {a: given, b: given}}


_AT_MOST_ONE: JsonDict = {"not": {"anyOf": [_both(a, b) for a, b in itertools.combinations(_WHERES, 2)]}}


class Where(_Strict):
    """Where a region is; at most one of these."""

    model_config = ConfigDict(json_schema_extra=_AT_MOST_ONE)

    box: Annotated[list[Coordinate], Field(min_length=4, max_length=4)] | None = None
    """x0, y0, x1, y1 in pixels of the image; x1 and y1 are outside."""
    mask: RunLengths | str | None = None
    """Run lengths, or a PNG of the image's size (data URL or base64): nonzero inside."""
    polygon: Annotated[list[Point], Field(min_length=3, max_length=10_000, fail_fast=True)] | None = None
    """Corners of a closed outline."""
    points: Annotated[list[Point], Field(min_length=1, max_length=100)] | None = None
    """Clicks inside the region."""

    @model_validator(mode="after")
    def _one(self) -> Where:
        given = [n for n in _WHERES if getattr(self, n) is not None]
        if len(given) > 1:
            raise ValueError(f"a region is one of box, mask, polygon and points; these were given: {', '.join(given)}")
        return self


class ImageUrl(_Strict):
    """A picture."""

    url: Annotated[str, StringConstraints(min_length=5)]
    """data: URL with base64 content: PNG, JPEG, TIFF, WebP, BMP, GIF, DICOM or NIfTI. https only from allowed hosts."""
    detail: Literal["auto", "low", "high"] | None = None
    """Accepted for OpenAI's sake; DAM always sees the full view and the focal crop."""


class ImagePart(_Strict):
    """A picture in a message. Its region is its alpha channel, or one of the request's own fields."""

    type: Literal["image_url"]
    image_url: ImageUrl


class TextPart(_Strict):
    """A question in a message."""

    type: Literal["text"]
    text: Text


class Message(BaseModel):
    """One turn. DAM answers single questions: of a conversation it sees the last user text and the last images."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[ImagePart | TextPart], Field(max_length=64)] | None = None


class StreamOptions(_Strict):
    """For streams."""

    include_usage: bool = False
    """Whether a last chunk tells the counts of tokens."""


class TextFormat(_Strict):
    """Captions are text."""

    type: Literal["text"]


class Sampled(Where):
    """How tokens are chosen, and what the picture is shown as."""

    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    """0 is greedy."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=100_000)] | None = None
    """Sample from the k likeliest tokens; 0 is off."""
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    """The same seed gives the same caption, whatever else is served."""
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    """Ends the caption before the first of these strings."""
    prompt: Name | None = None
    """Id of a shipped prompt, such as meddam-v1-lung-ct, in place of a question."""
    length: Length | None = None
    """How long the answer should be."""
    recipe: Name | None = None
    """Rules of margin, window and views; by default by the image's modality, and the mask itself for masks."""
    frame: Annotated[int, Field(ge=0, le=1_000_000)] | None = None
    """Which frame or slice of the file, from 0."""
    window: Name | None = None
    """CT window preset, or header."""
    margin: Annotated[float, Field(ge=0, le=2)] | None = None
    """Share of a box's width and height added on each side; by default the recipe's."""
    aspect: Aspect | None = None
    """How a view is brought to a square; by default the recipe's."""
    template_set: Name | None = None
    """Vocabulary for the findings; by default by recipe or modality."""


class ChatRequest(Sampled):
    """POST /v1/chat/completions."""

    model: Name
    messages: Annotated[list[Message], Field(min_length=1, max_length=256)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    n: Annotated[int, Field(ge=1, le=8)] | None = None
    """Captions for the same region; they differ where the temperature is above 0."""
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: TextFormat | None = None
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    """Only 0."""
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    """Only 0."""
    logprobs: Literal[False] | None = None
    """Only false; the mean is in `meddam.mean_logprob`."""
    num_beams: Literal[1] | None = None
    """Of DAM's own server: only 1."""
    use_cache: bool | None = None
    """Of DAM's own server: has no effect."""
    user: Annotated[str, StringConstraints(max_length=500)] | None = None
    """Accepted for OpenAI's sake; not kept."""
    store: Literal[False] | None = None
    """Only false: nothing is stored."""


class RegionToDescribe(Where):
    """One region of `POST /v1/regions:describe`."""

    id: Annotated[str, StringConstraints(max_length=100)] | None = None
    """Comes back with the caption."""

    @model_validator(mode="after")
    def _some(self) -> RegionToDescribe:
        if all(getattr(self, n) is None for n in _WHERES):
            raise ValueError("a region needs a box, a mask, a polygon or points")
        return self


class DescribeRequest(Sampled):
    """POST /v1/regions:describe: one image, many regions."""

    image: Annotated[str, StringConstraints(min_length=4)]
    """base64 or data: URL: DICOM, PNG, JPEG, TIFF, WebP, BMP, GIF or NIfTI."""
    regions: Annotated[list[RegionToDescribe], Field(max_length=MAX_REGIONS, fail_fast=True)] = Field(
        default_factory=list
    )
    """None: those that the recipe's detector finds (skincon), or the image's alpha channel."""
    question: Text | None = None
    """Asked of every region, in place of a prompt."""
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    model: Name | None = None


class RenderRequest(_Strict):
    """POST /v1/images:render: a picture for people, of any file that can be described."""

    image: Annotated[str, StringConstraints(min_length=4)]
    frame: Annotated[int, Field(ge=0, le=1_000_000)] | None = None
    window: Name | None = None


# ---------------------------------------------------------------------------------------------------------------------
# Answers


class CodeOut(BaseModel):
    """A code of a public vocabulary."""

    system: str
    code: str
    display: str


class FindingOut(BaseModel):
    """One thing that a caption states or denies."""

    attribute: str
    value: str | None
    name: str
    present: bool
    hedged: bool
    length_mm: float | None
    codes: list[CodeOut]


class Described(BaseModel):
    """What is known of a caption beside its text."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    box: list[int] | None
    """Tight around the region; null for a video prompt."""
    confidence: float | None
    """Geometric mean of the tokens' probabilities: how sure the model was of its words, not whether they are true."""
    mean_logprob: float | None
    findings: list[FindingOut]
    template_set: str | None
    notice: str
    """That it is not for diagnosis."""


class AnswerMessage(BaseModel):
    """The caption."""

    role: Literal["assistant"]
    content: str


class Choice(BaseModel):
    """One caption."""

    index: int
    message: AnswerMessage
    finish_reason: Literal["stop", "length"]
    logprobs: None = None
    meddam: Described


class Usage(BaseModel):
    """Counts of tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: dict[str, int]


class ChatCompletion(BaseModel):
    """Answer of /v1/chat/completions; with `stream` it comes as chat.completion.chunk events."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[Choice]
    usage: Usage


class RegionDescribed(Described):
    """One region's caption, or why there is none."""

    id: str
    caption: str | None
    finish_reason: Literal["stop", "length", "error"]
    num_tokens: int
    error: dict[str, Any] | None


class ImageFacts(BaseModel):
    """What the file holds; nothing that names a patient."""

    width: int
    height: int
    modality: str
    num_frames: int
    frame: int | None
    recipe: str
    window: str | None
    windows: list[str]
    """Presets that can be asked for."""
    pixel_spacing_mm: list[float] | None


class DescribeResponse(BaseModel):
    """Answer of /v1/regions:describe."""

    id: str
    model: str
    image: ImageFacts
    regions: list[RegionDescribed]
    usage: Usage


class RenderResponse(BaseModel):
    """Answer of /v1/images:render."""

    image: ImageFacts
    png: str


class ModelCard(BaseModel):
    """One model."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelList(BaseModel):
    """Answer of /v1/models."""

    object: Literal["list"]
    data: list[ModelCard]


class ErrorDetail(BaseModel):
    """What was wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """Every answer that is not a success."""

    error: ErrorDetail
