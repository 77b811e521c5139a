"""One small Ray session for the job tests of this folder: starting one takes seconds."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.conftest import s3_environment


@pytest.fixture(scope="session")
def ray_session(s3_endpoint: str) -> Iterator[None]:
    """Ray with two CPUs and a small object store, of this test session's own; its workers can reach the S3 server.

    Serve's settings are those of `meddam serve`.
    """
    import ray

    from ray_jobs.serve.job import ENVIRONMENT
    from ray_jobs.session import session

    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**s3_environment(s3_endpoint), **ENVIRONMENT}.items():
            patch.setenv(name, value)
        with session(num_cpus=2, object_store_bytes=200_000_000):
            yield
    assert not ray.is_initialized()
