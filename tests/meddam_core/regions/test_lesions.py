"""The weight-free lesion detector: every tone of skin, drapes, bad light, and honesty where it finds nothing."""

from __future__ import annotations

import dataclasses

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from meddam_core.datasets.phantoms import Options, make_phantom, skin
from meddam_core.datasets.phantoms.texture import cloud
from meddam_core.records import Box
from meddam_core.regions.geometry import intersection_over_union, tight_box
from meddam_core.regions.lesions import FALLBACK_CONFIDENCE, detect_lesions

SIDE = 512
TONES = range(6)
RED, BROWN, PALE = (0.74, 0.17, 0.16), (0.30, 0.16, 0.08), (0.97, 0.90, 0.85)


def photograph(
    seed: int, tone: int, colour: tuple[float, float, float], radius: float, *, num: int = 1, hairs: int = 0,
    shade: float = 0.0, drape: tuple[float, float, float] | None = None, cover: float = 0.8,
) -> tuple[NDArray[np.uint8], Box | None]:  # fmt: skip
    """A photograph of `num` blots on skin of one tone, and the tight box of all of them."""
    rng = np.random.default_rng(seed)
    patch = dataclasses.replace(skin.draw_patch(rng, SIDE), tone=skin._TONES[tone], hairs=hairs)
    image = skin.background(rng, patch)
    y, x = np.mgrid[0:SIDE, 0:SIDE].astype(np.float32) / SIDE
    image = image * (1 - shade * ((x - 0.3) ** 2 + (y - 0.3) ** 2))[..., None]
    mask = np.zeros((SIDE, SIDE), np.bool_)
    centres = [(0.5, 0.52)] if num == 1 else rng.uniform(0.1, 0.9, (num, 2))
    for cx, cy in centres:
        mask |= np.hypot(x - cx, y - cy) + cloud(rng, SIDE, SIDE / 6, 3) * 0.02 < radius
    alpha = cv2.GaussianBlur(mask.astype(np.float32), (0, 0), 2)[..., None] * cover
    image = skin.hair(rng, patch, (image * (1 - alpha) + np.array(colour, np.float32) * alpha).astype(np.float32))
    if drape is not None:
        limb = np.abs((y - 0.5) + 0.25 * (x - 0.5)) < 0.27
        cloth = np.array(drape, np.float32) * (1 + 0.03 * cloud(rng, SIDE, 40, 2))[..., None]
        image = np.where(limb[..., None], image, cloth).astype(np.float32)
        mask &= limb
    return skin.stored(rng, image), tight_box(mask.astype(np.uint8)) if mask.any() else None


@pytest.mark.parametrize("tone", TONES)
@pytest.mark.parametrize(("colour", "radius"), [(RED, 0.24), (BROWN, 0.15), (PALE, 0.12)])
def test_a_lesion_is_boxed_on_every_tone_of_skin(tone: int, colour: tuple[float, float, float], radius: float) -> None:
    image_HWC, truth = photograph(tone, tone, colour, radius, hairs=8)
    best = detect_lesions(image_HWC)[0]
    assert truth is not None
    if best.kind == "lesion":
        assert intersection_over_union(best.box, truth) > (0.8 if best.confidence > 0.6 else 0.6)
    else:  # pale on the palest, brown on the darkest: not told from skin, and it says so
        assert (tone, colour) in {(0, PALE), (5, BROWN)} and best.confidence <= FALLBACK_CONFIDENCE


@pytest.mark.parametrize("tone", [0, 3, 5])
@pytest.mark.parametrize("drape", [(0.1, 0.25, 0.45), (0.02, 0.02, 0.02), (0.85, 0.86, 0.86)])
def test_what_stands_behind_a_limb_is_no_lesion(tone: int, drape: tuple[float, float, float]) -> None:
    image_HWC, truth = photograph(7, tone, RED, 0.1, drape=drape)
    best = detect_lesions(image_HWC)[0]
    assert truth is not None and best.kind == "lesion"
    assert intersection_over_union(best.box, truth) > 0.75


@pytest.mark.parametrize("tone", TONES)
def test_uneven_light_is_no_lesion_and_hides_none(tone: int) -> None:
    image_HWC, truth = photograph(11, tone, RED, 0.18, shade=0.6)
    assert truth is not None
    assert intersection_over_union(detect_lesions(image_HWC)[0].box, truth) > 0.8


@pytest.mark.parametrize("tone", TONES)
def test_clear_skin_gives_the_central_box_and_little_confidence(tone: int) -> None:
    image_HWC, _ = photograph(tone, tone, RED, -1, hairs=8)
    (only,) = detect_lesions(image_HWC)
    assert only.kind == "central" and only.confidence <= FALLBACK_CONFIDENCE
    assert only.box == (77, 77, 435, 435)


@pytest.mark.parametrize("tone", [0, 3, 5])
def test_an_extensive_eruption_is_the_whole_picture(tone: int) -> None:
    image_HWC, _ = photograph(3, tone, RED, 0.04, num=28)
    (only,) = detect_lesions(image_HWC)
    assert (only.kind, only.box) == ("whole", (0, 0, SIDE, SIDE))
    assert only.confidence <= FALLBACK_CONFIDENCE


def test_phantoms_of_all_tones() -> None:
    best, found, num = [], 0, 0
    for index in range(24):
        phantom = make_phantom("skin", 1, index, Options(size=512))
        truth = [tight_box(r.mask_HW) for r in phantom.regions if r.truth["kind"] == "lesion"]
        boxes = [d.box for d in detect_lesions(phantom.stored)]  # type: ignore[arg-type]
        best.append(max(intersection_over_union(boxes[0], t) for t in truth))
        found += sum(any(intersection_over_union(b, t) > 0.4 for b in boxes) for t in truth)
        num += len(truth)
    assert np.mean([b > 0.5 for b in best]) >= 0.75  # 0.83 when written; the rest took a pen's mark first
    assert found / num >= 0.85  # 0.91 when written


def test_confidence_tells_good_boxes_from_bad_ones() -> None:
    strong = [detect_lesions(photograph(i, i % 6, RED, 0.2)[0])[0].confidence for i in range(6)]
    faint = [detect_lesions(photograph(i, i % 6, RED, 0.2, cover=0.12)[0])[0].confidence for i in range(6)]
    assert min(strong) > 0.8 and np.mean(faint) < np.mean(strong) - 0.3


def test_boxes_are_in_pixels_of_the_picture_whatever_its_size() -> None:
    image_HWC, _ = photograph(1, 2, RED, 0.2)
    large = cv2.resize(image_HWC, (3 * SIDE, 2 * SIDE), interpolation=cv2.INTER_CUBIC)
    small, big = detect_lesions(image_HWC)[0].box, detect_lesions(large)[0].box
    scaled = (3 * small[0], 2 * small[1], 3 * small[2], 2 * small[3])
    assert intersection_over_union(scaled, big) > 0.9
    assert detect_lesions(image_HWC) == detect_lesions(image_HWC.copy())


def test_odd_pictures_give_a_box_too() -> None:
    for shape in ((10, 10, 3), (4, 900, 3), (300, 20, 3)):
        (only,) = detect_lesions(np.full(shape, 128, np.uint8))
        assert only.box == (0, 0, shape[1], shape[0]) and only.kind == "whole"
    for value in (0, 128, 255):
        assert detect_lesions(np.full((200, 300, 3), value, np.uint8))[0].kind == "central"
    noise = np.random.default_rng(0).integers(0, 256, (200, 300, 3), np.uint8)
    assert detect_lesions(noise)
    with pytest.raises(ValueError, match="uint8 RGB"):
        detect_lesions(np.zeros((20, 20), np.uint8))  # type: ignore[arg-type]
    assert len(detect_lesions(make_phantom("skin", 1, 0, Options(size=512)).stored, max_regions=2)) == 2  # type: ignore[arg-type]
