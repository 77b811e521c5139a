"""Points, scribbles and boxes -> masks, with a SAM, SAM 2 or MedSAM checkpoint; and one mask through neighbour slices.

    segmenter = load_segmenter("/weights/medsam-vit-base")
    (found,) = segmenter.segment(image_HWC, [RegionPrompt(box=(30, 40, 90, 120))])
    masks = propagate(segmenter, slices_FHWC, at=4, mask_HW=found.mask_HW)

Checkpoints are folders in the layout of Hugging Face transformers (config.json, model.safetensors): `sam` (SAM, MedSAM)
or `sam2` (SAM 2, 2.1; `sam2_video` folders too). Pixels are prepared here as the models' papers say, by the values of
the folder's preprocessor_config.json where it has one, so that neither torchvision nor a further package is needed:
SAM takes the picture with its long side scaled and the rest padded, SAM 2 takes it stretched to a square.

Invariants:
- nothing is downloaded: a folder that is not there is a ValueError;
- torch and transformers are imported by `load_segmenter`, not before;
- the same picture, prompt and weights give the same mask, whatever else is prompted with it.

Arrays: F frames, H rows, W columns, C colours R, G, B; S the model's input side.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import cv2
import numpy as np
from numpy.typing import NDArray

from meddam_core.regions.geometry import intersection_over_union, tight_box

Point = tuple[float, float]
Family = Literal["sam", "sam2"]
_FAMILIES: dict[str, Family] = {"sam": "sam", "sam2": "sam2", "sam2_video": "sam2"}
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet, as both models were trained with."""
SCRIBBLE_POINTS = 12
"""Points taken from a scribble, evenly along it."""
MAX_CHANGE = 3.0
"""A structure that grows or shrinks by more than this from one slice to the next has been lost."""
MIN_OVERLAP = 0.1
"""Least intersection over union of a structure's boxes on neighbour slices."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RegionPrompt:
    """What a person or a dataset says about where a region is, in pixels of the picture. At least one is given."""

    box: tuple[float, float, float, float] | None = None
    """x0, y0, x1, y1."""
    points: Sequence[Point] = ()
    """(x, y) inside the region."""
    not_points: Sequence[Point] = ()
    """(x, y) outside it."""
    scribbles: Sequence[Sequence[Point]] = field(default=())
    """Lines drawn inside the region."""

    def all_points(self) -> tuple[list[Point], list[int]]:
        """Points with 1 for inside and 0 for outside."""
        inside = [*self.points, *(p for line in self.scribbles for p in along(line, SCRIBBLE_POINTS))]
        return [*inside, *self.not_points], [1] * len(inside) + [0] * len(self.not_points)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Segmented:
    """A mask that was found."""

    mask_HW: NDArray[np.uint8]
    """1 inside; may be empty."""
    confidence: float
    """The model's own estimate of the mask's overlap with the truth, 0 to 1."""


class Segmenter(Protocol):
    """Anything that turns prompts into masks."""

    def segment(self, image_HWC: NDArray[np.uint8], prompts: Sequence[RegionPrompt]) -> list[Segmented]:
        """A mask for each prompt, in their order."""
        ...


def along(line: Sequence[Point], num: int) -> list[Point]:
    """`num` points evenly along a line, its ends among them; fewer where it has no length."""
    corners = np.array(line, np.float64).reshape(-1, 2)
    lengths = np.hypot(*np.diff(corners, axis=0).T) if len(corners) > 1 else np.zeros(0)
    if not lengths.sum():
        return [(float(x), float(y)) for x, y in corners[:1]]
    at = np.concatenate([[0.0], np.cumsum(lengths)])
    steps = np.linspace(0, at[-1], num)
    return [(float(np.interp(s, at, corners[:, 0])), float(np.interp(s, at, corners[:, 1]))) for s in steps]


@dataclass(frozen=True, slots=True, kw_only=True)
class Preparation:
    """How a picture becomes the model's input."""

    side: int
    stretch: bool
    """Whether both sides are scaled to `side`; otherwise the long one, and the rest is padded."""
    mean: tuple[float, ...] = _MEAN
    std: tuple[float, ...] = _STD
    normalize: bool = True

    def scales(self, size: tuple[int, int]) -> tuple[float, float]:
        """(x, y): input pixels per pixel of a picture of `size` (width, height)."""
        width, height = self.scaled(size)
        return width / size[0], height / size[1]

    def scaled(self, size: tuple[int, int]) -> tuple[int, int]:
        """(width, height) of the picture within the input."""
        if self.stretch:
            return self.side, self.side
        scale = self.side / max(size)
        return max(1, int(size[0] * scale + 0.5)), max(1, int(size[1] * scale + 0.5))

    def pixels(self, image_HWC: NDArray[np.uint8]) -> NDArray[np.float32]:
        """(3, S, S) float32."""
        size = image_HWC.shape[1], image_HWC.shape[0]
        way = cv2.INTER_AREA if max(size) > self.side else cv2.INTER_LINEAR
        resized = cv2.resize(image_HWC, self.scaled(size), interpolation=way)
        small = np.asarray(resized, np.float32) / np.float32(255)
        if self.normalize:
            mean, std = np.array(self.mean, np.float32), np.array(self.std, np.float32)
            small = np.asarray((small - mean) / std, np.float32)
        whole = np.zeros((self.side, self.side, 3), np.float32)
        whole[: small.shape[0], : small.shape[1]] = small
        return np.ascontiguousarray(whole.transpose(2, 0, 1))


class PromptableModel:
    """SAM, SAM 2 or MedSAM. Made by `load_segmenter`."""

    def __init__(self, model: Any, preparation: Preparation) -> None:
        self._model = model
        self._preparation = preparation

    def segment(self, image_HWC: NDArray[np.uint8], prompts: Sequence[RegionPrompt]) -> list[Segmented]:
        """A mask for each prompt; the picture is encoded once. Raises ValueError for an empty prompt."""
        import torch

        if not prompts:
            return []
        weights = next(self._model.parameters())
        with torch.inference_mode():
            pixels = torch.from_numpy(self._preparation.pixels(image_HWC))[None].to(weights.device, weights.dtype)
            picture = self._model.get_image_embeddings(pixels)
            return [self._one(picture, prompt, image_HWC.shape[:2]) for prompt in prompts]

    def _one(self, picture: Any, prompt: RegionPrompt, shape: tuple[int, int]) -> Segmented:
        import torch

        weights = next(self._model.parameters())
        scale = np.array(self._preparation.scales((shape[1], shape[0])))
        points, inside = prompt.all_points()
        if prompt.box is None and not any(inside):
            raise ValueError("a prompt needs a box, a scribble or a point inside the region")
        given: dict[str, Any] = {}
        if points:
            placed = torch.tensor(np.array(points) * scale)[None, None].to(weights.device, weights.dtype)
            given |= {"input_points": placed, "input_labels": torch.tensor(inside, device=weights.device)[None, None]}
        if prompt.box is not None:
            box = np.array(prompt.box).reshape(2, 2) * scale
            given["input_boxes"] = torch.tensor(box.reshape(1, 1, 4)).to(weights.device, weights.dtype)
        several = prompt.box is None and len(points) == 1  # a single point may mean a part or the whole
        found = self._model(image_embeddings=picture, multimask_output=several, **given)
        scores = found.iou_scores.reshape(-1).float()
        best = int(scores.argmax())
        low = found.pred_masks.reshape(-1, *found.pred_masks.shape[-2:])[best].float().cpu().numpy()
        return Segmented(mask_HW=self._mask(low, shape), confidence=float(np.clip(scores[best].item(), 0, 1)))

    def _mask(self, logits_hw: NDArray[np.float32], shape: tuple[int, int]) -> NDArray[np.uint8]:
        """The mask at the picture's size: upsampled to the input's, without its padding, then to the picture's."""
        side, (width, height) = self._preparation.side, self._preparation.scaled((shape[1], shape[0]))
        whole = cv2.resize(logits_hw, (side, side), interpolation=cv2.INTER_LINEAR)[:height, :width]
        full = cv2.resize(whole, (shape[1], shape[0]), interpolation=cv2.INTER_LINEAR)
        return np.asarray(full > 0, np.uint8)


def load_segmenter(folder: str, device: str = "cpu", dtype: str = "float32") -> PromptableModel:
    """The segmenter of a checkpoint folder. Raises ValueError where it is none that can be used."""
    path = Path(folder).expanduser()
    config = _json(path / "config.json")
    if config is None:
        raise ValueError(
            f"{folder} is no checkpoint folder: it has no config.json. Give a SAM, SAM 2 or MedSAM folder in the "
            "layout of Hugging Face transformers; a single .pth file must be converted first"
        )
    family = _FAMILIES.get(str(config.get("model_type")))
    if family is None:
        raise ValueError(f"{folder} is a {config.get('model_type')!r}; use one of {', '.join(_FAMILIES)}")
    import torch
    import transformers

    kind: Any = transformers.SamModel if family == "sam" else transformers.Sam2Model
    model = kind.from_pretrained(path, local_files_only=True, dtype=getattr(torch, dtype)).to(device).eval()
    side = int(
        model.config.vision_config.image_size if family == "sam" else model.config.prompt_encoder_config.image_size
    )
    return PromptableModel(model, _preparation(family, side, _json(path / "preprocessor_config.json") or {}))


def _preparation(family: Family, side: int, config: dict[str, Any]) -> Preparation:
    return Preparation(
        side=side, stretch=family == "sam2", mean=tuple(config.get("image_mean") or _MEAN),
        std=tuple(config.get("image_std") or _STD), normalize=bool(config.get("do_normalize", True)),
    )  # fmt: skip


def _json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    loaded = json.loads(path.read_text("utf-8"))
    return loaded if isinstance(loaded, dict) else None


def propagate(
    segmenter: Segmenter, frames_FHWC: Sequence[NDArray[np.uint8]], at: int, mask_HW: NDArray[np.uint8]
) -> list[NDArray[np.uint8] | None]:
    """A region drawn on frame `at`, on each of the frames: outwards, each prompted with its neighbour's tight box.

    None from where on the structure is lost: its mask empty, or grown, shrunk or moved too far from one frame to the
    next. Raises RowError(mask_empty) for an empty mask, ValueError where `at` is no frame.
    """
    if not 0 <= at < len(frames_FHWC):
        raise ValueError(f"frame {at} of {len(frames_FHWC)}")
    masks: list[NDArray[np.uint8] | None] = [None] * len(frames_FHWC)
    masks[at] = (mask_HW != 0).astype(np.uint8)
    start = tight_box(mask_HW)
    for path in (range(at + 1, len(frames_FHWC)), range(at - 1, -1, -1)):
        box, area = start, int((mask_HW != 0).sum())
        for frame in path:
            (found,) = segmenter.segment(frames_FHWC[frame], [RegionPrompt(box=box)])
            now = int(found.mask_HW.sum())
            if not now or not 1 / MAX_CHANGE <= now / area <= MAX_CHANGE:
                break
            moved = tight_box(found.mask_HW)
            if intersection_over_union(box, moved) < MIN_OVERLAP:
                break
            masks[frame], box, area = found.mask_HW, moved, now
    return masks
