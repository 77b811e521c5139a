"""Engines that break on purpose, named by path in a run's configuration: `tests.faults.engines:KillingEngine`."""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.waiting_engine import WaitingEngine
from meddam_core.engines.base import Request, Result
from meddam_core.records import Reason

POISON = 201
"""A region whose full view is of this one grey ends the process: as a driver bug or an out-of-memory kill would."""


class KillingEngine(WaitingEngine):
    """Dies, without a word, on poisoned pixels; captions everything else."""

    name = "killing"

    def submit(self, requests: Sequence[Request]) -> None:
        super().submit(requests)
        if any((r.views_N8SS[0, :3] == POISON).all() for r in requests):
            os.kill(os.getpid(), signal.SIGKILL)


class BreakingEngine(WaitingEngine):
    """Cannot be used again once it has seen a poisoned region, as after an error that left half a step behind."""

    name = "breaking"

    def step(self) -> list[Result]:
        if any((r.views_N8SS[0, :3] == POISON).all() for r in self._queue):
            raise RuntimeError("shapes do not match")
        return super().step()


class BrokenEngine(WaitingEngine):
    """Answers every request with an error, as a model with NaN weights does."""

    name = "broken"

    def step(self) -> list[Result]:
        return [
            Result(
                request_id=r.request_id, text="", token_ids=(), mean_logprob=None, finish_reason="error",
                reason=Reason.ENGINE_ERROR, detail="the logits are not numbers",
            )
            for r in super().step()
        ]  # fmt: skip


MENDED = Path(tempfile.gettempdir()) / f"meddam-mended-{os.getuid()}"
"""While this file is there, RefusingEngine refuses nothing: a fault that its user has mended."""


class RefusingEngine(WaitingEngine):
    """Fails poisoned regions only."""

    name = "refusing"

    def step(self) -> list[Result]:
        if MENDED.exists():
            return super().step()
        poisoned = {r.request_id for r in self._queue if (r.views_N8SS[0, :3] == POISON).all()}
        return [
            replace(r, finish_reason="error", reason=Reason.ENGINE_ERROR, detail="refused")
            if r.request_id in poisoned
            else r
            for r in super().step()
        ]


class SlowEngine(WaitingEngine):
    """Takes a tenth of a second a region: there is time to look at a run, and to stop it."""

    name = "slow"

    def step(self) -> list[Result]:
        time.sleep(0.1 * min(8, self.num_unfinished))
        return super().step()
