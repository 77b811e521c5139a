"""Promptable segmentation: real checkpoints of random weights, loaded and run; the arithmetic around them is exact."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from meddam_core.records import RowError
from meddam_core.regions.geometry import tight_box
from meddam_core.regions.promptable import (
    Preparation,
    PromptableModel,
    RegionPrompt,
    Segmented,
    along,
    load_segmenter,
    propagate,
)


def make_sam(folder: Path) -> Path:
    """A SAM checkpoint of random weights, as transformers saves it."""
    import torch
    from transformers import SamConfig, SamModel

    torch.manual_seed(0)
    small = {"hidden_size": 32, "num_attention_heads": 2}
    config = SamConfig(
        vision_config={
            **small, "output_channels": 32, "num_hidden_layers": 2, "image_size": 64, "patch_size": 8, "window_size": 4,
            "global_attn_indexes": [1], "num_pos_feats": 16, "mlp_dim": 64, "initializer_range": 0.5,
        },
        prompt_encoder_config={"hidden_size": 32, "image_size": 64, "patch_size": 8, "mask_input_channels": 4},
        mask_decoder_config={**small, "mlp_dim": 64, "iou_head_hidden_dim": 32, "iou_head_depth": 2},
    )  # fmt: skip
    SamModel(config).save_pretrained(folder)
    return folder


def make_sam2(folder: Path) -> Path:
    """A SAM 2 checkpoint of random weights."""
    import torch
    from transformers import Sam2Config, Sam2Model

    torch.manual_seed(0)
    backbone = {
        "model_type": "sam2_hiera_det_model", "hidden_size": 8, "num_attention_heads": 1, "image_size": [64, 64],
        "blocks_per_stage": [1, 2, 2, 1], "embed_dim_per_stage": [8, 16, 32, 64],
        "num_attention_heads_per_stage": [1, 1, 2, 4], "window_size_per_stage": [8, 4, 4, 4],
        "global_attention_blocks": [2, 4], "window_positional_embedding_background_size": [4, 4],
    }  # fmt: skip
    config = Sam2Config(
        vision_config={
            "backbone_config": backbone, "backbone_channel_list": [64, 32, 16, 8], "fpn_hidden_size": 32,
            "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
        },
        prompt_encoder_config={"hidden_size": 32, "image_size": 64, "patch_size": 16, "mask_input_channels": 4},
        mask_decoder_config={
            "hidden_size": 32, "num_attention_heads": 2, "mlp_dim": 64, "iou_head_hidden_dim": 32, "iou_head_depth": 2,
        },
    )  # fmt: skip
    Sam2Model(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["sam", "sam2"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PromptableModel:
    folder = tmp_path_factory.mktemp(request.param)
    return load_segmenter(str((make_sam if request.param == "sam" else make_sam2)(folder)))


def _picture() -> NDArray[np.uint8]:
    rng = np.random.default_rng(0)
    return np.kron(rng.integers(0, 256, (10, 15, 3), np.uint8), np.ones((9, 9, 1), np.uint8))


PROMPTS = [
    RegionPrompt(box=(20, 10, 80, 60)),
    RegionPrompt(points=[(30, 40)]),
    RegionPrompt(points=[(30, 40), (50, 45)], not_points=[(120, 80)]),
    RegionPrompt(scribbles=[[(10, 10), (60, 40), (70, 80)]]),
    RegionPrompt(box=(20, 10, 80, 60), points=[(40, 30)]),
]


def test_every_kind_of_prompt_gives_a_mask_of_the_pictures_size(model: PromptableModel) -> None:
    found = model.segment(_picture(), PROMPTS)
    assert len(found) == len(PROMPTS)
    assert {f.mask_HW.shape for f in found} == {(90, 135)} and all(0 <= f.confidence <= 1 for f in found)
    assert any(f.mask_HW.any() and not f.mask_HW.all() for f in found), "masks must depend on pixels"
    for prompt, together in zip(PROMPTS, found, strict=True):
        (alone,) = model.segment(_picture(), [prompt])
        assert np.array_equal(alone.mask_HW, together.mask_HW)


def test_prompts_matter(model: PromptableModel) -> None:
    from meddam_core.regions.promptable import PromptableModel

    assert isinstance(model, PromptableModel)
    found = model.segment(_picture(), [RegionPrompt(box=(0, 0, 30, 30)), RegionPrompt(box=(60, 20, 134, 89))])
    assert found[0].confidence != found[1].confidence or not np.array_equal(found[0].mask_HW, found[1].mask_HW)


def test_what_is_no_prompt_and_no_checkpoint(model: PromptableModel, tmp_path: Path) -> None:
    assert model.segment(_picture(), []) == []
    with pytest.raises(ValueError, match="needs a box"):
        model.segment(_picture(), [RegionPrompt(not_points=[(3, 3)])])
    with pytest.raises(ValueError, match=r"no config\.json"):
        load_segmenter(str(tmp_path / "absent"))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ValueError, match="'bert'"):
        load_segmenter(str(tmp_path))


def test_preparation_is_the_processors_own() -> None:
    """transformers' processor for SAM, where it runs here, prepares the same pixels."""
    from transformers.models.sam.image_processing_pil_sam import SamImageProcessorPil

    image = _picture()
    processor = SamImageProcessorPil(size={"longest_edge": 270}, pad_size={"height": 270, "width": 270})
    theirs = np.asarray(processor(image, return_tensors="np")["pixel_values"])[0]
    ours = Preparation(side=270, stretch=False).pixels(image)
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).mean() < 0.05
    assert (ours[:, 180:] == 0).all()


def test_coordinates_follow_the_pixels() -> None:
    pad, stretch = Preparation(side=64, stretch=False), Preparation(side=64, stretch=True)
    assert pad.scaled((135, 90)) == (64, 43) and stretch.scaled((135, 90)) == (64, 64)
    image = np.zeros((90, 135, 3), np.uint8)
    image[60:80, 100:130] = 255
    for preparation in (pad, stretch):
        bright = preparation.pixels(image)[0] > 1
        x, y = preparation.scales((135, 90))
        assert np.allclose(tight_box(bright.astype(np.uint8)), (100 * x, 60 * y, 130 * x, 80 * y), atol=1.0)


def test_points_lie_evenly_along_a_scribble() -> None:
    assert along([(0, 0), (10, 0), (10, 10)], 5) == [(0, 0), (5, 0), (10, 0), (10, 5), (10, 10)]
    assert along([(3, 4)], 5) == [(3, 4)] and along([(3, 4), (3, 4)], 5) == [(3, 4)]


class _Bright:
    """A segmenter that knows the truth: bright pixels around the prompt's box."""

    def segment(self, image_HWC: NDArray[np.uint8], prompts: Sequence[RegionPrompt]) -> list[Segmented]:
        found = []
        for prompt in prompts:
            assert prompt.box is not None
            x0, y0, x1, y1 = (int(v) for v in prompt.box)
            mask = np.zeros(image_HWC.shape[:2], np.uint8)
            mask[max(y0 - 6, 0) : y1 + 6, max(x0 - 6, 0) : x1 + 6] = 1
            found.append(Segmented(mask_HW=mask * (image_HWC[..., 0] > 100), confidence=0.9))
        return found


def test_a_mask_moves_through_slices_until_the_structure_is_lost() -> None:
    frames = np.zeros((9, 64, 64, 3), np.uint8)
    for f in range(1, 7):  # it begins on slice 1, moves to the right, and ends on slice 6
        frames[f, 20:34, 10 + 4 * f : 24 + 4 * f] = 200
    mask = (frames[3, ..., 0] > 100).astype(np.uint8)
    masks = propagate(_Bright(), list(frames), 3, mask)
    assert [m is not None for m in masks] == [False, True, True, True, True, True, True, False, False]
    for f in range(1, 7):
        assert np.array_equal(masks[f], (frames[f, ..., 0] > 100).astype(np.uint8))
    frames[5] = 0
    frames[5, :, :] = 200  # leaks into everything: lost, and all that lies beyond
    lost = propagate(_Bright(), list(frames), 3, mask)
    assert lost[5] is None and lost[6] is None and lost[4] is not None
    with pytest.raises(RowError):
        propagate(_Bright(), list(frames), 3, mask * 0)
    with pytest.raises(ValueError, match="frame 9"):
        propagate(_Bright(), list(frames), 9, mask)


def test_the_real_model_propagates_too(model: PromptableModel) -> None:
    frames = [_picture()] * 3
    mask = np.zeros((90, 135), np.uint8)
    mask[20:60, 20:80] = 1
    masks = propagate(model, frames, 1, mask)
    assert np.array_equal(masks[1], mask) and len(masks) == 3
