"""A reader's blind sheet as one HTML page: descriptions, questions, options; answers are saved as a CSV by the browser.

Shows nothing of a judge, a model, a verdict or the truth, and loads nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from meddam_core.judging.adjudication import UNSURE, Item
from meddam_core.reports.page import NOT_FOR_DIAGNOSIS, environment


def adjudication_sheet(items: Sequence[Item], reader: str) -> str:
    """The page, its items in the order given."""
    return (
        environment()
        .get_template("adjudication.html.j2")
        .render(items=items, reader=reader, unsure=UNSURE, not_for_diagnosis=NOT_FOR_DIAGNOSIS)
    )
