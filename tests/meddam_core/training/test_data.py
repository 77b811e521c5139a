"""Order, texts, batches, augmentation: what is shown depends on the seed and the step alone, and stays true."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice

import numpy as np
import pytest

from meddam_core.dam.tokens import IMAGE_TOKEN_ID, Tokenizer
from meddam_core.training.augment import Augmentation, swapped
from meddam_core.training.batch import IGNORED, Collator
from meddam_core.training.examples import Example
from meddam_core.training.looks import seen
from meddam_core.training.order import File, batches, share
from meddam_core.training.texts import Texts, length_of
from meddam_core.training.tiny import grid_waves
from meddam_core.training.vocabulary import prompt_lines, train_tokenizer
from tests.meddam_core.training.made import examples, small_dam

FILES = [File(f"f{i}", n) for i, n in enumerate((5, 7, 6, 9, 4))]
LESION = {
    "kind": "lesion", "finding": "nodule", "part": "whole", "density": "solid", "shape": "round", "margin": "smooth",
    "texture": "homogeneous", "side": "left", "zone": "anterior", "size": "small", "size_mm": "20",
}  # fmt: skip


def _read(file: File) -> list[Example]:
    first = 100 * int(file.uri[1:])
    return [replace(e, region_id=first + i) for i, e in enumerate(examples(file.num_examples, 16))]


def _ids(start: int, count: int) -> list[tuple[int, list[int]]]:
    stream = batches(FILES, _read, batch_size=3, window=2, seed=4, start=start)
    return [(epoch, [e.region_id for e in found]) for epoch, found in islice(stream, count)]


def test_a_stream_that_starts_later_goes_on_as_the_whole_one() -> None:
    whole = _ids(0, 30)
    for start in (1, 7, 12, 25):
        assert _ids(start, 30 - start) == whole[start:]
    assert whole[-1][0] > 1  # several epochs, each in its own order
    first = [ids for epoch, ids in whole if epoch == 0]
    assert len({i for ids in first for i in ids}) == sum(len(ids) for ids in first)
    assert first != [ids for epoch, ids in whole if epoch == 1][: len(first)]


def test_workers_share_the_files() -> None:
    assert sorted(f.uri for rank in range(2) for f in share(FILES, rank, 2)) == [f.uri for f in FILES]
    with pytest.raises(ValueError, match="5 files for 6 workers"):
        share(FILES, 0, 6)
    with pytest.raises(ValueError, match="do not fill a batch"):
        next(batches(FILES, _read, batch_size=100, window=1, seed=0))


def test_only_the_caption_and_its_end_are_learnt() -> None:
    dam = small_dam()
    texts = Texts.of(("dam-default",), "table")
    collate = Collator(dam.tokenizer, dam.config.num_image_tokens, texts, Augmentation(0), 0)
    batch = collate(examples(2, dam.config.view_size), 0)
    for row in range(2):
        learnt = batch.targets_BL[row][batch.targets_BL[row] != IGNORED].tolist()
        caption = dam.tokenizer.encode(examples(2, 8)[row].captions[0][1])[1:]
        assert learnt == [*caption, dam.tokenizer.eos_id]
        assert int((batch.ids_BL[row] == IMAGE_TOKEN_ID).sum()) == dam.config.num_image_tokens


def test_a_presentation_does_not_depend_on_its_batch() -> None:
    dam = small_dam()
    texts = Texts.of(("dam-default",), "table")
    collate = Collator(dam.tokenizer, dam.config.num_image_tokens, texts, Augmentation(1.0), 3)
    shown = examples(3, dam.config.view_size)
    together, alone = collate(shown, 2), collate(shown[1:2], 2)
    assert np.array_equal(together.views_B8SS[1], alone.views_B8SS[0])
    assert not np.array_equal(collate(shown[1:2], 3).views_B8SS[0], alone.views_B8SS[0])


def test_augmentation_never_flips_and_moves_mask_with_image() -> None:
    rng = np.random.default_rng(0)
    views_8SS = np.full((8, 64, 64), 40, np.uint8)
    views_8SS[[3, 7]] = 0
    views_8SS[:, 8:24, 8:24] = 230  # upper left, in image and mask alike
    for _ in range(40):
        changed = Augmentation(1.0)(views_8SS, rng).astype(float)
        for image, mask in ((changed[0], changed[3]), (changed[4], changed[7])):
            rows, columns = np.nonzero(mask > 127)
            assert rows.mean() < 28 and columns.mean() < 28
            assert image[mask > 200].mean() > 1.5 * image[mask < 20].mean()


def test_swapped_views_carry_the_facts_of_their_owners() -> None:
    views = np.arange(8, dtype=np.uint8)[:, None, None] * np.ones((8, 4, 4), np.uint8)
    a = Example(region_id=1, image_id=1, split="", modality="CT", labels=LESION, views_8SS=views)
    labels = {**LESION, "side": "right", "size": "large", "size_mm": "50", "margin": "spiculated", "finding": "mass"}
    b = replace(a, region_id=2, labels=labels, views_8SS=views + 100)
    both = swapped(a, b)
    assert both.labels["side"] == "left" and both.labels["size"] == "small" and both.labels["margin"] == "spiculated"
    assert both.labels["finding"] == "nodule"  # a mass is a nodule of more than 3 cm, and the size is the full view's
    assert both.views_8SS[:4].max() < 10 and both.views_8SS[4:].min() >= 104
    with pytest.raises(ValueError, match="one modality"):
        swapped(a, replace(b, modality="XC"))


def test_ablations_of_what_is_seen() -> None:
    views = np.arange(8, dtype=np.uint8)[:, None, None] * np.ones((8, 2, 2), np.uint8)
    assert seen(views, "focal")[:, 0, 0].tolist() == [4, 5, 6, 7, 4, 5, 6, 7]
    assert seen(views, "full")[:, 0, 0].tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    assert seen(views, "no-mask")[:, 0, 0].tolist() == [0, 1, 2, 255, 4, 5, 6, 255]


def test_prompts_fit_their_modality_and_set_the_length() -> None:
    texts = Texts.of(("meddam-v1-lung-ct", "meddam-v1-dermatology+sentence"), "truth")
    ct = Example(
        region_id=1, image_id=1, split="", modality="CT", labels=LESION, views_8SS=np.zeros((8, 2, 2), np.uint8)
    )
    query, caption = texts.choose(ct, np.random.default_rng(0))
    assert "CT slice" in query and "solid" in caption and "left lung" in caption
    assert length_of("meddam-v1-dermatology+sentence") == "sentence" and length_of("meddam-v1") == "paragraph"
    with pytest.raises(ValueError, match="none of the prompts"):
        texts.choose(replace(ct, modality="DX"), np.random.default_rng(0))
    with pytest.raises(ValueError, match="one <image>"):
        Texts.of(("dam-video",), "table")


def test_a_tokenizer_of_its_own_keeps_prompt_lines_whole() -> None:
    captions = ["A small solid round nodule lies in the left lung.", "It has a spiculated margin and a texture."] * 30
    query = "<image>\nDescribe the region.\n\n- Be precise."
    tokenizer = Tokenizer(train_tokenizer(captions, prompt_lines([query]), vocab_size=400))
    ids = tokenizer.encode_prompt(query)
    assert len(ids) < 12 and IMAGE_TOKEN_ID in ids
    for text in (*captions[:2], "Never seen: 3.5 mm, Ångström."):
        assert tokenizer.decode(tokenizer.encode(text)).strip() == text
    with pytest.raises(ValueError, match="too small"):
        train_tokenizer(captions, prompt_lines([query]), vocab_size=100)


def test_positions_start_apart() -> None:
    waves = grid_waves(8, 160)
    distances = (waves[:, None] - waves[None]).norm(dim=-1)
    assert waves.shape == (64, 160)
    assert distances[~np.eye(64, dtype=bool)].min() > 0.3
