"""The fault suite itself: all of its cases once. CI runs `--short` in a step of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cluster.head import ROOT
from tests.faults import suite
from tests.faults.notes import RoundNotes
from tests.faults.scene import Case, Scene, Skipped, Told


@pytest.mark.slow
def test_every_fault_leaves_a_whole_run() -> None:
    assert suite.main([]) == 0


def test_a_case_that_is_not_there_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        suite.main(["--only", "node,earthquake"])
    assert "no case earthquake; there are node, " in capsys.readouterr().err


def test_the_runbook_names_as_many_faults_as_are_staged() -> None:
    assert len(suite.CASES) == 15 and "stages fifteen of these faults" in (ROOT / "docs/runbook.md").read_text()


def test_rounds_are_counted_for_their_code_and_in_a_row(tmp_path: Path) -> None:
    notes = RoundNotes(tmp_path / "rounds.jsonl", {"code": "a", "cases": ["node"]})
    assert (notes.num_rounds, notes.num_in_a_row) == (0, 0)
    for unclean in (0, 1, 0, 0):
        notes.add(unclean, 1.0, "2026-01-01")
    RoundNotes(notes.file, {"code": "b", "cases": ["node"]}).add(1, 1.0, "2026-01-01")
    assert (notes.num_rounds, notes.num_in_a_row) == (4, 2)


def test_noted_rounds_are_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[int] = []

    def run(scene: Scene) -> Told:
        ran.append(scene.round)
        raise Skipped("it only counts")

    monkeypatch.setattr(suite, "CASES", (Case(name="counted", run=run),))
    notes = str(tmp_path / "rounds.jsonl")
    assert suite.main(["--rounds", "2", "--notes", notes]) == 0
    assert suite.main(["--rounds", "3", "--notes", notes]) == 0
    assert suite.main(["--rounds", "3", "--notes", notes]) == 0
    assert ran == [0, 1, 2]
