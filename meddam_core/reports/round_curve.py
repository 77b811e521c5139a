"""Scores over rounds as inline SVG: a line an arm, each point with its interval, the chosen round ringed.

    round_curve_svg([Series("curated", "curated", [(55.0, 52.1, 57.9), (58.2, 55.0, 61.3)], chosen=1)], ...)

Colours and sizes of text are the page's CSS (classes `arm-NAME`, `curve`), so that they follow light and dark, and
stay legible on a phone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 640, 330, 52, 20, 18, 48
_ASIDE = 9.0
"""Between the whiskers of two arms at the same round."""

Point = tuple[float, float | None, float | None]
"""Value, low and high end of the interval."""


@dataclass(frozen=True, slots=True)
class Series:
    """One arm: a point a round, the first model being round 0."""

    key: str
    name: str
    points: Sequence[Point]
    chosen: int


def round_curve_svg(series: Sequence[Series], *, y_label: str, alt: str) -> str:
    """An `<svg>` element that scales with its container. Raises ValueError where there is no point."""
    values = [v for s in series for p in s.points for v in p if v is not None]
    if not values:
        raise ValueError("there is nothing to draw")
    num_rounds = max(1, max(len(s.points) for s in series) - 1)
    low, high, step = _scale(min(values), max(values))

    def x(number: float) -> float:
        return round(_LEFT + 24 + number / num_rounds * (_WIDTH - _LEFT - _RIGHT - 48), 1)

    def y(value: float) -> float:
        return round(_TOP + (high - value) / (high - low) * (_HEIGHT - _TOP - _BOTTOM), 1)

    parts = [f'<svg class="curve" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(alt)}">']
    for i in range(round((high - low) / step) + 1):
        at = y(low + i * step)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{at}" y2="{at}"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{at + 5}" text-anchor="end">{low + i * step:g}</text>')
    for number in range(num_rounds + 1):
        name = "first model" if number == 0 else f"round {number}"
        parts.append(f'<text x="{x(number)}" y="{_HEIGHT - 16}" text-anchor="middle">{name}</text>')
    for place, found in enumerate(series):
        aside = (place - (len(series) - 1) / 2) * _ASIDE
        parts += _line(found, aside, x, y)
    return "".join([*parts, f"<title>{escape(y_label)}</title></svg>"])


def _line(found: Series, aside: float, x: object, y: object) -> list[str]:
    assert callable(x) and callable(y)
    places = [(x(i) + (aside if i else 0.0), y(p[0])) for i, p in enumerate(found.points)]
    parts = [f'<g class="arm-{escape(found.key)}">']
    parts.append(f'<polyline points="{" ".join(f"{a:.1f},{b}" for a, b in places)}"/>')
    for number, ((a, b), (value, low, high)) in enumerate(zip(places, found.points, strict=True)):
        if low is not None and high is not None:
            parts.append(f'<line class="whisker" x1="{a:.1f}" x2="{a:.1f}" y1="{y(high)}" y2="{y(low)}"/>')
        if number == found.chosen:
            parts.append(f'<circle class="ring" cx="{a:.1f}" cy="{b}" r="9.5"/>')
        said = f"{found.name}, {'first model' if number == 0 else f'round {number}'}: {value:.1f}"
        parts.append(f'<circle class="point" cx="{a:.1f}" cy="{b}" r="5"><title>{escape(said)}</title></circle>')
    return [*parts, "</g>"]


def _scale(low: float, high: float) -> tuple[float, float, float]:
    """Ends and step of an axis: round numbers, four to seven lines."""
    step = next(s for s in (0.5, 1, 2, 5, 10, 20, 25) if (high - low) / s <= 5 or s == 25)
    bottom, top = math.floor(low / step) * step, math.ceil(high / step) * step
    return bottom, top if top > bottom else bottom + step, step
