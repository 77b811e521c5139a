"""Curves as inline SVG: a few lines over one axis, coloured by the page's CSS.

line_svg({"loss": [(20, 5.9), (40, 4.3)]}, x_label="step", y_label="loss", alt="The loss falls.")
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP, _RIGHT = 640, 260, 56, 40, 12, 12
_COLOURS = ("var(--accent)", "var(--ok)", "var(--truncated)", "var(--failed)", "var(--muted)")

Points = Sequence[tuple[float, float]]


def line_svg(series: Mapping[str, Points], *, x_label: str, y_label: str, alt: str) -> str:
    """An `<svg>` element that scales with its container. Raises ValueError where no series has a point."""
    points = [p for found in series.values() for p in found]
    if not points:
        raise ValueError("there is nothing to draw")
    x_low, x_high = _span([p[0] for p in points])
    y_low, y_high = _span([p[1] for p in points])

    def at(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / (x_high - x_low) * (_WIDTH - _LEFT - _RIGHT)
        up = (y - y_low) / (y_high - y_low) * (_HEIGHT - _TOP - _BOTTOM)
        return round(_LEFT + across, 1), round(_HEIGHT - _BOTTOM - up, 1)

    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(alt)}" width="100%">']
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        value = y_low + share * (y_high - y_low)
        _, y = at(x_low, value)
        parts.append(f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y}" y2="{y}" stroke="var(--line)"/>')
        parts.append(_text(_LEFT - 6, y + 4, f"{value:.3g}", "end"))
    for share in (0.0, 0.5, 1.0):
        value = x_low + share * (x_high - x_low)
        x, _ = at(value, y_low)
        parts.append(_text(x, _HEIGHT - _BOTTOM + 16, f"{value:.4g}", ("start", "middle", "end")[round(share * 2)]))
    parts.append(_text((_LEFT + _WIDTH) / 2, _HEIGHT - 6, x_label, "middle"))
    for number, (name, found) in enumerate(series.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        path = " ".join(f"{x},{y}" for x, y in (at(*p) for p in found))
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.append(
            _text(_WIDTH - _RIGHT - 4, _TOP + 14 + 15 * number, name if len(series) > 1 else y_label, "end", colour)
        )
    return "".join([*parts, "</svg>"])


def _span(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _text(x: float, y: float, text: str, anchor: str, colour: str = "var(--muted)") -> str:
    return f'<text x="{x}" y="{y}" font-size="12" text-anchor="{anchor}" fill="{colour}">{escape(text)}</text>'
