"""Histograms as inline SVG: small, deterministic, and coloured by the page's CSS so that they follow light and dark.

Matplotlib draws with stand-in colours; each is then replaced by a CSS variable of the page.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import re
from collections.abc import Sequence
from html import escape

INK, MUTED, GRID, BAR = "#010203", "#010204", "#010205", "#010206"
_VARIABLES = {INK: "var(--ink)", MUTED: "var(--muted)", GRID: "var(--line)", BAR: "var(--accent)"}


def histogram_svg(
    edges: Sequence[float], counts: Sequence[int], *, x_label: str, y_label: str, alt: str, integer_bins: bool = False,
    log_x: bool = False,
) -> str:  # fmt: skip
    """One histogram as an `<svg>` element that scales with its container.

    `edges` has one entry more than `counts`. With `integer_bins` a bin holds one integer, its left edge, and the tick
    stands in its middle; with `log_x` the axis is logarithmic, for edges above 0. `alt` says what the plot shows, for
    people who can't see it.
    """
    if len(edges) != len(counts) + 1:
        raise ValueError(f"{len(counts)} bins need {len(counts) + 1} edges, got {len(edges)}")
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    with mpl.rc_context(
        {"svg.fonttype": "none", "svg.hashsalt": "meddam", "font.size": 10, "font.family": "sans-serif"}
    ):
        figure = Figure(figsize=(4.6, 2.5), layout="constrained")
        axes = figure.subplots()
        widths = [b - a for a, b in itertools.pairwise(edges)]
        axes.bar(
            edges[:-1], counts, width=[0.9 * w for w in widths], align="center" if integer_bins else "edge", color=BAR
        )
        axes.set_xlabel(x_label, color=MUTED)
        axes.set_ylabel(y_label, color=MUTED)
        axes.tick_params(colors=MUTED, length=0)
        axes.grid(axis="y", color=GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        for name, spine in axes.spines.items():
            spine.set_visible(name == "bottom")
            spine.set_color(GRID)
        axes.yaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
        if integer_bins and len(counts) <= 7:
            axes.set_xticks(edges[:-1])
            axes.set_xlim(edges[0] - 2, max(edges[-2], edges[0] + 3) + 1)
        elif log_x:
            axes.set_xscale("log")
            within_a_decade = edges[-1] < 40 * edges[0]
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if within_a_decade else (1,), numticks=9))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        else:
            axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=integer_bins))
        figure.patch.set_visible(False)
        axes.patch.set_visible(False)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return _for_page(buffer.getvalue(), alt)


def _for_page(svg: str, alt: str) -> str:
    """Only the <svg> element, sized by CSS, named for screen readers, in the page's colours and font."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    view_box = re.search(r'viewBox="([^"]+)"', svg)
    assert view_box is not None
    svg = re.sub(r"<svg[^>]*>", f'<svg role="img" aria-label="{escape(alt)}" viewBox="{view_box[1]}">', svg, count=1)
    svg = re.sub(
        r"<style.*?</style>|<g id=\"[^\"]*\"", lambda m: "<g" if m[0].startswith("<g") else "", svg, flags=re.DOTALL
    )
    own = hashlib.blake2b(alt.encode(), digest_size=4).hexdigest()  # ids of two plots on a page must differ
    svg = re.sub(r"(id=\"|#)([pm][0-9a-f]{10})", rf"\g<1>{own}-\2", svg)
    svg = re.sub(r"font: [^;\"]*?([\d.]+)px[^;\"]*", r"font-size: \1px", svg)
    for stand_in, variable in _VARIABLES.items():
        svg = svg.replace(stand_in, variable)
    return svg


def binned(counts: dict[int, int], num_bins: int) -> tuple[list[float], list[int], int]:
    """Integer counts joined into at most `num_bins` equally wide bins: (edges, counts, width of a bin)."""
    if not counts:
        return [0.0, 1.0], [0], 1
    low, high = min(counts), max(counts)
    width = max(1, -(-(high - low + 1) // num_bins))
    low -= low % width
    num = (high - low) // width + 1
    joined = [0] * num
    for value, count in counts.items():
        joined[(value - low) // width] += count
    return [float(low + i * width) for i in range(num + 1)], joined, width
