"""From what a client sends to regions and a question: base64, data URLs, masks in alpha, run lengths, points.

    data = bytes_of(url, limits=limits)
    decoded = picture_of(data, frame=None, limits=limits)
    region, mask_HW = region_of(where, decoded, alpha_mask(decoded))
    query = query_of("Is the margin spiculated?", num_images=1)

Pure functions: no network, no engine, no Ray. Whatever is wrong with the data is a RowError or an ApiError, and neither
holds any of it.

Arrays: H rows, W columns.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from meddam_core.imaging.decode import decode
from meddam_core.imaging.decoded import Decoded
from meddam_core.imaging.limits import Limits
from meddam_core.imaging.sniff import sniff
from meddam_core.prompts import IMAGE_TOKEN, VIDEO_VIEWS, Length, length_text, list_prompts, load_prompt
from meddam_core.records import Reason, Region, RowError
from meddam_core.regions.geometry import checked_box, tight_box
from meddam_core.regions.masks import checked_mask, mask_of_png, mask_of_segmentation, rle_of
from ray_jobs.serve.errors import ApiError
from ray_jobs.serve.schema import ImagePart, Message, TextPart, Where

CLICK_SHARE = 1 / 24
"""Radius of the disc that a click stands for where no segmenter is configured, of the image's shorter side."""
_SINGLE_PREFIX = ("Image:", "Video:")


def bytes_of(text: str, *, limits: Limits, param: str = "image") -> bytes:
    """The bytes of a data: URL or of plain base64. Raises ApiError for anything else, and RowError(too_large)."""
    if text[:5].lower() == "data:":
        head, comma, text = text.partition(",")
        if not comma or not head.lower().endswith(";base64"):
            raise ApiError(400, "a data: URL needs base64 content: data:image/png;base64,...", param=param)
    elif "://" in text[:64]:
        raise ApiError(
            400, "pictures are not fetched from URLs here; send a data: URL", code="url_not_allowed", param=param
        )
    limits.check_file(len(text) * 3 // 4)
    try:
        return base64.b64decode("".join(text.split()) if "\n" in text else text, validate=True)
    except (binascii.Error, ValueError):
        raise ApiError(400, "not valid base64, or cut short", code="invalid_base64", param=param) from None


def picture_of(data: bytes, *, frame: int | None, limits: Limits) -> Decoded:
    """A file's picture; of a volume its first slice where no frame is named. Raises RowError as `decode` does."""
    if frame is None and sniff(data) in ("nifti", "gzip"):
        frame = 0
    return decode(data, frame=frame, limits=limits)


def alpha_mask(decoded: Decoded) -> NDArray[np.uint8] | None:
    """The picture's alpha channel as a mask (H, W), 1 where it is above 0; None without alpha."""
    return None if decoded.alpha_HW is None else (decoded.alpha_HW > 0).view(np.uint8)


def region_of(
    where: Where, decoded: Decoded, alpha_HW: NDArray[np.uint8] | None, *, ordinal: int = 0,
    limits: Limits | None = None, clicked_HW: NDArray[np.uint8] | None = None,
) -> tuple[Region, NDArray[np.uint8] | None]:  # fmt: skip
    """The region that a request names, else the picture's alpha channel; and its mask (H, W), None for a box.

    clicked_HW: what a segmenter made of `where.points`; without it each point is a disc.
    Raises RowError for a region that is broken, empty or outside, and no_regions where there is none at all.
    """
    size = (decoded.width, decoded.height)
    if where.box is not None:
        return Region(region_id=ordinal, box=checked_box(where.box, size), source="prompted"), None
    mask_HW = _mask_of(where, size, limits or Limits(), clicked_HW)
    if mask_HW is None and alpha_HW is not None:
        mask_HW = checked_mask(alpha_HW, size)
    if mask_HW is None:
        raise RowError(
            Reason.NO_REGIONS,
            "say which region: a PNG with the mask in its alpha channel, or a box, mask, polygon or points",
        )
    return Region(region_id=ordinal, box=tight_box(mask_HW), mask=rle_of(mask_HW), source="prompted"), mask_HW


def _mask_of(
    where: Where, size: tuple[int, int], limits: Limits, clicked_HW: NDArray[np.uint8] | None
) -> NDArray[np.uint8] | None:
    if isinstance(where.mask, str):
        return mask_of_png(bytes_of(where.mask, limits=limits, param="mask"), size)
    if where.mask is not None:
        return mask_of_segmentation({"size": where.mask.size, "counts": where.mask.counts}, size)
    if where.polygon is not None:
        return mask_of_segmentation([v for point in where.polygon for v in point], size)
    if where.points is not None:
        return checked_mask(discs(where.points, size) if clicked_HW is None else clicked_HW, size)
    return None


def discs(points: Sequence[Sequence[float]], size: tuple[int, int]) -> NDArray[np.uint8]:
    """(H, W) uint8, 1 within the discs around clicks. Raises RowError(box_outside) for a click outside the image."""
    width, height = size
    if any(not (0 <= x < width and 0 <= y < height) for x, y in points):
        raise RowError(Reason.BOX_OUTSIDE, f"a point lies outside the image of {width} x {height}")
    radius = max(4.0, CLICK_SHARE * min(width, height))
    mask_HW = np.zeros((height, width), np.uint8)
    for x, y in points:
        x0, y0 = max(0, int(x - radius)), max(0, int(y - radius))
        ys, xs = np.ogrid[y0 : min(height, int(y + radius) + 2), x0 : min(width, int(x + radius) + 2)]
        inside = (xs - x) ** 2 + (ys - y) ** 2 <= radius**2
        mask_HW[y0 : y0 + inside.shape[0], x0 : x0 + inside.shape[1]] |= inside.astype(np.uint8)
    return mask_HW


def asked_of(messages: Sequence[Message]) -> tuple[list[str], str]:
    """(URLs of the pictures, question) of a conversation: the last pictures and the last user text.

    A system message stands before the question. Raises ApiError where there is no picture.
    """
    pictures: list[str] = []
    text, system = "", []
    for message in messages:
        parts = [] if message.content is None else message.content
        texts = [parts] if isinstance(parts, str) else [p.text for p in parts if isinstance(p, TextPart)]
        urls = [] if isinstance(parts, str) else [p.image_url.url for p in parts if isinstance(p, ImagePart)]
        if message.role in ("system", "developer"):
            system += texts
        elif message.role == "user":
            pictures = urls or pictures
            text = "".join(texts) or text
    if not pictures:
        raise ApiError(400, "no picture in the messages: send one as an image_url", code="no_image", param="messages")
    if len(pictures) not in (1, VIDEO_VIEWS):
        raise ApiError(
            400, f"send one picture, or {VIDEO_VIEWS} frames of a clip; this request has {len(pictures)}",
            code="wrong_number_of_images", param="messages",
        )  # fmt: skip
    return pictures, "\n".join([*(s.strip() for s in system if s.strip()), text] if text.strip() else [text])


def query_of(text: str, num_images: int, joint: bool = False) -> str:
    """The model's query around a question, as DAM's own server builds it (fact: it strips such prefixes and adds its
    own). Raises ApiError for `<image>` within the text.
    """
    text = text.strip()
    for prefix in _SINGLE_PREFIX:
        text = text.removeprefix(prefix)
    text = text.strip()
    while text.startswith(IMAGE_TOKEN):
        text = text.removeprefix(IMAGE_TOKEN)
    if IMAGE_TOKEN in text:
        raise ApiError(400, f"{IMAGE_TOKEN} may only stand at the beginning of the question", param="messages")
    text = text.strip()
    if num_images == VIDEO_VIEWS:
        return f"Video: {IMAGE_TOKEN * VIDEO_VIEWS}\n{text}"
    return f"Image: {IMAGE_TOKEN}\n{text}" if joint else f"{IMAGE_TOKEN}\n{text}"


def question_of(text: str, prompt: str | None, length: Length | None, default: str) -> str:
    """What to ask: the text, else the prompt of that id, else the default; at the length asked for.

    Raises ApiError for a prompt that is not a shipped one.
    """
    if text.strip():
        if prompt is not None:
            raise ApiError(400, "give either a question or `prompt`, not both", param="prompt")
        return f"{text.strip()}\n{length_text(length)}" if length else text
    if prompt is not None and prompt.split("+")[0] not in (names := {p.id for p in list_prompts()}):
        raise ApiError(400, f"there is no such prompt; use one of {', '.join(sorted(names))}", param="prompt")
    chosen = prompt or default
    try:
        return load_prompt(f"{chosen}+{length}" if length and length != "paragraph" else chosen).text
    except ValueError as error:
        raise ApiError(400, str(error), param="length" if length else "prompt") from None
