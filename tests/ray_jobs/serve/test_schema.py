"""Schemathesis over the OpenAPI document: every answer is one that the document tells of, and none is a failure."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("schemathesis")


@pytest.mark.slow
def test_what_the_document_says_is_what_the_server_does(serve_http: Callable[..., str], tmp_path: Path) -> None:
    address = serve_http(max_tokens=2, most_tokens=2)
    # A schema cannot say that a string is a picture that can be decoded, so schema-valid requests may get a 400.
    command = [Path(sys.executable).parent / "st", "run", f"{address}/openapi.json", "--max-examples", "150",
               "--seed", "1", "--exclude-checks", "positive_data_acceptance"]  # fmt: skip
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:]
