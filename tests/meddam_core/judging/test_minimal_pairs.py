"""Minimal pairs differ in one value, and their figures tell a model that sees from one that prefers common words."""

from __future__ import annotations

import random

import numpy as np
import pytest

from meddam_core.judging.claims import audit
from meddam_core.judging.minimal_pairs import Pair, PairScore, minimal_pairs, pair_figures
from meddam_core.records import Label
from qa_library import load_library
from qa_library.truth import Truth, truth_of
from tests.meddam_core.judging.test_scores import phantoms
from tests.ray_jobs.made_lidc_rows import nodule_labels

LIBRARY = load_library()
NODULE = LIBRARY.sets["lidc_idri"]


def truth(seed: int) -> Truth:
    return truth_of(NODULE, nodule_labels(np.random.default_rng(seed)))


def test_a_flip_changes_one_claim_and_makes_it_wrong() -> None:
    checked = 0
    for seed in range(12):
        known = truth(seed)
        for pair in minimal_pairs(NODULE, known, random.Random(seed)):
            right, wrong = ({(c.attribute, c.value, c.status): c.verdict for c in audit(t, NODULE, known)}
                            for t in (pair.true, pair.flipped))  # fmt: skip
            changed = {k for k in right.keys() ^ wrong.keys() if right.get(k) != wrong.get(k)}
            assert {k[0] for k in changed} == {pair.attribute}
            assert set(right.values()) == {"supported"}
            assert [k[0] for k, v in wrong.items() if v == "contradicted"] == [pair.attribute]
            checked += 1
    assert checked >= 48


def test_phantoms_have_pairs_and_a_limit_is_kept() -> None:
    _, known, _ = phantoms()
    for region in known:
        template_set = LIBRARY.find(region.dataset, region.modality)
        assert template_set is not None
        own = truth_of(template_set, region.labels)
        pairs = minimal_pairs(template_set, own, random.Random(0))
        assert pairs
        assert all(p.true != p.flipped and len({p.true for p in pairs}) == 1 for p in pairs)
        assert len(minimal_pairs(template_set, own, random.Random(0), limit=2)) == min(2, len(pairs))


def test_nothing_known_gives_no_pair() -> None:
    unknown = truth_of(NODULE, [Label(name="spiculation", value="3")])
    assert minimal_pairs(NODULE, unknown, random.Random(0)) == []
    with pytest.raises(ValueError, match="no pair"):
        pair_figures([])


def scores(gain: float, blank: float | None, num: int = 40, right: float = 1.0) -> list[PairScore]:
    pairs = [Pair(attribute=a, value="v", flipped_to="w", true="t", flipped="f") for a in ("margin", "shape")]
    return [
        PairScore(pair=pairs[i % 2], dataset="d", cluster=str(i), blank_gain=blank,
                  gain=gain if i < right * num else -gain)
        for i in range(num)
    ]  # fmt: skip


def test_a_model_that_sees_and_one_that_prefers_common_words() -> None:
    sees = pair_figures(scores(2.0, 0.5, right=0.9), num=200)
    assert sees.preferred.value == pytest.approx(0.9)
    assert sees.seen is not None
    assert sees.seen.value == pytest.approx(0.9)
    assert sees.preferred.low < 0.9 < sees.preferred.high
    blind = pair_figures(scores(2.0, 2.0), num=200)
    assert blind.preferred.value == 1.0
    assert blind.seen is not None
    assert blind.seen.value == 0.0
    assert pair_figures(scores(2.0, None), num=200).seen is None
    assert sees.by_attribute["d/margin"] == (0.9, 0.9, 20)
