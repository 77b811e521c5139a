"""Sources that fail: an item ends the process that loads it, as a broken file can do to a decoder written in C, or the
store is throttled at first."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from meddam_core.datasets.base import Source, SourceItem, SourceRegion
from meddam_core.imaging.decoded import Decoded
from meddam_core.imaging.limits import Limits
from meddam_core.records import Egress
from ray_jobs.ingest_config import Config


@dataclass(frozen=True, slots=True, kw_only=True)
class Poisoned(Source):
    """Small grey pictures, numbered; loading one of `deadly` is a kill -9 of the process."""

    count: int
    deadly: tuple[int, ...]
    dataset: str = "poisoned"
    licence: str = "CC0-1.0"
    egress: Egress = "open"

    def fingerprint(self) -> str:
        return repr(self)

    def items(self) -> Iterator[SourceItem]:
        for number in range(self.count):
            yield SourceItem(key=str(number), uri=f"number:{number}")

    def load(self, item: SourceItem, limits: Limits) -> tuple[Decoded, list[SourceRegion]]:
        if int(item.key) in self.deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        pixels = np.full((32, 32), int(item.key), np.uint8)
        decoded = Decoded(stored=pixels, photometric="MONOCHROME2", modality="DX", burned_in_annotation=False)
        return decoded, [SourceRegion(ordinal=0, box=[2, 2, 20, 20])]


@dataclass(frozen=True, slots=True, kw_only=True)
class Throttled(Poisoned):
    """The first that is loaded meets a store that asks for less; a file notes that it was so."""

    noted: str

    def load(self, item: SourceItem, limits: Limits) -> tuple[Decoded, list[SourceRegion]]:
        if not Path(self.noted).exists():
            Path(self.noted).touch()
            raise OSError("AWS Error SLOW_DOWN during GetObject operation: Please reduce your request rate.")
        return Poisoned.load(self, item, limits)


class ThrottledConfig(Config):
    """Ingests a `Throttled` source."""

    noted: str
    """The file."""

    def source(self) -> Source:
        return Throttled(count=4, deadly=(), noted=self.noted)


class PoisonedConfig(Config):
    """Ingests a `Poisoned` source."""

    count: int = 10
    """Pictures."""
    deadly: tuple[int, ...] = ()
    """Which of them kill."""

    def source(self) -> Source:
        return Poisoned(count=self.count, deadly=self.deadly)
