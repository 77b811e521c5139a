"""Counts over captions: right, and the same however the captions lie in tables."""

from __future__ import annotations

from collections import Counter

import pyarrow as pa
import pytest

from meddam_core.records import Caption, arrow_schema, to_row
from meddam_core.reports.sample import CaptionSample
from meddam_core.reports.tally import LOGPROB_BIN, CaptionTally
from tests.meddam_core.reports.made import made_captions


def table(captions: list[Caption]) -> pa.Table:
    return pa.Table.from_pylist([to_row(c) for c in captions], schema=arrow_schema(Caption))


def test_every_count_is_that_of_the_rows() -> None:
    captions = made_captions(200)
    tally = CaptionTally()
    tally.add(table(captions))
    with_text = [c for c in captions if c.text is not None]
    assert (tally.num_captions, tally.num_regions, tally.num_images) == (200, 200, 100)
    assert tally.status == Counter(c.status.value for c in captions)
    assert tally.reasons == Counter((c.status.value, c.reason) for c in captions if c.reason)
    assert tally.num_tokens == sum(c.num_tokens for c in with_text)
    assert tally.tokens == Counter(c.num_tokens for c in with_text)
    assert tally.groups == Counter((c.dataset, c.modality, c.status.value) for c in captions)
    assert tally.regions_per_image == Counter({2: 100})
    assert sum(tally.logprob_bins.values()) == len(with_text)
    lowest = min(c.mean_logprob or 0 for c in with_text)
    assert min(tally.logprob_bins) * LOGPROB_BIN <= lowest < (min(tally.logprob_bins) + 1) * LOGPROB_BIN + 1e-6


def test_several_tables_add_up_to_one() -> None:
    captions = made_captions(120)
    one, many = CaptionTally(), CaptionTally()
    one.add(table(captions))
    for start in range(0, 120, 30):
        many.add(table(captions[start : start + 30]))
    assert many == one


def test_a_region_described_twice_counts_once() -> None:
    captions = made_captions(4)
    tally = CaptionTally()
    tally.add(table([*captions, *captions]))
    assert (tally.num_captions, tally.num_regions, tally.num_images) == (8, 4, 2)


def test_no_captions_at_all() -> None:
    tally = CaptionTally()
    tally.add(table([]))
    assert tally == CaptionTally()


@pytest.mark.parametrize("size", [7, 50, 300])
def test_the_sample_does_not_depend_on_how_captions_lie_in_files(size: int) -> None:
    captions = made_captions(300)
    whole = CaptionSample(20, 6, seed=5)
    whole.add(table(captions))
    pieces = CaptionSample(20, 6, seed=5)
    for start in reversed(range(0, 300, size)):
        pieces.add(table(captions[start : start + size][::-1]))
    assert pieces.shown() == whole.shown()
    assert pieces.failures() == whole.failures()


def test_the_sample_is_even_over_datasets_and_changes_with_the_seed() -> None:
    captions = made_captions(300)
    samples = [CaptionSample(21, 5, seed=s) for s in (0, 1)]
    for sample in samples:
        sample.add(table(captions))
    assert Counter(c.dataset for c in samples[0].shown()) == {"vindr-cxr": 7, "lidc-idri": 7, "skincon": 7}
    assert all(c.text is not None for c in samples[0].shown())
    assert all(c.text is None for c in samples[0].failures())
    assert samples[0].shown() != samples[1].shown()


def test_a_sample_larger_than_the_run_is_the_run() -> None:
    captions = made_captions(10)
    sample = CaptionSample(50, 50)
    sample.add(table(captions))
    assert sorted(c.region_id for c in sample.shown() + sample.failures()) == sorted(c.region_id for c in captions)
