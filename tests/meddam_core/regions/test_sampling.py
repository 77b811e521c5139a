"""At most five regions an image: repeatable, whatever the order, and spread over kinds and places."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from meddam_core.records import Label
from meddam_core.regions.sampling import kind_of, sample_regions

SIZE = (900, 900)


def _regions(num: int, seed: int) -> tuple[list[tuple[int, int, int, int]], list[str]]:
    rng = np.random.default_rng(seed)
    corners = rng.integers(0, 850, (num, 2))
    boxes = [(int(x), int(y), int(x) + 30, int(y) + 30) for x, y in corners]
    return boxes, [str(k) for k in rng.choice(["nodule", "effusion", "opacity"], num)]


def test_the_choice_does_not_depend_on_the_order() -> None:
    boxes, kinds = _regions(40, 0)
    chosen = {(boxes[i], kinds[i]) for i in sample_regions(boxes, kinds, SIZE, 5, 7, "a")}
    assert len(chosen) == 5
    for seed in range(5):
        order = np.random.default_rng(seed).permutation(40)
        b, k = [boxes[i] for i in order], [kinds[i] for i in order]
        assert {(b[i], k[i]) for i in sample_regions(b, k, SIZE, 5, 7, "a")} == chosen


def test_seed_and_image_change_the_choice() -> None:
    boxes, kinds = _regions(40, 0)
    choices = {tuple(sample_regions(boxes, kinds, SIZE, 5, seed, key)) for seed, key in [(7, "a"), (8, "a"), (7, "b")]}
    assert len(choices) == 3


def test_a_rare_kind_and_a_lonely_place_are_always_chosen() -> None:
    boxes = [(10 + i, 10, 40 + i, 40) for i in range(30)] + [(700, 700, 800, 800)]
    kinds = ["opacity"] * 30 + ["fracture"]
    for seed in range(20):
        assert 30 in sample_regions(boxes, kinds, SIZE, 5, seed, "a")


def test_kinds_are_balanced() -> None:
    boxes, kinds = _regions(60, 3)
    kinds = ["opacity"] * 50 + ["nodule"] * 5 + ["effusion"] * 5
    for seed in range(10):
        chosen = Counter(kinds[i] for i in sample_regions(boxes, kinds, SIZE, 6, seed, "x"))
        assert chosen == {"opacity": 2, "nodule": 2, "effusion": 2}


def test_few_regions_or_no_limit_keep_all() -> None:
    boxes, kinds = _regions(4, 1)
    assert sample_regions(boxes, kinds, SIZE, 5, 0, "a") == [0, 1, 2, 3]
    assert sample_regions(*_regions(40, 1), SIZE, None, 0, "a") == list(range(40))
    with pytest.raises(ValueError, match="at least 1"):
        sample_regions(boxes, kinds, SIZE, 0, 0, "a")


def test_the_kind_is_the_finding_or_what_is_present() -> None:
    assert kind_of([Label(name="finding", value="mass"), Label(name="side", value="left")]) == "mass"
    labels = [Label(name=n, value=v) for n, v in [("scale", "present"), ("crust", "absent"), ("papule", "present")]]
    assert kind_of(labels) == "papule, scale"
    assert kind_of([]) == ""
