"""The end of a process that has used Arrow: at once, before the interpreter takes itself apart.

Arrow's threads may still let go of Python objects (a buffer over bytes) after the last line of a program. A thread that
asks for the interpreter while it ends is ended itself, in the middle of C++, and the process aborts: on a busy machine
9 of 25 processes that had read a small Parquet file out of memory ended with SIGABRT (pyarrow 26), their work done.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
import traceback
from collections.abc import Callable
from typing import NoReturn


def run_and_end(work: Callable[[], object]) -> NoReturn:
    """Runs `work` as the whole program: its exit code is its SystemExit's, or 1, with a traceback, for another error.

    What is registered with `atexit` runs, and threads that are no daemons are waited for, as at any end.
    """
    code = 0
    try:
        work()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1 if error.code else 0
    except BaseException:  # noqa: BLE001 - the last one who can: what the interpreter itself would do
        traceback.print_exc()
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]  # as the interpreter does: ends executors, joins threads
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
