"""The torch engine, slow or with a fault: what it captions it captions as the real one does, to the last bit."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from meddam_core.dam.checkpoint import load_dam
from meddam_core.engines.base import Request
from meddam_core.engines.torch_engine import TorchEngine
from meddam_core.engines.vision import Pending
from tests.faults.engines import POISON

NOTES = "MEDDAM_FAULTS_NOTES"
WAIT_S = 0.3


def _is_poisoned(request: Request) -> bool:
    return bool((request.views_N8SS[0, :3] == POISON).all())


class _Torch(TorchEngine):
    def __init__(self, folder: str, *, device: str, dtype: str, slots: int | None = None) -> None:
        super().__init__(load_dam(folder, device=device, dtype=getattr(torch, dtype)), max_batch=slots)


class PatientTorch(_Torch):
    """Waits before each batch, without the CPU: captioning goes on for long enough after the first commit."""

    def submit(self, requests: Sequence[Request]) -> None:
        time.sleep(WAIT_S)
        super().submit(requests)


class KillingTorch(_Torch):
    """A poisoned region is a kill -9 of the process."""

    def submit(self, requests: Sequence[Request]) -> None:
        super().submit(requests)
        if any(_is_poisoned(r) for r in requests):
            os.kill(os.getpid(), signal.SIGKILL)


class HungryTorch(_Torch):
    """Wants 64 MB a request in a process that may have 160 MB more; a poisoned region wants a petabyte.

    It is the allocator that refuses. The file $MEDDAM_FAULTS_NOTES gets a line for each time: how many requests it was.
    """

    def _reserve(self, group: list[Pending]) -> None:
        super()._reserve(group)
        poisoned = any(_is_poisoned(p.generation.request) for p in group)
        try:
            with _address_space(160 << 20):
                torch.empty(1 << 50 if poisoned else len(group) * (64 << 20), dtype=torch.uint8)
        except RuntimeError:
            with Path(os.environ[NOTES]).open("a") as notes:
                notes.write(f"{len(group)}\n")
            raise


@contextlib.contextmanager
def _address_space(more_bytes: int) -> Iterator[None]:
    """Lets the process have so much more memory and not a byte beyond, for the length of the block."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * os.sysconf("SC_PAGE_SIZE") + more_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
