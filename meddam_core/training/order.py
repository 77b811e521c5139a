"""In which order examples are shown: files in a new order each epoch, mixed within windows of several files.

    for epoch, examples in batches(files, read, batch_size=32, window=8, seed=0, start=step):
        ...

A window of files is read, its examples are shuffled and dealt into batches; a rest too small for a batch is left for
another epoch. Memory holds one window. Each worker is given its own share of the files.

Invariant: batch number n is the same whether the stream began at 0 or later, so that a resumed run sees what it would
have seen; files before `start` are skipped by their known lengths, not read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from meddam_core.training.examples import Example


@dataclass(frozen=True, slots=True)
class File:
    """A part of the data that is read at once: a file of views, or a row group of an image shard."""

    uri: str
    num_examples: int
    row_group: int | None = None


Reader = Callable[[File], list[Example]]


def share(files: Sequence[File], rank: int, num_workers: int) -> list[File]:
    """The files of one worker. Raises ValueError where there are fewer files than workers."""
    if len(files) < num_workers:
        raise ValueError(f"{len(files)} files for {num_workers} workers: make smaller ones, or use fewer workers")
    return list(files[rank::num_workers])


def windows(files: Sequence[File], window: int, seed: int, epoch: int) -> list[list[File]]:
    """The files of an epoch in their order, in groups."""
    order = np.random.default_rng([seed, epoch, 0]).permutation(len(files))
    shuffled = [files[i] for i in order]
    return [shuffled[i : i + window] for i in range(0, len(shuffled), window)]


@dataclass(frozen=True, slots=True)
class Reading:
    """A window that is to be read: the files, and where it stands."""

    epoch: int
    number: int
    files: tuple[File, ...]
    skip: int
    """Batches of it that were already shown."""


def readings(files: Sequence[File], *, batch_size: int, window: int, seed: int, start: int = 0) -> Iterator[Reading]:
    """Endless windows from the one that holds batch number `start`. Raises ValueError where an epoch fills no batch."""
    skip, epoch = start, 0
    while True:
        passed = 0
        for number, group in enumerate(windows(files, window, seed, epoch)):
            num_here = sum(f.num_examples for f in group) // batch_size
            passed += num_here
            if skip >= num_here:
                skip -= num_here
                continue
            yield Reading(epoch, number, tuple(group), skip)
            skip = 0
        if passed == 0:
            raise ValueError(
                f"{sum(f.num_examples for f in files)} examples do not fill a batch of {batch_size}; give more, or a "
                "smaller batch"
            )
        epoch += 1


def dealt(reading: Reading, examples: Sequence[Example], batch_size: int, seed: int) -> Iterator[list[Example]]:
    """The batches of a window that was read; `examples` in the order of its files."""
    order = np.random.default_rng([seed, reading.epoch, 1 + reading.number]).permutation(len(examples))
    for i in range(reading.skip, sum(f.num_examples for f in reading.files) // batch_size):
        chosen = [examples[k] for k in order[i * batch_size : (i + 1) * batch_size]]
        if chosen:  # regions that cannot be rendered leave the last batches of a window short
            yield chosen


def batches(
    files: Sequence[File], read: Reader, *, batch_size: int, window: int, seed: int, start: int = 0
) -> Iterator[tuple[int, list[Example]]]:
    """Endless (epoch, examples) from batch number `start` on. Raises ValueError where an epoch fills no batch."""
    for reading in readings(files, batch_size=batch_size, window=window, seed=seed, start=start):
        examples = [e for f in reading.files for e in read(f)]
        for chosen in dealt(reading, examples, batch_size, seed):
            yield reading.epoch, chosen
