"""Splits share no patient, no study and no look; they are the same in any order and near to their shares."""

from __future__ import annotations

import io

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image as PilImage

from meddam_core.datasets.phantoms import Options, make_phantom
from meddam_core.datasets.splits import MAX_LONG, Features, deal, group_items, look_of, number_of, parse_shares

SHARES = {"train": 0.8, "test": 0.2}


def _features(
    num: int, patients: list[int] | None = None, looks: list[tuple[int, tuple[int, ...]]] | None = None
) -> Features:
    rng = np.random.default_rng(0)
    none = np.zeros(num, np.uint64)
    short = (
        rng.integers(1, 1 << 63, num, dtype=np.uint64) if looks is None else np.array([s for s, _ in looks], np.uint64)
    )
    long = (
        rng.integers(1, 1 << 63, (num, 4), dtype=np.uint64)
        if looks is None
        else np.array([v for _, v in looks], np.uint64)
    )
    names = np.array([number_of(str(i)) for i in range(num)], np.uint64)
    return Features(names, none if patients is None else np.array(patients, np.uint64), none, short, long)


def _taken(features: Features, order: NDArray[np.int64]) -> Features:
    return Features(*(getattr(features, n)[order] for n in Features.__slots__))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=80), st.integers(0, 5))
def test_a_patient_is_in_one_split(patients: list[int], seed: int) -> None:
    features = _features(len(patients), patients)
    split = deal(group_items(features), features, SHARES, seed)
    for patient in set(patients) - {0}:
        assert len(set(split[np.array(patients) == patient].tolist())) == 1
    order = np.random.default_rng(seed).permutation(len(patients))
    shuffled = _taken(features, order)
    assert np.array_equal(deal(group_items(shuffled), shuffled, SHARES, seed), split[order])


def test_counts_are_near_the_shares_and_seeds_differ() -> None:
    rng = np.random.default_rng(1)
    features = _features(5000, rng.integers(1, 900, 5000).tolist())
    splits = [deal(group_items(features), features, {"train": 0.7, "val": 0.1, "test": 0.2}, seed) for seed in (0, 1)]
    for split in splits:
        assert np.allclose(np.bincount(split) / 5000, (0.7, 0.1, 0.2), atol=0.005)
    assert (splits[0] != splits[1]).mean() > 0.2


@pytest.mark.parametrize("kind", ["chest", "ct", "skin"])
def test_a_picture_and_its_copies_stay_together_and_others_do_not(kind: str) -> None:
    pictures = [make_phantom(kind, 0, i, Options(size=512)).stored for i in range(8)]  # type: ignore[arg-type]
    looks = []
    for stored in pictures:
        eight = np.round(stored * (255 / stored.max())).astype(np.uint8)
        sink = io.BytesIO()
        PilImage.fromarray(eight).save(sink, "JPEG", quality=75)
        jpeg = np.asarray(PilImage.open(io.BytesIO(sink.getvalue())))
        small = cv2.resize(jpeg, (300, 290), interpolation=cv2.INTER_AREA)
        looks += [look_of(stored), look_of(jpeg), look_of(np.clip(small * 0.9 + 12, 0, 255).astype(np.uint8))]
    groups = group_items(_features(len(looks), looks=looks)).reshape(8, 3)
    assert (groups == groups[:, :1]).all(), "copies"
    assert len(np.unique(groups)) >= 7, "pictures"


def test_an_inverted_film_looks_like_its_twin() -> None:
    film = make_phantom("chest", 0, 0, Options(size=512)).stored
    assert look_of(film.max() - film, inverted=True) == look_of(film)
    apart = np.bitwise_count(np.array(look_of(film.max() - film)[1], np.uint64) ^ np.array(look_of(film)[1], np.uint64))
    assert apart.sum() > MAX_LONG


def test_looks_join_only_where_a_patient_is_unknown() -> None:
    look = look_of(make_phantom("ct", 0, 0, Options(size=512)).stored)
    known = group_items(_features(3, [1, 2, 3], [look] * 3))
    assert known.tolist() == [0, 1, 2]  # two patients may look alike on a slice
    assert group_items(_features(3, [1, 2, 0], [look] * 3)).tolist() == [0, 0, 0]
    nothing = (0, (0, 0, 0, 0))
    assert group_items(_features(3, None, [nothing] * 3)).tolist() == [0, 1, 2]  # what can't be read is alike to none


def test_every_pair_within_the_limit_is_found() -> None:
    rng = np.random.default_rng(0)
    base = rng.integers(1, 1 << 63, 200, dtype=np.uint64)
    looks = []
    for value in base.tolist():
        flipped = value
        for bit in rng.choice(64, 4, replace=False).tolist():
            flipped ^= 1 << bit
        looks += [(value, (value, 5, 5, 5)), (flipped, (value, 5, 5, 5))]
    groups = group_items(_features(400, looks=looks))
    assert (groups[::2] == groups[1::2]).all() and len(np.unique(groups)) == 200


@pytest.mark.parametrize(
    "text", ["train", "train=0.8", "train=0.8,test=0.3", "train=0.5,train=0.5", "a=1.5,b=-0.5", "=1", ""]
)
def test_shares_that_make_no_sense(text: str) -> None:
    with pytest.raises(ValueError, match=r"split|sum to 1"):
        parse_shares(text)
    assert parse_shares("train=0.8, test=0.2") == SHARES
