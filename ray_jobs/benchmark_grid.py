"""The cells of a benchmark's grid, and the settings of the jobs that fill them.

A cell is a dataset, a model, a prompt and a view. Captions of another system are a cell of their own a dataset: their
prompt and view are what they are.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pydantic import BaseModel, ValidationError

from meddam_core import storage
from ray_jobs.caption_config import Config as CaptionConfig
from ray_jobs.captions_import import IMPORTED
from ray_jobs.judge_config import Config as JudgeConfig

Settings = dict[str, Any]
JUDGING = "benchmark"
"""Names of the judgings of cells begin so; what follows is made from the judge's settings."""
OF_THE_GRID = frozenset({"shards", "out", "prompts", "dry_run", "num_cpus"})
"""What the grid decides, and no setting of a model or view may."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One run of the benchmark."""

    dataset: str
    shards: str
    model: str
    prompt: str
    view: str
    run: str
    table: str | None = None
    """Captions to import, where the model is not run here."""
    judging: str = JUDGING
    """Name of its judging: another judge leaves the verdicts of this one where they are."""
    rating: str = JUDGING
    """Name of its LLM-score."""


class Grid(Protocol):
    """What the cells are made of (ray_jobs.benchmark.Config)."""

    @property
    def out(self) -> str: ...
    @property
    def datasets(self) -> dict[str, str]: ...
    @property
    def models(self) -> dict[str, Settings]: ...
    @property
    def prompts(self) -> tuple[str, ...]: ...
    @property
    def views(self) -> dict[str, Settings]: ...
    @property
    def caption(self) -> Settings: ...
    @property
    def judge(self) -> Settings: ...
    @property
    def llm_score(self) -> Settings | None: ...
    @property
    def num_cpus(self) -> int | None: ...


def cells_of(grid: Grid) -> list[Cell]:
    """Every cell, dataset by dataset. Raises ValueError for names that share a folder, or captions of no dataset."""
    cells = []
    for dataset, shards in grid.datasets.items():
        for model, settings in grid.models.items():
            if "captions" in settings:
                table = _table(grid, model, dataset)
                if table is not None:
                    cells.append(_cell(grid, dataset, shards, model, IMPORTED, "as-given", table))
                continue
            cells += [_cell(grid, dataset, shards, model, p, v) for p in grid.prompts for v in grid.views]
    folders = [c.run for c in cells]
    if twice := sorted({f for f in folders if folders.count(f) > 1}):
        raise ValueError(f"two cells of the grid have the same folder, {twice[0]}: choose names that differ in letters")
    return cells


def _table(grid: Grid, model: str, dataset: str) -> str | None:
    """The table of captions of a model; None where it has none of this dataset."""
    given = grid.models[model]["captions"]
    if set(grid.models[model]) != {"captions"} or not isinstance(given, dict):
        raise ValueError(f"{model}: captions are given as {{captions: {{DATASET: TABLE}}}}, with no other setting")
    if unknown := given.keys() - grid.datasets.keys():
        raise ValueError(f"{model} has captions of {', '.join(sorted(unknown))}, which is no dataset of the grid")
    return given.get(dataset)


def _cell(grid: Grid, dataset: str, shards: str, model: str, prompt: str, view: str, table: str | None = None) -> Cell:
    parts = [_folder(name) for name in (dataset, model, Path(prompt).name if "/" in prompt else prompt, view)]
    return Cell(
        dataset, shards, model, prompt, view, storage.join(grid.out, "runs", *parts), table,
        judging=_judging(grid.judge), rating=_judging(grid.llm_score or {}),
    )  # fmt: skip


def _judging(settings: Settings) -> str:
    """A name for what these settings of a judge give; what only decides the pace or the bill is no part of it."""
    pace = {"max_usd", "requests_per_min", "tokens_per_min", "max_concurrent", "timeout_s", "patience_s", "num_judges"}
    kept = json.dumps({k: v for k, v in settings.items() if k not in pace}, sort_keys=True, default=str)
    return f"{JUDGING}-{hashlib.sha256(kept.encode()).hexdigest()[:8]}"


def _folder(name: str) -> str:
    folder = re.sub(r"[^A-Za-z0-9._+-]+", "-", name).strip("-.")
    if not folder:
        raise ValueError(f"{name!r} is no name for a part of the grid: use letters and digits")
    return folder


def caption_config(grid: Grid, cell: Cell) -> CaptionConfig:
    """The settings of the cell's caption run: those for all, then the view's, then the model's."""
    settings = {**grid.caption, **grid.views[cell.view], **grid.models[cell.model]}
    if taken := OF_THE_GRID & settings.keys():
        raise ValueError(
            f"the grid itself decides {', '.join(sorted(taken))}; leave it out of models, views and caption"
        )
    values = {
        **settings, "shards": (cell.shards,), "out": cell.run, "prompts": (cell.prompt,), "num_cpus": grid.num_cpus
    }  # fmt: skip
    return _checked(CaptionConfig, values, f"the cell {cell.model}, {cell.view}")


def judge_config(grid: Grid, cell: Cell, *, questions: str = "", spent_usd: float = 0.0) -> JudgeConfig:
    """The settings of the cell's judging; of the dollars, what the other cells have left."""
    return _judge_config(grid, grid.judge, "judge", cell.run, cell.judging, questions, spent_usd)


def _judge_config(
    grid: Grid, settings: Settings, where: str, run: str, name: str, questions: str, spent_usd: float
) -> JudgeConfig:
    if taken := {"run", "questions", "name", "dry_run"} & settings.keys():
        raise ValueError(f"the grid itself decides {', '.join(sorted(taken))}; leave it out of {where}")
    values = {
        "cache": storage.join(grid.out, "judge-cache"), **settings, "run": run, "questions": questions,
        "name": name, "num_cpus": grid.num_cpus,
    }  # fmt: skip
    if values.get("max_usd") is not None:
        values["max_usd"] = max(0.0, float(values["max_usd"]) - spent_usd)
    return _checked(JudgeConfig, values, where)


def rating_config(grid: Grid, cell: Cell, *, questions: str = "", spent_usd: float = 0.0) -> JudgeConfig | None:
    """The settings of the cell's LLM-score, as those of its judging; None where the grid asks for none."""
    if grid.llm_score is None:
        return None
    settings = {**grid.llm_score, "judge": "llm-score"}
    return _judge_config(grid, settings, "llm_score", cell.run, cell.rating, questions, spent_usd)


def questions_uri(grid: Grid, dataset: str, window: str | None) -> str:
    """Where the question table of a dataset lies; another window shows other things."""
    name = _folder(dataset) + (f"-{_folder(window)}" if window else "")
    return storage.join(grid.out, "questions", name)


def _checked(kind: type[Any], values: Settings, where: str) -> Any:
    assert issubclass(kind, BaseModel)
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        said = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'settings'}: {e['msg']}" for e in error.errors())
        raise ValueError(f"{where}: {said}") from error
