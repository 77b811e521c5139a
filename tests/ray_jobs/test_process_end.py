"""Processes that have read Parquet out of memory end with their own exit code, not with SIGABRT."""

from __future__ import annotations

import subprocess
import sys

import pytest

READ = (
    "import io, sys, atexit, threading, pyarrow as pa, pyarrow.parquet as pq\n"
    "from ray_jobs.process_end import run_and_end\n"
    "def work():\n"
    "    sink = io.BytesIO(); pq.write_table(pa.table({c: [1, 2] for c in 'abcdefgh'}), sink)\n"
    "    pq.read_table(io.BytesIO(sink.getvalue())); print('read')\n"
    "    atexit.register(print, 'at exit')\n"
    "    threading.Timer(0.05, print, ['thread']).start()\n"
    "    from concurrent.futures import ThreadPoolExecutor\n"
    "    global pool; pool = ThreadPoolExecutor(2); pool.submit(int)\n"  # never shut down
    "    {end}\n"
    "run_and_end(work)\n"
)


@pytest.mark.parametrize(
    ("end", "code", "said"),
    [("pass", 0, ""), ("sys.exit(4)", 4, ""), ("sys.exit()", 0, ""), ("raise RuntimeError('x')", 1, "RuntimeError: x")],
)
def test_exit_codes_are_the_works_own(end: str, code: int, said: str) -> None:
    command = [sys.executable, "-c", READ.replace("{end}", end)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.split("\n")[:3]) == (code, ["read", "thread", "at exit"])
    assert said in done.stderr and (said or not done.stderr)
