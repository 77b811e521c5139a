"""The leaderboard for programs: a long CSV, and the YAML by which model repositories carry evaluation results.

Both hold points of 100, as the paper does. `.eval_results` follows the format of the Hugging Face Hub's documentation
page "Evaluation Results": a list of entries with dataset (id, task_id), value, date, source and notes.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Iterator
from typing import Any

import yaml

from meddam_core.judging.leaderboard import VARIANTS, Figures, Leaderboard, Standing
from meddam_core.judging.statistics import Interval

COLUMNS = (
    "system", "role", "variant", "dataset", "attribute", "polarity", "score", "low", "high", "num_questions",
    "normalised", "rank_best", "rank_worst", "unscored", "judge",
)  # fmt: skip
LOCAL_BENCHMARK = "local/meddlc"
"""Stands for a benchmark's dataset id until the user names the one that is registered on the Hub."""


def leaderboard_csv(board: Leaderboard) -> str:
    """A row for each system, variant, dataset, attribute and polarity; "all" where it is averaged over."""
    sink = io.StringIO()
    writer = csv.DictWriter(sink, COLUMNS, lineterminator="\n", restval="")
    writer.writeheader()
    for standing in (*board.models, *board.controls):
        for row in _rows(standing):
            writer.writerow({"system": standing.name, "role": standing.role, "judge": board.judge, **row})
    return sink.getvalue()


def _rows(standing: Standing) -> Iterator[dict[str, Any]]:
    for variant in VARIANTS:
        for row in _averages(standing.scores[variant]):
            whole: dict[str, Any] = {
                "num_questions": standing.num_questions,
                "unscored": sum(standing.unscored.values()),
            }
            if variant == "strict" and row["polarity"] == "all":
                whole["normalised"] = _points(standing.normalised.value) if standing.normalised else ""
                whole["rank_best"], whole["rank_worst"] = standing.rank or ("", "")
            yield {"variant": variant, "dataset": "all", "attribute": "all", **whole, **row}
        for dataset, figures in standing.by_dataset[variant].items():
            for row in _averages(figures):
                yield {"variant": variant, "dataset": dataset, "attribute": "all", **row}
        for cell in standing.by_attribute[variant]:
            yield {
                "variant": variant, "dataset": cell.dataset, "attribute": cell.attribute, "polarity": cell.polarity,
                "num_questions": cell.num_questions, **_interval(cell.share),
            }  # fmt: skip


def _averages(figures: Figures) -> Iterator[dict[str, Any]]:
    yield {"polarity": "all", **_interval(figures.average)}
    yield {"polarity": "positive", **_interval(figures.positive)}
    yield {"polarity": "negative", **_interval(figures.negative)}


def _interval(interval: Interval) -> dict[str, Any]:
    return {"score": _points(interval.value), "low": _points(interval.low), "high": _points(interval.high)}


def _points(share: float) -> str:
    return "" if math.isnan(share) else f"{100 * share:.2f}"


def eval_results(
    board: Leaderboard, *, date: str, benchmark: str | None = None, source_url: str | None = None
) -> dict[str, str]:
    """One YAML for each model, by file name, to lie in `.eval_results/` of its repository.

    Args:
        date: ISO date of the evaluation.
        benchmark: id of the benchmark's dataset on the Hub.
        source_url: where the leaderboard can be read.
    """
    files: dict[str, str] = {}
    for standing in board.models:
        entries = list(_entries(board, standing, date, benchmark or LOCAL_BENCHMARK, source_url))
        slug = _slug(standing.name)
        name = f"{slug}.yaml" if f"{slug}.yaml" not in files else f"{slug}-{len(files)}.yaml"
        files[name] = yaml.safe_dump(entries, sort_keys=False, allow_unicode=True, width=1000)
    return files


def _entries(
    board: Leaderboard, standing: Standing, date: str, benchmark: str, source_url: str | None
) -> Iterator[dict[str, Any]]:
    told = f"{standing.name}; judge {board.judge}; datasets {', '.join(board.datasets)}"
    for variant, prefix in (("paper", "meddlc"), ("strict", "meddlc_strict")):
        figures = standing.scores["strict" if variant == "strict" else "paper"]
        named = (("score", figures.average), ("positive", figures.positive), ("negative", figures.negative))
        for name, interval in named:
            if math.isnan(interval.value):
                continue
            bounds = (
                ""
                if math.isnan(interval.low)
                else f"; 95 % interval {_points(interval.low)} to {_points(interval.high)}"
            )
            entry: dict[str, Any] = {
                "dataset": {"id": benchmark, "task_id": f"{prefix}_{name}"},
                "value": round(100 * interval.value, 2),
                "date": date,
            }
            if source_url:
                entry["source"] = {"url": source_url, "name": "MedDAM leaderboard"}
            entry["evaluation_framework"] = "meddam"
            entry["notes"] = f"{told}{bounds}"
            yield entry


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-.") or "system"
