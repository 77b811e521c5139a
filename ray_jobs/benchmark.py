"""A benchmark in one command: models x datasets x prompts x views, captioned, judged and ranked.

    meddam benchmark --config grid.yaml --out s3://lab/bench/one --dry-run
    meddam benchmark --config grid.yaml --out s3://lab/bench/one

The grid is a YAML file of the settings below; docs/benchmark.md has one. Each cell is a run of its own, captioned by
`meddam caption` (or imported) and judged by `meddam judge`, with everything that these promise. Run the same command
again after any failure: finished cells are left alone, half-done ones go on, and cells that the grid has gained are
added. The leaderboard is written anew each time, from the cells that are finished.

    OUT/benchmark.json                          the grid, and what became of each cell
    OUT/questions/DATASET[-WINDOW]/             question tables
    OUT/runs/DATASET/MODEL/PROMPT/VIEW/         run directories, with their judgings
    OUT/judge-cache/                            verdicts that all cells share
    OUT/leaderboard/                            the page, the CSV, the JSON and the YAML
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from meddam_core import storage
from meddam_core.judging.leaderboard import NUM_RESAMPLES
from ray_jobs import caption, captions_import, judge, leaderboard, qa
from ray_jobs.benchmark_grid import (
    Cell,
    Settings,
    caption_config,
    cells_of,
    judge_config,
    questions_uri,
    rating_config,
)
from ray_jobs.judge_summary import Summary as JudgeSummary
from ray_jobs.judged_systems import JudgedRun, open_judged
from ray_jobs.module_command import run_as
from ray_jobs.run_directory import RUN, SUMMARY, RunDirectory
from ray_jobs.session import session
from ray_jobs.snapshot import snapshot
from ray_jobs.summary import EXIT_INCOMPLETE

logger = logging.getLogger(__name__)

GRID = "benchmark.json"
JUDGING, RATINGS = "judging", "ratings"
"""Folders of a run, below which `meddam judge` writes."""
State = Literal["judged", "captioned", "incomplete", "stopped", "to do"]


class Config(BaseModel):
    """What `meddam benchmark` does."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    out: str
    """Folder of the benchmark, on S3 or disk. Run again with the same to resume."""
    datasets: dict[str, str] = Field(min_length=1)
    """Image shards by the name of the dataset: {vindr: s3://lab/vindr}."""
    models: dict[str, Settings] = Field(min_length=1)
    """Settings of `meddam caption` by the model's name, `model` at least; or {captions: {DATASET: TABLE}}."""
    prompts: tuple[str, ...] = ("dam-default", "meddam-v1")
    """Prompt ids or files; each model describes every region once with each of them."""
    views: dict[str, Settings] = {"recipe": {}}
    """Ways of showing a region, by name: settings of `meddam caption` such as margin, aspect and window."""
    caption: Settings = {}
    """Settings of `meddam caption` for all cells."""
    questions: Settings = {}
    """Settings of `meddam qa build`."""
    judge: Settings = {}
    """Settings of `meddam judge`; max_usd is for the whole benchmark."""
    llm_score: Settings | None = None
    """Settings of `meddam judge --judge llm-score`, to have a model rate the captions too; max_usd likewise."""
    title: str = "Benchmark"
    """Stands at the top of the leaderboard."""
    num_resamples: int = Field(NUM_RESAMPLES, ge=100, le=20000)
    """Resamples of each interval and test."""
    num_cpus: int | None = Field(None, ge=2)
    """CPUs of a Ray session started on this machine."""
    dry_run: bool = False
    """Say which cells there are and what is done, and do nothing."""

    @model_validator(mode="after")
    def _cells_can_be_made(self) -> Config:
        for cell in cells_of(self):
            if cell.table is None:
                caption_config(self, cell)
            judge_config(self, cell)
            rating_config(self, cell)
        return self


class CellState(BaseModel):
    """What became of a cell."""

    dataset: str
    model: str
    prompt: str
    view: str
    run: str
    state: State
    why: str | None = None


class Summary(BaseModel):
    """What the benchmark found, and what is left to do."""

    out: str
    cells: list[CellState]
    board: leaderboard.Summary | None = None
    dry_run: bool = False

    @property
    def exit_code(self) -> int:
        """0 when every cell is judged, or nothing was to be done; else EXIT_INCOMPLETE."""
        return 0 if self.dry_run or all(c.state == "judged" for c in self.cells) else EXIT_INCOMPLETE

    def lines(self) -> list[str]:
        """For a person."""
        done = sum(c.state == "judged" for c in self.cells)
        text = [f"{done} of {len(self.cells)} cells are captioned and judged"]
        for cell in self.cells:
            if cell.state != "judged":
                named = f"{cell.dataset}, {cell.model}, {cell.prompt}, {cell.view}"
                text.append(f"  {cell.state}: {named}" + (f": {cell.why}" if cell.why else ""))
        return [*text, *(self.board.lines() if self.board else [])]


def run(cfg: Config) -> Summary:
    """Does what is left of the grid and writes the leaderboard. Raises ValueError for a grid that cannot work."""
    cells = cells_of(cfg)
    if cfg.dry_run:
        return Summary(out=cfg.out, cells=[_as_is(cfg, cell) for cell in cells], dry_run=True)
    storage.check_writable(cfg.out)
    states = {cell: _as_is(cfg, cell) for cell in cells}
    _note(cfg, states)
    if any(s.state != "judged" for s in states.values()):
        with session(cfg.num_cpus):
            for cell in cells:
                states[cell] = _work(cfg, cell, states)
                _note(cfg, states)
    judged = [cell for cell in cells if states[cell].state == "judged"]
    board = _leaderboard(cfg, [_open(cell) for cell in judged]) if judged else None
    return Summary(out=cfg.out, cells=list(states.values()), board=board)


def _work(cfg: Config, cell: Cell, states: dict[Cell, CellState]) -> CellState:
    """Captions and judges one cell, as far as that is not done."""
    if states[cell].state == "judged":
        return states[cell]
    logger.info("cell: %s, %s, %s, %s", cell.dataset, cell.model, cell.prompt, cell.view)
    made = _captions(cfg, cell)
    if made["state"] != "complete":
        return _state(cell, made["state"], made["why"])
    questions = _questions(cfg, cell)
    for folder, make in ((JUDGING, judge_config), (RATINGS, rating_config)):
        settings = make(cfg, cell, questions=questions, spent_usd=_spent(cell, states, folder))
        if settings is not None:
            found = judge.run(settings)
            assert isinstance(found, JudgeSummary)
            if found.state != "complete":
                return _state(cell, found.state, found.why)
    return _state(cell, "judged", None)


def _captions(cfg: Config, cell: Cell) -> dict[str, Any]:
    """The summary of the cell's caption run, made where it is not complete."""
    directory = RunDirectory(cell.run)
    described, summary = directory.read_json(RUN), directory.read_json(SUMMARY)
    if cell.table is not None:
        if summary is not None:
            return summary
        imported = captions_import.Config(
            table=cell.table, shards=(cell.shards,), out=cell.run, model=cell.model, prompt_id=cell.prompt
        )
        return captions_import.run(imported).model_dump(mode="json")
    settings = caption_config(cfg, cell)
    complete = summary is not None and summary["state"] == "complete"
    if complete and described is not None and described["config"] == settings.model_dump(mode="json"):
        return summary or {}
    found = caption.run(settings)
    return found.model_dump(mode="json")


def _questions(cfg: Config, cell: Cell) -> str:
    """The question table for the cell: one a dataset and window, since a window decides what can be seen."""
    window = caption_config(cfg, cell).window if cell.table is None else None
    uri = questions_uri(cfg, cell.dataset, window)
    source = cell.shards if any(s.num_regions for s in snapshot([cell.shards])) else cell.run  # regions detected there
    if storage.exists(storage.join(uri, SUMMARY)) and source == cell.run:
        return uri
    qa.run(qa.Config.model_validate({"window": window, **cfg.questions, "shards": (source,), "out": uri}))
    return uri


def _open(cell: Cell) -> JudgedRun:
    return open_judged(cell.run, cell.judging, cell.model, cell.dataset)


def _spent(cell: Cell, states: dict[Cell, CellState], folder: str) -> float:
    """Dollars that the judging, or rating, of the other cells has taken so far."""
    total = 0.0
    for other in states:
        if other != cell:
            summary = RunDirectory(other.run).read_json(folder, _name(other, folder), SUMMARY) or {}
            total += float(summary.get("calls", {}).get("spent_usd", 0.0))
    return total


def _name(cell: Cell, folder: str) -> str:
    return cell.judging if folder == JUDGING else cell.rating


def _as_is(cfg: Config, cell: Cell) -> CellState:
    directory = RunDirectory(cell.run)
    wanted = [JUDGING, RATINGS] if cfg.llm_score is not None else [JUDGING]
    found = [directory.read_json(folder, _name(cell, folder), SUMMARY) for folder in wanted]
    if all(f is not None and f["state"] == "complete" for f in found):
        return _state(cell, "judged", None)
    summary = directory.read_json(SUMMARY)
    if summary is not None and summary["state"] == "complete":
        return _state(cell, "captioned", None)
    return _state(cell, "to do", None)


def _state(cell: Cell, state: State, why: str | None) -> CellState:
    return CellState(
        dataset=cell.dataset, model=cell.model, prompt=cell.prompt, view=cell.view, run=cell.run, state=state, why=why
    )


def _note(cfg: Config, states: dict[Cell, CellState]) -> None:
    noted = {"grid": cfg.model_dump(mode="json"), "cells": [s.model_dump(mode="json") for s in states.values()]}
    storage.write_bytes(storage.join(cfg.out, GRID), json.dumps(noted, indent=1).encode() + b"\n")


def _leaderboard(cfg: Config, runs: Sequence[JudgedRun]) -> leaderboard.Summary:
    settings = leaderboard.Config(
        runs=tuple(r.run.uri for r in runs), out=storage.join(cfg.out, "leaderboard"), title=cfg.title,
        num_resamples=cfg.num_resamples,
    )  # fmt: skip
    return leaderboard.write_leaderboard(settings, runs)


if __name__ == "__main__":  # the same options as `meddam benchmark`
    run_as("benchmark")
