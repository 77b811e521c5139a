"""One head with a token for all tests of this folder: starting one takes seconds."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cluster.head import ROOT, Head, started_head


@pytest.fixture(scope="session")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    """A head with two CPUs whose jobs can import the tests' engines."""
    with started_head(tmp_path_factory.mktemp("head"), OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT)) as found:
        yield found
