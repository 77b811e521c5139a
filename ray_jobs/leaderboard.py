"""The leaderboard of judged runs: a page to mail, a CSV, and the YAML that model repositories carry.

    meddam leaderboard s3://lab/runs/dam s3://lab/runs/gpt --out s3://lab/boards/one
    meddam leaderboard runs/* --out board --labels '{runs/dam: DAM-3B}' --judging lexical

Writes OUT/leaderboard.html, OUT/leaderboard.csv, OUT/leaderboard.json and OUT/eval_results/MODEL.yaml. Needs no Ray.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from meddam_core import __version__, storage
from meddam_core.judging.leaderboard import NUM_RESAMPLES, Leaderboard, Standing, make_leaderboard
from meddam_core.judging.statistics import Interval
from meddam_core.reports.leaderboard_report import BoardFacts, leaderboard_report
from meddam_core.reports.leaderboard_tables import eval_results, leaderboard_csv
from ray_jobs.judged_systems import JudgedRun, open_judged, read_llm_scores, read_systems
from ray_jobs.judging_directory import JUDGE
from ray_jobs.module_command import run_as
from ray_jobs.run_directory import SUMMARY

PAGE, TABLE, FIGURES, RESULTS = "leaderboard.html", "leaderboard.csv", "leaderboard.json", "eval_results"


class Config(BaseModel):
    """What `meddam leaderboard` does."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    runs: tuple[str, ...] = Field(min_length=1)
    """Run directories that `meddam judge` has judged, on S3 or disk."""
    out: str
    """Folder for the page and the tables, on S3 or disk."""
    title: str = "Leaderboard"
    """Stands at the top of the page."""
    judging: str | None = None
    """Name of the judging to use, or its beginning, where runs were judged by several judges."""
    labels: dict[str, str] = {}
    """Names of models by run directory, where the checkpoint's own name will not do: {RUN: NAME}."""
    benchmark: str | None = None
    """Id of the benchmark's dataset on the Hugging Face Hub, for the YAML."""
    source_url: str | None = None
    """Where the page will be read, for the YAML."""
    num_resamples: int = Field(NUM_RESAMPLES, ge=100, le=20000)
    """Resamples of each interval and test."""
    seed: int = 0
    """Of the resamples."""


class Line(BaseModel):
    """One system as the terminal shows it; points of 100."""

    name: str
    role: str
    rank: tuple[int, int] | None
    strict: float | None
    low: float | None
    high: float | None
    positive: float | None
    negative: float | None
    paper: float | None
    normalised: float | None
    unscored_rate: float


class Summary(BaseModel):
    """Where the leaderboard lies, and who stands where."""

    out: str
    judge: str
    datasets: tuple[str, ...]
    num_questions: int
    num_regions: int
    systems: list[Line]
    left_out: tuple[str, ...] = ()

    @property
    def exit_code(self) -> int:
        """A leaderboard that was written is a success."""
        return 0

    def lines(self) -> list[str]:
        """For a person."""
        text = [f"leaderboard: {storage.join(self.out, PAGE)} ({self.num_questions:,} questions, judge {self.judge})"]
        text.append(f"  {'rank':>5} {'strict':>7} {'interval':>14} {'normal.':>8} {'paper':>6}  system")
        for s in self.systems:
            rank = "" if s.rank is None else f"{s.rank[0]}" if s.rank[0] == s.rank[1] else f"{s.rank[0]}-{s.rank[1]}"
            bounds = "" if s.low is None else f"{s.low:.1f} to {s.high:.1f}"
            name = s.name if s.role == "model" else f"({s.name})"
            text.append(
                f"  {rank:>5} {_shown(s.strict):>7} {bounds:>14} {_shown(s.normalised):>8} {_shown(s.paper):>6}  {name}"
            )
        return [*text, *(f"not counted: {said}" for said in self.left_out)]


def run(cfg: Config) -> Summary:
    """Writes the leaderboard. Raises ValueError where runs are not judged, or not by one judge with one table."""
    labels = {uri.rstrip("/"): name for uri, name in cfg.labels.items()}
    if unknown := labels.keys() - {uri.rstrip("/") for uri in cfg.runs}:
        raise ValueError(f"--labels names runs that are not given: {', '.join(sorted(unknown))}")
    runs = [open_judged(uri, cfg.judging, labels.get(uri.rstrip("/"))) for uri in cfg.runs]
    return write_leaderboard(cfg, runs)


def write_leaderboard(cfg: Config, runs: Sequence[JudgedRun]) -> Summary:
    """The same for runs that are open already."""
    board = make_leaderboard(read_systems(runs), seed=cfg.seed, num=cfg.num_resamples)
    now = datetime.now(UTC)
    llm_scores, basis = read_llm_scores(runs)
    facts = BoardFacts(
        title=cfg.title, made_at=now.isoformat(sep=" ", timespec="seconds"), settings=_settings(cfg, runs),
        llm_scores=llm_scores, llm_basis=basis,
    )  # fmt: skip
    summary = Summary(
        out=cfg.out, judge=board.judge, datasets=board.datasets, num_questions=board.num_questions,
        num_regions=board.num_regions, systems=[_line(s) for s in (*board.models, *board.controls)],
        left_out=board.left_out,
    )  # fmt: skip
    files = {
        TABLE: leaderboard_csv(board),
        FIGURES: json.dumps(figures(board), indent=1) + "\n",
        PAGE: leaderboard_report(board, facts),
    }
    for name, text in eval_results(
        board, date=now.date().isoformat(), benchmark=cfg.benchmark, source_url=cfg.source_url
    ).items():
        files[f"{RESULTS}/{name}"] = text
    for name, text in files.items():
        storage.write_bytes(storage.join(cfg.out, name), text.encode())
    return summary


def figures(board: Leaderboard) -> dict[str, Any]:
    """Everything on the page as JSON: shares, not points; null where there is none."""
    systems = []
    for standing in (*board.models, *board.controls):
        systems.append(
            {
                "name": standing.name, "role": standing.role, "facts": dict(standing.facts), "rank": standing.rank,
                "normalised": _json(standing.normalised), "own_shuffled": _json(standing.own_shuffled),
                "num_questions": standing.num_questions, "unscored": standing.unscored,
                "num_hedged": standing.num_hedged,
                "scores": {
                    v: {n: _json(getattr(f, n)) for n in ("positive", "negative", "average")}
                    for v, f in standing.scores.items()
                },
            }
        )  # fmt: skip
    pairs = [
        {
            "first": p.first, "second": p.second, "difference": _json(p.comparison.difference),
            "p_value": p.comparison.p_value, "p_corrected": p.p_corrected,
        }
        for p in board.pairs
    ]  # fmt: skip
    return {
        "judge": board.judge, "datasets": board.datasets, "num_questions": board.num_questions,
        "num_regions": board.num_regions, "systems": systems, "pairs": pairs, "left_out": board.left_out,
    }  # fmt: skip


def _json(interval: Interval | None) -> list[float | None] | None:
    if interval is None:
        return None
    return [None if math.isnan(v) else round(v, 6) for v in (interval.value, interval.low, interval.high)]


def _settings(cfg: Config, runs: Sequence[JudgedRun]) -> dict[str, str]:
    described = [r.judging.read_json(JUDGE) or {} for r in runs]
    tables = sorted({f"{d['questions']['uri']} ({d['questions']['digest']})" for d in described})
    return {
        **_trust(runs),
        "Questions": "; ".join(tables),
        "Runs": "; ".join(f"{r.run.uri} ({r.judging.name})" for r in runs),
        "Intervals": f"{cfg.num_resamples:,} resamples, seed {cfg.seed}",
        "meddam": __version__,
    }


def _trust(runs: Sequence[JudgedRun]) -> dict[str, str]:
    """How the judge agrees with itself, and the members of a panel with each other, where that was measured."""
    said: dict[str, list[str]] = {}
    for run in runs:
        summary = run.judging.read_json(SUMMARY) or {}
        retest, panel = summary.get("retest") or {}, summary.get("agreement") or {}
        if "same" in retest:
            said.setdefault("Judge asked twice", []).append(f"{100 * retest['same']:.1f} % equal answers")
        if "alpha" in panel:
            said.setdefault("Agreement of the panel", []).append(f"Krippendorff's alpha {panel['alpha']:.2f}")
    return {name: "; ".join(dict.fromkeys(texts)) for name, texts in said.items()}


def _line(standing: Standing) -> Line:
    strict, paper = standing.scores["strict"], standing.scores["paper"]
    return Line(
        name=standing.name, role=standing.role, rank=standing.rank, strict=_points(strict.average.value),
        low=_points(strict.average.low), high=_points(strict.average.high), positive=_points(strict.positive.value),
        negative=_points(strict.negative.value), paper=_points(paper.average.value),
        normalised=None if standing.normalised is None else _points(standing.normalised.value),
        unscored_rate=standing.unscored_rate,
    )  # fmt: skip


def _points(share: float) -> float | None:
    return None if math.isnan(share) else round(100 * share, 2)


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


if __name__ == "__main__":  # the same options as `meddam leaderboard`
    run_as("leaderboard")
