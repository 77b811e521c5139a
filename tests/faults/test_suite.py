"""The fault suite itself: all of its cases once. CI runs `--short` in a step of its own."""

from __future__ import annotations

import pytest

from tests.faults import suite


@pytest.mark.slow
def test_every_fault_leaves_a_whole_run() -> None:
    assert suite.main([]) == 0


def test_a_case_that_is_not_there_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        suite.main(["--only", "node,earthquake"])
    assert "no case earthquake; there are node, " in capsys.readouterr().err
