"""A bucket that throttles, drips and cuts answers short. Whole jobs on one: python -m tests.faults.suite."""

from __future__ import annotations

import pytest

from meddam_core import storage
from meddam_core.shards import read_shard
from tests.faults.faulty_s3 import Faults, faulty
from tests.ray_jobs.made_shards import make_shards

pytestmark = pytest.mark.s3


def test_objects_come_whole_through_a_store_that_misbehaves(
    s3_bucket: str, s3_endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    faults = Faults(throttled=0.08, reset=0.03, cut=0.15, slow=0.1, slow_s=0.02)
    with faulty(s3_endpoint, faults) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        written = {f"{s3_bucket}/a/{n:03}": bytes([n % 251]) * (1000 + 997 * n) for n in range(10)}
        for uri, data in written.items():
            storage.write_bytes(uri, data)
        listed = {o.uri: o.size for o in storage.list_objects(f"{s3_bucket}/a/")}
        assert listed == {uri: len(data) for uri, data in written.items()}
        assert all(storage.read_bytes(uri) == data for uri, data in written.items())
        make_shards(f"{s3_bucket}/set", 1, 6)
        (shard,) = storage.list_objects(f"{s3_bucket}/set/")
        assert len(list(read_shard(shard.uri))) == 6
    assert min(server.given[k] for k in ("throttled", "reset", "cut", "slow")) > 0, server.given
