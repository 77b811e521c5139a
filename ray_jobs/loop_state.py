"""What a loop has done so far: OUT/loop.json, written after every stage, read by the report and by the next session."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from ray_jobs.run_directory import RunDirectory

LOOP = "loop.json"
State = Literal["running", "incomplete", "complete"]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Score(_Record):
    """MedDLC-score, strict, as shares of 1, with its 95 % interval."""

    value: float
    low: float | None = None
    high: float | None = None
    positive: float | None = None
    negative: float | None = None


class Round(_Record):
    """One round of one arm. The fields are filled in the order of the stages."""

    number: int
    captions: str | None = None
    """The run of `meddam caption`; the arm `labelled` has none."""
    num_captions: int = 0
    num_kept: int = 0
    dropped: dict[str, int] = {}
    """Captions by the filter that dropped them."""
    num_examples: int = 0
    num_steps: int = 0
    loss: float | None = None
    model: str | None = None
    development: Score | None = None
    """Of the trained model; a round without it is not finished."""


class ArmState(_Record):
    """The rounds of one way of learning."""

    name: str
    rounds: list[Round] = []
    ended: str | None = None
    """Why there are no further rounds."""
    chosen: int = 0
    """The round with the best development score; 0 is the first model."""

    def done(self) -> list[Round]:
        """Finished rounds."""
        return [r for r in self.rounds if r.development is not None]


class Pair(_Record):
    """Two models on the questions of the test: the difference of their scores, first less second."""

    first: str
    second: str
    difference: Score
    p: float
    """After Holm's correction."""


class Reading(_Record):
    """The one reading of the locked set."""

    opened_at: str
    judge: str
    models: dict[str, str]
    """By name; fixed when the set was opened."""
    scores: dict[str, Score] = {}
    pairs: list[Pair] = []
    num_questions: int = 0
    num_regions: int = 0


class LoopState(_Record):
    """All of it."""

    state: State = "running"
    why: str | None = None
    fingerprint: dict[str, Any]
    config: dict[str, Any]
    num_images: dict[str, int]
    """By set."""
    judge: str
    """Who curates and scores development."""
    start_model: str | None = None
    start: Score | None = None
    """Of the first model on development."""
    arms: list[ArmState]
    test: Reading | None = None
    remarks: list[str] = []
    """What a reader has to know to read the figures rightly."""
    updated_at: str = ""


def read_state(directory: RunDirectory) -> LoopState | None:
    """The state of a loop that has begun; None where there is none."""
    found = directory.read_json(LOOP)
    return None if found is None else LoopState.model_validate(found)
