"""Models that come with the package.

default_model()          # the folder of meddam-tiny, a small DAM trained on synthetic images only
"""

from __future__ import annotations

from pathlib import Path

TINY = "meddam-tiny"


def default_model() -> str:
    """The checkpoint folder that commands use where none is given. Raises ValueError where it was not installed."""
    folder = Path(__file__).parent / TINY
    if not (folder / "config.json").is_file():
        raise ValueError(f"the packaged model {TINY} is not installed; give --model and a DAM checkpoint folder")
    return str(folder)
