"""The leaderboard as one HTML file that can be mailed and opened anywhere, without network or scripts.

    html = leaderboard_report(board, facts)

Invariants:
- the page loads nothing: plots are inline, a policy forbids the rest; every text that comes from data is escaped;
- every score stands with its interval, its number of questions and what could not be judged;
- the paper's figures stand in a table of their own and are ranked with nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from meddam_core.judging.leaderboard import CONTROL_MEANING, CONTROLS, Cell, Figures, Leaderboard, Pair, Standing
from meddam_core.judging.published import PAPER_TABLE, SOURCE
from meddam_core.judging.scores import ASSUMPTIONS
from meddam_core.judging.statistics import Interval
from meddam_core.reports.page import NOT_FOR_DIAGNOSIS, environment

MINUS, DASH = "\u2212", "\u2013"
_LABEL_PLACES: dict[str, dict[str, Any]] = {
    "model": {},
    "blank": {"dx": 3, "dy": -2.4, "anchor": "start"},
    "shuffled": {"dx": -3, "dy": -1.2, "anchor": "end"},
    "majority": {"dx": 3, "dy": 4.6, "anchor": "start"},
    "truth": {"dx": -3, "dy": 5, "anchor": "end"},
}
"""Where a control's name stands beside its square: shuffled and majority captions score about the same."""
CONTROL_NAMES = {"blank": "Blank", "shuffled": "Shuffled", "majority": "Majority", "truth": "Truth-made"}


@dataclass(frozen=True, slots=True, kw_only=True)
class LlmScoreRow:
    """LLM-score of one system; 0 to 100."""

    name: str
    score: float | None
    factors: Mapping[str, float]
    lacking: float
    """Share of the ratings that the model did not give."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BoardFacts:
    """What stands around the figures."""

    title: str
    made_at: str
    settings: Mapping[str, str] = field(default_factory=dict)
    """Questions, seed, versions: everything that decides a figure beside the captions."""
    llm_scores: Sequence[LlmScoreRow] = ()
    llm_basis: str = ""
    """Who rated and what they saw."""


def leaderboard_report(board: Leaderboard, facts: BoardFacts) -> str:
    """The whole page as a string of HTML."""
    page = environment()
    page.filters["points"] = points
    numbers = {m.name: i for i, m in enumerate(board.models, start=1)}
    return page.get_template("leaderboard.html.j2").render(
        board=board,
        facts=facts,
        verdict=_verdict(board),
        marks=_marks(board),
        rows=[_row(m, numbers[m.name]) for m in board.models],
        controls=[_row(c, None) | {"meaning": CONTROL_MEANING[c.role]} for c in board.controls],
        missing_controls=_missing(board),
        pairs=_pairs(board),
        datasets=_datasets(board, numbers),
        attributes=_attributes(board),
        columns=_columns(board, numbers),
        plane=_plane(board, numbers),
        unscored=_unscored(board),
        assumptions=ASSUMPTIONS,
        paper=PAPER_TABLE,
        paper_source=SOURCE,
        not_for_diagnosis=NOT_FOR_DIAGNOSIS,
    )


def _missing(board: Leaderboard) -> list[str]:
    dealt = any(m.own_shuffled is not None for m in board.models)
    return [CONTROL_NAMES[r] for r in CONTROLS if board.control(r) is None and not (r == "shuffled" and dealt)]


def points(value: float, signed: bool = False) -> str:
    """A share as points of 100 with one decimal; a dash where there is none."""
    if math.isnan(value):
        return DASH
    text = f"{100 * value:+.1f}" if signed else f"{100 * value:.1f}"
    return text.replace("-", MINUS) if text not in ("-0.0", "+0.0") else "0.0"


def bounds(interval: Interval, signed: bool = False) -> str:
    """An interval's ends in points; "" where there are none."""
    if math.isnan(interval.low):
        return ""
    joint = " to " if signed or interval.low < 0 else DASH
    return f"{points(interval.low, signed)}{joint}{points(interval.high, signed)}"


def _score(interval: Interval) -> dict[str, Any]:
    """What a cell and its track need: text, and places in percent of the track."""
    known = not math.isnan(interval.low)
    low, high = (interval.low, interval.high) if known else (interval.value, interval.value)
    return {
        "text": points(interval.value),
        "bounds": bounds(interval),
        "at": _place(interval.value),
        "low": _place(low),
        "width": round(max(0.0, _place(high) - _place(low)), 2),
    }


def _place(share: float) -> float:
    return 0.0 if math.isnan(share) else round(100 * min(1.0, max(0.0, share)), 2)


def _figures(figures: Figures) -> dict[str, Any]:
    return {name: _score(getattr(figures, name)) for name in ("positive", "negative", "average")}


def _row(standing: Standing, number: int | None) -> dict[str, Any]:
    rank = standing.rank
    placed = "" if rank is None else str(rank[0]) if rank[0] == rank[1] else f"{rank[0]}{DASH}{rank[1]}"
    return {
        "name": CONTROL_NAMES[standing.role] if standing.role != "model" else standing.name,
        "role": standing.role,
        "number": number,
        "rank": placed,
        "facts": " · ".join(standing.facts.values()),
        "strict": _figures(standing.scores["strict"]),
        "paper": _figures(standing.scores["paper"]),
        "normalised": None if standing.normalised is None else _score(standing.normalised),
        "own_shuffled": None if standing.own_shuffled is None else _score(standing.own_shuffled),
        "own_unshuffled": None if standing.own_unshuffled is None else _score(standing.own_unshuffled),
        "regions": standing.num_regions,
        "unscored": standing.unscored_rate,
    }


def _marks(board: Leaderboard) -> list[dict[str, Any]]:
    """Where the controls lie on every track."""
    return [
        {"role": c.role, "name": CONTROL_NAMES[c.role], "at": _place(c.scores["strict"].average.value)}
        for c in board.controls
    ]


def _verdict(board: Leaderboard) -> list[str]:
    """What the figures say, in sentences."""
    best = board.models[0]
    own = best.scores["strict"].average
    said = [
        f"{best.name} has the highest strict score: {points(own.value)} of 100"
        + (f" (95 % interval {bounds(own)})." if bounds(own) else ".")
    ]
    if len(board.models) > 1:
        said.append(_lead(board))
    if best.normalised is not None:
        said.append(
            f"On the scale from the majority caption (0) to captions made from the truth (100) that is "
            f"{points(best.normalised.value)}."
        )
        if best.normalised.high < 0:
            said.append("That is worse than giving every region the same caption.")
    if best.own_shuffled is not None and best.own_unshuffled is not None:
        said.append(
            f"With its captions dealt out at random among regions of the same kind it scores "
            f"{points(best.own_shuffled.value)} instead of {points(best.own_unshuffled.value)}: only the difference is "
            "about the region itself."
        )
    return said


def _lead(board: Leaderboard) -> str:
    pair = next(p for p in board.pairs if {p.first, p.second} == {board.models[0].name, board.models[1].name})
    difference = pair.comparison.difference
    tail = (
        "and that holds after correction for the number of comparisons"
        if pair.significant
        else "which chance alone would explain: the two cannot be told apart"
    )
    return f"It leads {pair.second} by {points(difference.value)} ({bounds(difference, True)}), {tail}."


def _pairs(board: Leaderboard) -> list[dict[str, Any]]:
    reach = max((abs(v) for p in board.pairs for v in _ends(p)), default=0.0) or 1.0
    return [
        {
            "first": pair.first,
            "second": pair.second,
            "difference": points(pair.comparison.difference.value, signed=True),
            "bounds": bounds(pair.comparison.difference, signed=True),
            "p": DASH if math.isnan(pair.comparison.difference.value) else _p(pair.p_corrected),
            "significant": pair.significant,
            "at": round(50 + 46 * sorted(_ends(pair))[len(_ends(pair)) // 2] / reach, 2),
            "low": round(50 + 46 * min(_ends(pair)) / reach, 2),
            "width": round(46 * (max(_ends(pair)) - min(_ends(pair))) / reach, 2),
        }
        for pair in board.pairs
    ]


def _ends(pair: Pair) -> list[float]:
    found = pair.comparison.difference
    return [v for v in (found.low, found.value, found.high) if not math.isnan(v)] or [0.0]


def _p(value: float) -> str:
    return "< 0.01" if value < 0.01 else f"{value:.2f}"


def _datasets(board: Leaderboard, numbers: Mapping[str, int]) -> list[dict[str, Any]]:
    found = []
    for dataset in board.datasets:
        rows = []
        for standing in (*board.models, *board.controls):
            if dataset in standing.by_dataset["strict"]:
                row = _row(standing, numbers.get(standing.name))
                row["strict"] = _figures(standing.by_dataset["strict"][dataset])
                row["paper"] = _figures(standing.by_dataset["paper"][dataset])
                rows.append(row)
        count = sum(c.num_questions for c in board.models[0].by_attribute["strict"] if c.dataset == dataset)
        found.append({"name": dataset, "rows": rows, "count": count})
    return found


def _columns(board: Leaderboard, numbers: Mapping[str, int]) -> list[dict[str, Any]]:
    """Heads of the attribute tables: models by number, then the controls that bound the scale."""
    heads = [{"head": str(numbers[m.name]), "name": m.name, "standing": m} for m in board.models]
    for role in ("majority", "truth"):
        control = board.control(role)
        if control is not None:
            heads.append({"head": CONTROL_NAMES[role], "name": CONTROL_MEANING[role], "standing": control})
    return heads


def _attributes(board: Leaderboard) -> list[dict[str, Any]]:
    """For each dataset a row for each attribute and polarity, with the strict share of every column."""
    heads = _columns(board, {m.name: i for i, m in enumerate(board.models, start=1)})
    cells: list[dict[tuple[str, str, str], Cell]] = [
        {(c.dataset, c.attribute, c.polarity): c for c in h["standing"].by_attribute["strict"]} for h in heads
    ]
    found = {k for column in cells for k in column}
    tables = []
    for dataset, template_set in sorted({(k[0], k[1].rpartition("/")[0]) for k in found}):
        mine = [k for k in found if (k[0], k[1].rpartition("/")[0]) == (dataset, template_set)]
        rows = [
            {
                "attribute": key[1].rpartition("/")[2].replace("_", " "),
                "polarity": key[2],
                "count": max(column[key].num_questions for column in cells if key in column),
                "cells": [_heat(column.get(key)) for column in cells],
            }
            for key in sorted(mine, key=lambda k: (k[1], k[2] != "positive"))
        ]
        tables.append({"name": dataset, "set": template_set.replace("_", " "), "rows": rows})
    return tables


def _heat(cell: Cell | None) -> dict[str, Any]:
    if cell is None:
        return {"text": DASH, "title": "nothing could be judged", "heat": 0}
    ends = bounds(cell.share)
    title = f"{cell.num_questions} questions" + (f", 95 % interval {ends}" if ends else "")
    return {
        "text": points(cell.share.value).removesuffix(".0"),
        "title": title,
        "heat": round(_place(cell.share.value) / 2),
    }


def _plane(board: Leaderboard, numbers: Mapping[str, int]) -> list[dict[str, Any]]:
    """Each system as a point: positive accuracy across, negative accuracy up, in percent."""
    dots = []
    for standing in (*board.controls, *board.models):
        figures = standing.scores["strict"]
        across, up = _score(figures.positive), _score(figures.negative)
        dots.append(
            {
                "name": CONTROL_NAMES.get(standing.role, standing.name), "role": standing.role,
                "number": numbers.get(standing.name), "x": across["at"], "y": 100 - up["at"],
                "x0": across["low"], "x1": across["low"] + across["width"],
                "y0": 100 - up["low"], "y1": 100 - up["low"] - up["width"], **_LABEL_PLACES[standing.role],
            }
        )  # fmt: skip
    return dots


def _unscored(board: Leaderboard) -> list[dict[str, Any]]:
    return [
        {
            "name": CONTROL_NAMES.get(s.role, s.name), "count": sum(s.unscored.values()), "total": s.num_questions,
            "rate": s.unscored_rate, "hedged": s.num_hedged,
            "reasons": ", ".join(f"{reason} {count:,}" for reason, count in sorted(s.unscored.items())),
        }
        for s in (*board.models, *board.controls)
    ]  # fmt: skip
