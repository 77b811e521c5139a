"""What a run may spend at an endpoint, and has: how it is put down, and taken up after a kill. Plain Python."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meddam_core import storage

_COUNTS = ("num_calls", "num_answered", "num_limited", "num_failed", "num_tokens", "num_lost")


@dataclass(slots=True)
class Purse:
    """What one run may spend, and has."""

    max_usd: float | None
    state_uri: str | None
    timeout_s: float = 60.0
    """After which the run's callers give a call up themselves."""
    patience_s: float = 600.0
    """How long nothing but failures may come before the run is stopped."""
    job: str = ""
    """The Ray job of the run's driver."""
    spent_usd: float = 0.0
    reserved_usd: float = 0.0
    num_calls: int = 0
    num_answered: int = 0
    num_limited: int = 0
    num_failed: int = 0
    num_tokens: int = 0
    num_lost: int = 0
    """Calls of drivers and workers that were killed: begun, never settled. They may have been paid twice."""

    def state(self) -> dict[str, Any]:
        """What a resumed run must know; dollars of running calls count as spent."""
        return {"spent_usd": self.spent_usd + self.reserved_usd, **{n: getattr(self, n) for n in _COUNTS}}

    def take_up(self, state: Mapping[str, Any]) -> None:
        """Goes on from a state that was put down; its open calls are lost, and counted in its dollars."""
        for name in _COUNTS:
            setattr(self, name, int(state[name]))
        self.spent_usd = float(state["spent_usd"])
        self.num_lost += int(state["num_open"])

    def take_over(self, earlier: Purse) -> None:
        """Goes on from the purse of the run's driver before, whose calls have been given up."""
        for name in ("spent_usd", *_COUNTS):
            setattr(self, name, getattr(earlier, name))

    def is_beyond(self, usd: float) -> bool:
        """Whether a call may cost too much if all that run now cost what was reserved for them."""
        committed = self.spent_usd + self.reserved_usd + usd
        return self.max_usd is not None and self.reserved_usd > 1e-12 and committed > self.max_usd + 1e-9


def put_down(states: Mapping[str, bytes]) -> dict[str, str]:
    """Writes each state to its URI. Returns what is wrong, by URI, with those that could not be written."""
    unwritten = {}
    for uri, state in states.items():
        try:
            storage.write_bytes(uri, state)
        except (OSError, storage.StorageError) as error:
            unwritten[uri] = str(error) if isinstance(error, storage.StorageError) else storage.explain(uri, error)
    return unwritten


def moment() -> dict[str, Any]:
    """Now, by a clock that nobody sets: it counts from the boot of this machine, for all of its processes."""
    return {"boot": _boot(), "monotonic_s": time.monotonic()}


def age_s(then: Mapping[str, Any] | None) -> float | None:
    """Seconds since a `moment`; None where it is another machine's: wall clocks differ, and jump."""
    if then is None or then["boot"] != _boot() or then["boot"] is None:
        return None
    return max(0.0, time.monotonic() - float(then["monotonic_s"]))


def _boot() -> str | None:
    """What names this boot of this machine; None where the kernel doesn't tell."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None
