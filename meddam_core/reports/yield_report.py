"""Two small pages: what curation keeps at which threshold, and how a training run went. One offline HTML file each.

html = yield_report(num=1000, kept=420, dropped={"confidence": 580}, curves={...}, examples={...})
html = training_report("runs/ft", curve, facts)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from meddam_core.curation.best import YieldPoint
from meddam_core.reports.curves import line_svg
from meddam_core.reports.page import NOT_FOR_DIAGNOSIS, environment


def yield_report(
    num: int, kept: int, dropped: Mapping[str, int], curves: Mapping[str, Sequence[YieldPoint]],
    examples: Mapping[str, Sequence[tuple[str, str]]],
) -> str:  # fmt: skip
    """The page of a curated set: counts by filter with examples, and for each measure its yield curve."""
    plots = [_yield_plot(name, points) for name, points in curves.items() if points]
    rows = [(name, count, examples.get(name, ())) for name, count in sorted(dropped.items(), key=lambda i: -i[1])]
    return environment().get_template("yield_report.html.j2").render(
        num=num, kept=kept, rows=rows, plots=plots, not_for_diagnosis=NOT_FOR_DIAGNOSIS
    )  # fmt: skip


def _yield_plot(name: str, points: Sequence[YieldPoint]) -> dict[str, object]:
    whole = points[-1].kept
    series = {"kept": [(p.threshold, p.kept / whole) for p in points]}
    right = [(p.threshold, p.right) for p in points if p.right is not None]
    if right:
        series["right, where truth is known"] = right
    svg = line_svg(series, x_label=f"least {name}", y_label="share", alt=f"Yield by {name}")
    return {"name": name, "svg": svg, "points": [p for i, p in enumerate(points) if i % 4 == 3 or p is points[-1]]}


def training_report(title: str, curve: Sequence[Mapping[str, float]], facts: Mapping[str, object]) -> str:
    """The page of a training run: the loss by step, the held-out score where it was measured, and the settings."""
    losses = [(float(e["step"]), float(e["loss"])) for e in curve if "loss" in e]
    scores = {
        name.removeprefix("meddlc_"): [(float(e["step"]), 100 * float(e[name])) for e in curve if name in e]
        for name in ("meddlc_average", "meddlc_positive", "meddlc_negative")
    }
    plots = []
    if losses:
        plots.append(
            ("Loss of a caption token", line_svg({"loss": losses}, x_label="step", y_label="loss", alt="Loss"))
        )
    if any(scores.values()):
        svg = line_svg({k: v for k, v in scores.items() if v}, x_label="step", y_label="score", alt="MedDLC-score")
        plots.append(("MedDLC-score on held-out regions (strict, lexical judge)", svg))
    return environment().get_template("training_report.html.j2").render(
        title=title, plots=plots, facts=facts, not_for_diagnosis=NOT_FOR_DIAGNOSIS
    )  # fmt: skip
