"""A Config model as a command line: where values come from, and what a user reads when one is wrong."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

import pytest
import typer
from pydantic import BaseModel, ConfigDict, Field
from typer.testing import CliRunner

from ray_jobs.options import build, command


class Job(BaseModel):
    """A job with one field of every kind."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    shards: tuple[str, ...] = Field(min_length=1)
    """Where the shards lie."""
    out: str
    """Where the result goes."""
    num_samples: int = Field(1, ge=1)
    """How many samples."""
    temperature: float | None = None
    """How warm."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where it runs."""
    fast: bool = True
    """Whether to hurry."""
    box: tuple[int, int, int, int] | None = None
    """x0,y0,x1,y1."""
    prompts: tuple[str, ...] = ("one", "two")
    """What to ask."""
    limits: dict[str, int] = Field(default_factory=dict)
    """Limits by name."""


def app(seen: list[Any]) -> typer.Typer:
    made = typer.Typer(rich_markup_mode=None)
    job = command(
        Job, lambda cfg: cfg, finish=lambda cfg, _: seen.append(cfg), arguments=["shards"], flags={"out": "-o"}
    )
    made.command()(job)
    return made


def parsed(*args: str) -> Job:
    seen: list[Any] = []
    result = CliRunner().invoke(app(seen), list(args), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return seen[0]


def test_every_kind_of_field_has_an_option() -> None:
    got = parsed(
        "a", "b", "-o", "c", "--num-samples", "3", "--temperature", "0.5", "--device", "cuda", "--no-fast",
        "--box", "1, 2,3,4", "--limits", "{width: 7}", "--prompt", "x", "--prompt", "y",
    )  # fmt: skip
    assert got == Job(
        shards=("a", "b"), out="c", num_samples=3, temperature=0.5, device="cuda", fast=False, box=(1, 2, 3, 4),
        limits={"width": 7}, prompts=("x", "y"),
    )  # fmt: skip


def test_defaults_are_the_models() -> None:
    assert parsed("a", "--out", "b") == Job(shards=("a",), out="b")


def test_help_shows_docstrings_defaults_and_what_is_required() -> None:
    text = " ".join(CliRunner().invoke(app([]), ["--help"]).output.split())
    assert "Where the shards lie." in text
    assert "How many samples. [default: 1]" in text
    assert "Where the result goes. Required." in text
    assert "--no-fast" in text


def test_an_option_wins_over_the_file_and_the_file_over_the_base(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text("num_samples: 5\ntemperature: 0.25\n")
    got = build(Job, {"num_samples": 7, "temperature": None}, file, {"shards": ["a"], "out": "b", "fast": False})
    assert (got.num_samples, got.temperature, got.fast, got.out) == (7, 0.25, False, "b")
    assert parsed("a", "-o", "b", "--config", str(file)).num_samples == 5


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"out": "b"}, "SHARDS is missing: Where the shards lie."),
        ({"shards": ["a"], "out": "b", "num_samples": 0}, "--num-samples: Input should be greater than or equal to 1"),
        ({"shards": ["a"], "out": "b", "box": "1,2,3"}, "--box takes N,N,N,N: 4 numbers with commas between them"),
    ],
)
def test_what_is_wrong_is_named_by_its_option(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        build(Job, options, arguments=["shards"])


def test_a_misspelt_setting_gets_a_suggestion(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text("num_sample: 5\n")
    with pytest.raises(ValueError, match="no setting 'num_sample'; did you mean 'num_samples'"):
        build(Job, {"shards": ["a"], "out": "b"}, file)


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [1\n"])
def test_a_file_that_is_no_settings_file_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"job\.yaml"):
        build(Job, {}, file)
