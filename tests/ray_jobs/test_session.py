"""How a cluster's CPUs are shared out."""

from __future__ import annotations

import pytest

from ray_jobs.session import shares_of

FILTER_CPUS = 1.0
"""Of Ray's checkpoint filter, which runs while a job is resumed."""


@pytest.mark.parametrize("cpus", [2, 3, 4, 6, 8, 16, 24, 64, 128, 1024])
@pytest.mark.parametrize("num_captioners", [1, 2, 8, 64])
def test_every_stage_finds_room_at_once(cpus: int, num_captioners: int) -> None:
    """Otherwise Ray Data reserves nothing for the last ones: a resume hung, another wrote no file for ten minutes."""
    shares = shares_of(cpus, num_captioners)
    taken = (
        FILTER_CPUS + shares.read * shares.max_readers + shares.extract * shares.max_extractors
        + shares.describe * num_captioners + shares.write * shares.max_writers
    )  # fmt: skip
    if cpus > num_captioners:
        assert taken <= cpus + 1e-9
    assert min(shares.max_readers, shares.max_extractors, shares.max_writers) >= 1


def test_most_of_a_gpu_node_prepares_images() -> None:
    shares = shares_of(16, 1)
    assert shares.extract * shares.max_extractors >= 12
