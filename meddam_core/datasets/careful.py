"""Items of a source, each worked on in a child process, for sources that have killed a process before.

Decoders are C code fed with broken files: one can crash, or ask for more memory than there is. Ray would start the
task again and again. Here the child dies alone; its item becomes a reject with the reason killed_process, and a new
child goes on with the next one.

`python -m meddam_core.datasets.careful` is the child: it reads requests from stdin and writes answers to stdout.
"""

from __future__ import annotations

import os
import pickle
import struct
import subprocess
import sys
from collections.abc import Iterable, Iterator
from typing import IO, Any

from meddam_core.datasets.base import Problem, Source, SourceItem
from meddam_core.datasets.rows import Rejected, RowRules, rows_of
from meddam_core.imaging.deidentify import keyed_hash
from meddam_core.records import Image, Reason

Outcome = tuple[list[Image], list[Rejected]]


def rows_in_children(
    source: Source, items: Iterable[tuple[int, SourceItem]], rules: RowRules, shard: int
) -> Iterator[Outcome]:
    """As `rows_of` for (ordinal, item) in turn, numbering rows from 0, whatever a decoder does to its process."""
    child: subprocess.Popen[bytes] | None = None
    row = 0
    try:
        for ordinal, item in items:
            child = child or _start()
            request = {"ordinal": ordinal, "rules": rules, "shard": shard, "first_row": row}
            answer = _ask(child, (source, item, request))
            if answer is None:
                child.kill()
                child.wait()
                child = None
                answer = [], [_killed(ordinal, item, rules)]
            row += len(answer[0])
            yield answer
    finally:
        if child is not None:
            child.kill()
            child.wait()


def _start() -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-m", "meddam_core.datasets.careful"]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)


def _ask(child: subprocess.Popen[bytes], request: Any) -> Outcome | None:
    """The child's answer; None if it died over it."""
    assert child.stdin is not None and child.stdout is not None
    try:
        _send(child.stdin, request)
    except BrokenPipeError:
        return None
    answer: Outcome | None = _receive(child.stdout)
    return answer


def _killed(ordinal: int, item: SourceItem, rules: RowRules) -> Rejected:
    problem = Problem(reason=Reason.KILLED_PROCESS, detail="reading it ended the process, more than once")
    key = keyed_hash(rules.image_secret, f"image:{rules.dataset}:{item.key}")
    return Rejected(item=ordinal, region=None, reason=problem.reason, detail=problem.detail, image_key=key)


def _send(stream: IO[bytes], value: Any) -> None:
    body = pickle.dumps(value)
    stream.write(struct.pack("<Q", len(body)) + body)
    stream.flush()


def _receive(stream: IO[bytes]) -> Any:
    """The next value; None at the end of the stream."""
    head = stream.read(8)
    if len(head) < 8:
        return None
    (length,) = struct.unpack("<Q", head)
    body = stream.read(length)
    return pickle.loads(body) if len(body) == length else None


def _child() -> None:
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a decoder prints must not mix with answers
    while (request := _receive(sys.stdin.buffer)) is not None:
        source, item, arguments = request
        _send(answers, rows_of(source, item, **arguments))


if __name__ == "__main__":
    _child()
