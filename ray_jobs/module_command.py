"""Makes a job's module a program: `python -m ray_jobs.judge ...` is `meddam judge ...`, as `ray job submit` needs it.

    if __name__ == "__main__":  # the same options as `meddam judge`
        run_as("judge")

The command line imports every job, so that a job cannot import it; it is run by name instead.
"""

from __future__ import annotations

import runpy
import sys


def run_as(*words: str) -> None:
    """Runs the command line as `meddam WORDS ...`, with what this process was given behind it; ends the process."""
    sys.argv[1:1] = words
    runpy.run_module("ray_jobs.cli", run_name="__main__")
