"""A model that cannot see yet learns to, by naming labels; what it is given is what is true."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from meddam_core.dam.checkpoint import load_dam, save_dam
from meddam_core.prompts import load_prompt
from meddam_core.training.augment import Augmentation
from meddam_core.training.batch import IGNORED, Collator
from meddam_core.training.labels import MAX_VALUES, LabelSet, learn_labels
from meddam_core.training.optim import Schedule
from meddam_core.training.texts import Texts
from meddam_core.training.tiny import even_patches, new_dam
from meddam_core.training.trainer import Settings, Trainer
from tests.meddam_core.training.made import examples, small_dam

LABELS = [{"tone": "light", "shape": "round"}, {"tone": "dark", "shape": "round"}]


def test_labels_with_two_to_many_values_are_learnt() -> None:
    sizes = [{"size_mm": str(i)} for i in range(MAX_VALUES + 1)]
    facts = LabelSet.of([*LABELS, *sizes])
    assert facts.values == {"tone": ("dark", "light")}  # one shape only, and too many sizes
    assert facts.codes({"tone": "light", "size_mm": "3"}) == [1]
    assert facts.codes({"tone": "grey"}) == [IGNORED]


def test_a_label_that_cannot_be_learnt_is_named() -> None:
    with pytest.raises(ValueError, match=r"shape cannot be learnt from these shards. Choose some of: tone"):
        LabelSet.of(LABELS, ["shape"])
    with pytest.raises(ValueError, match="there are none"):
        LabelSet.of([])


def test_a_model_learns_to_tell_light_from_dark_and_keeps_nothing_of_its_heads(tmp_path) -> None:  # type: ignore[no-untyped-def]
    dam = small_dam()
    facts = LabelSet.of(LABELS, ["tone"])
    learn_labels(dam, facts)
    texts = Texts((load_prompt("dam-default"),), "truth")
    collate = Collator(dam.tokenizer, dam.config.num_image_tokens, texts, Augmentation(0), 0, codes=facts.codes)
    shown = [replace(e, labels=LABELS[e.region_id % 2]) for e in examples(8, dam.config.view_size)]
    batch = collate(shown, 0)
    assert batch.codes_BK is not None and batch.codes_BK.flatten().tolist() == [1, 0] * 4 and batch.num_targets == 8
    words = [p.detach().clone() for p in dam.llm.parameters()]
    trainer = Trainer(dam, Settings(schedule=Schedule(learning_rate=1e-3, warmup_steps=2, max_steps=12)))
    losses = [trainer.train_step([batch]) for _ in range(12)]
    assert losses[-1] < 0.1 < losses[0]
    assert all(torch.equal(a, b) for a, b in zip(words, dam.llm.parameters(), strict=True))
    save_dam(dam, tmp_path)
    again = load_dam(tmp_path)  # names every tensor that it does not know
    assert torch.equal(again.encode(batch.views_B8SS), dam.eval().encode(batch.views_B8SS))


def test_patches_start_even_and_each_sees_something_else() -> None:
    weight = even_patches(128, 16, seed=3).flatten(1)
    gram = weight @ weight.T
    assert torch.linalg.matrix_rank(gram) == 128
    rng = np.random.default_rng(0)
    spectrum = np.fft.fftshift(np.abs(np.fft.fft2(rng.standard_normal((64, 64)))))
    distance = np.hypot(*(np.indices((64, 64)) - 32)) + 1
    phase = np.exp(2j * np.pi * rng.random((64, 64)))
    natural = np.real(np.fft.ifft2(np.fft.ifftshift(spectrum * phase / distance)))  # 1 / f, as pictures are
    picture = torch.tensor(np.repeat(natural[None, None], 3, 1), dtype=torch.float32)
    kernels = even_patches(128, 16, seed=3)
    seen = torch.nn.functional.conv2d(picture, kernels, stride=16).flatten(2)[0]
    drawn = torch.randn(128, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    plain = torch.nn.functional.conv2d(picture, drawn, stride=16).flatten(2)[0]

    def evenness(rows: torch.Tensor) -> float:
        """Share of the energy that is not in the strongest direction."""
        strengths = torch.linalg.svdvals(rows) ** 2
        return float(1 - strengths[0] / strengths.sum())

    assert evenness(seen) > evenness(plain)


def test_a_new_model_starts_the_same_from_the_same_seed() -> None:
    captions = [f"A {size} {tone} nodule lies in the upper zone." for size in ("small", "large") for tone in "abcdef"]
    first, second = new_dam(captions * 20, 4), new_dam(captions * 20, 4)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
