"""What all pages share: the template environment, and how numbers are written.

html = environment().get_template("dataset_report.html.j2").render(...)
"""

from __future__ import annotations

from jinja2 import Environment, PackageLoader, StrictUndefined

NOT_FOR_DIAGNOSIS = "Made by a research model. Not a medical device; not for diagnosis or treatment."


def environment() -> Environment:
    """Templates of this package, with everything escaped and a missing name an error."""
    made = Environment(
        loader=PackageLoader("meddam_core.reports"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    made.filters.update(num=number, share=share, duration=duration)
    return made


def number(value: float, digits: int = 0) -> str:
    """With thousands separated by commas."""
    return f"{value:,.{digits}f}"


def share(value: float) -> str:
    """A share of 1 as a percentage that never rounds something to nothing, nor nearly all to all."""
    if value in (0, 1):
        return f"{100 * value:.0f} %"
    return "< 0.1 %" if value < 0.001 else "> 99.9 %" if value > 0.999 else f"{100 * value:.1f} %"


def duration(seconds: float) -> str:
    """The two units that matter."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    if hours:
        return f"{hours} h {m:02d} min"
    return f"{m} min {s:02d} s" if m else f"{seconds:.1f} s"
