"""The two halves of the caption job as Ray Data actors: one image row in, one image row out, nothing raised.

    shard row -> ExtractRegions (CPU: pixels to model input) -> DescribeRegions (GPU: captions) -> part row

Between them a row carries its model input in `views` (ray_jobs.views) and the regions' faults in `faults`.

Invariants:
- the only place where a row's exception is caught is `_guarded`; it becomes the row's status, reason and detail;
- exception texts of other people's code may hold header values: only their type is recorded;
- want of memory halves a batch before it fails a row; an engine that broke takes its process with it, and Ray starts
  another: what is left of it would fail every row to come;
- an engine that must stop, its endpoint down for long, stops the run before a row fails for it.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import threading
import traceback
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pyarrow as pa

from meddam_core.captioner import Captioner, PreparedRegion, RegionPreparer, ViewRules, failed_caption
from meddam_core.engines.base import EngineStopped
from meddam_core.records import (
    CaptionedImage,
    Image,
    Reason,
    Region,
    RegionCaption,
    RowError,
    Status,
    arrow_schema,
    from_row,
    to_row,
)
from ray_jobs.monitor import RunStopped, Stage
from ray_jobs.views import VIEWS_TYPE, Views, pack, unpack

logger = logging.getLogger(__name__)

PIXEL_COLUMNS = ("image", "preview", "frames")
_FAULT = pa.struct([("reason", pa.string()), ("detail", pa.string())])
_KILLED = RowError(Reason.KILLED_PROCESS, "describing this image ended the process twice")


def prepared_schema() -> pa.Schema:
    """The row between the two actors: the image without its pixels, with what the engine needs."""
    schema = pa.schema([f for f in arrow_schema(Image) if f.name not in PIXEL_COLUMNS])
    for name, kind in (
        ("views", VIEWS_TYPE), ("faults", pa.list_(_FAULT)), ("fault", _FAULT),
    ):  # fmt: skip
        schema = schema.append(pa.field(name, kind))
    return schema


class _Ledger:
    """Tells the monitor what is being worked on, so that a row that kills its process is found."""

    def __init__(self, monitor: Any, stage: Stage) -> None:
        self._monitor = monitor
        self._stage = stage
        self._calls = threading.Condition()
        self._num_running = 0

    def work(self, rows: list[Any], images: list[int], do: Callable[[list[Any]], list[Any]],
             give_up: Callable[[Any], Any]) -> list[Any]:  # fmt: skip
        """`do(rows)`; after repeated deaths one row at a time, and `give_up(row)` for those that die alone."""
        import ray

        orders = ray.get(self._monitor.begin.remote(self._stage, images))
        if not orders.one_by_one and not orders.quarantined:
            with self._running(alone=False):
                done = do(rows)
        else:
            with self._running(alone=True):  # so that a death is this row's and no other call's
                done = [self._alone(row, image, do, give_up) for row, image in zip(rows, images, strict=True)]
        self._monitor.end.remote(self._stage, images)
        return done

    def _alone(self, row: Any, image: int, do: Callable[[list[Any]], list[Any]], give_up: Callable[[Any], Any]) -> Any:
        import ray

        if ray.get(self._monitor.begin.remote(self._stage, [image], alone=True)).quarantined:
            return give_up(row)
        (done,) = do([row])
        ray.get(self._monitor.end.remote(self._stage, [image]))
        return done

    @contextmanager
    def _running(self, alone: bool) -> Iterator[None]:
        """Calls run together; one that works row by row runs with no other."""
        with self._calls:
            self._calls.wait_for(lambda: self._num_running == 0 if alone else self._num_running >= 0)
            self._num_running = -1 if alone else self._num_running + 1
        try:
            yield
        finally:
            with self._calls:
                self._num_running = 0 if alone else self._num_running - 1
                self._calls.notify_all()


class ExtractRegions:
    """Rows of a shard to model input, on a CPU."""

    def __init__(self, rules: ViewRules, monitor: Any) -> None:
        import cv2

        cv2.setNumThreads(1)  # one actor a core; the library's own threads would fight over it
        self._preparer = RegionPreparer(rules)
        self._ledger = _Ledger(monitor, "extract")

    def __call__(self, batch: pa.Table) -> pa.Table:
        rows = batch.to_pylist()
        done = self._ledger.work(
            rows, [r["image_id"] for r in rows], lambda some: [self._extract(r) for r in some], _killed
        )
        views = pack([row.pop("views") for row in done])
        schema = prepared_schema()
        table = pa.Table.from_pylist(done, schema=schema.remove(schema.get_field_index("views")))
        return table.append_column("views", views).select(schema.names)

    def _extract(self, row: dict[str, Any]) -> dict[str, Any]:
        prepared, error = _guarded(lambda: self._preparer.prepare(from_row(Image, row)), "preparing the image")
        if error is not None:
            return _prepared_row(row, fault=error)
        assert prepared is not None
        regions = [to_row(p.region) for p in prepared]  # the image's own, or what its recipe's detector found
        return _prepared_row(
            row | {"regions": regions}, views=[p.views_N8SS for p in prepared], faults=[p.error for p in prepared]
        )


def _killed(row: dict[str, Any]) -> dict[str, Any]:
    return _prepared_row(row, fault=RowError(Reason.KILLED_PROCESS, "preparing this image ended the process twice"))


def _prepared_row(
    row: dict[str, Any], views: Sequence[Views | None] = (), faults: Sequence[RowError | None] = (),
    fault: RowError | None = None,
) -> dict[str, Any]:  # fmt: skip
    kept = {k: v for k, v in row.items() if k not in PIXEL_COLUMNS}
    return {**kept, "views": list(views), "faults": [_fault(f) for f in faults], "fault": _fault(fault)}


def _fault(error: RowError | None) -> dict[str, str] | None:
    return None if error is None else {"reason": error.reason.value, "detail": error.detail}


def _error(fault: dict[str, str] | None) -> RowError | None:
    return None if fault is None else RowError(Reason(fault["reason"]), fault["detail"])


class DescribeRegions:
    """Model input to captions, with the weights: one actor a GPU (or share of the CPUs), two calls in flight each.

    Args:
        make_captioner: builds the Captioner in the actor's process.
        side: S of the model input.
        monitor: the run's monitor actor.
        attempt, model: written into every row.
    """

    def __init__(
        self, make_captioner: Callable[[], Captioner], side: int, monitor: Any, attempt: int, model: str
    ) -> None:
        self._captioner = make_captioner()
        self._side = side
        self._monitor = monitor
        self._ledger = _Ledger(monitor, "describe")
        self._facts = {"attempt": attempt, "model": model}
        self._name = uuid.uuid4().hex
        self._report(first=True)

    def __call__(self, batch: pa.Table) -> pa.Table:
        rows = batch.drop_columns(["views"]).to_pylist()
        for number, row in enumerate(rows):
            row["views"] = batch["views"].slice(number, 1)  # unpacked where they are described: in halves, if need be
        done = self._ledger.work(rows, [r["image_id"] for r in rows], self._describe, self._given_up)
        stop = self._report(done)
        if stop is not None:
            raise RunStopped(stop)
        return pa.Table.from_pylist([to_row(r) for r in done], schema=arrow_schema(CaptionedImage))

    def _describe(self, rows: list[dict[str, Any]]) -> list[CaptionedImage]:
        captions, error = _guarded(lambda: self._captions(rows), "describing the regions")
        if error is not None and isinstance(self._captioner.loop.failure, EngineStopped):
            raise RunStopped(self._stop(str(self._captioner.loop.failure)))
        if error is not None and self._captioner.loop.failure is not None:
            logger.error("the engine broke; this process ends, so that another one does its rows")
            os._exit(1)
        if error is not None and error.reason is Reason.OUT_OF_MEMORY and len(rows) > 1:
            middle = len(rows) // 2
            return self._describe(rows[:middle]) + self._describe(rows[middle:])
        if error is not None:
            return [self._given_up(row, error) for row in rows]
        return [self._row(row, own) for row, own in zip(rows, captions, strict=True)]

    def _captions(self, rows: list[dict[str, Any]]) -> list[list[RegionCaption]]:
        regions = [_prepared(row, self._side) for row in rows]
        found = iter(self._captioner.describe([r for some in regions for r in some]))
        return [[c for _ in some for c in next(found)] for some in regions]

    def _given_up(self, row: dict[str, Any], error: RowError = _KILLED) -> CaptionedImage:
        return self._row(row, [c for r in row["regions"] for c in self._failed(from_row(Region, r), error)])

    def _failed(self, region: Region, error: RowError) -> list[RegionCaption]:
        captioner = self._captioner
        return [failed_caption(region, p.id, s, error) for p in captioner.prompts for s in range(captioner.num_samples)]

    def _row(self, row: dict[str, Any], captions: list[RegionCaption]) -> CaptionedImage:
        fault = _error(row["fault"])
        if fault is None and not captions:
            status, reason, detail = (
                Status.SKIPPED,
                Reason.NO_REGIONS,
                "the row holds no region and its recipe no detector",
            )
        elif fault is None and any(c.status is not Status.FAILED for c in captions):
            truncated = any(c.status is Status.TRUNCATED for c in captions)
            status, reason, detail = (Status.TRUNCATED if truncated else Status.OK), None, None
        else:
            first = fault or RowError(Reason(captions[0].reason or Reason.INTERNAL_ERROR), captions[0].detail or "")
            status, reason, detail = Status.FAILED, first.reason, first.detail
        engine = self._captioner.loop.engine
        names = {f.name for f in dataclasses.fields(CaptionedImage)}
        kept = {k: v for k, v in row.items() if k in names and k != "regions"}
        return from_row(
            CaptionedImage,
            kept | {
                "regions": row["regions"], "captions": [to_row(c) for c in captions], "status": status.value,
                "reason": reason, "detail": detail, "engine": engine.name, "kernels": engine.kernels, **self._facts,
            },
        )  # fmt: skip

    def _stop(self, why: str) -> str:
        import ray

        stop: str = ray.get(self._monitor.stop.remote(why))
        return stop

    def _report(self, done: Sequence[CaptionedImage] = (), first: bool = False) -> str | None:
        import ray

        captions = [c for row in done for c in row.captions]
        reasons = Counter(c.reason for c in captions if c.reason)
        reasons.update(row.reason for row in done if row.reason and not row.captions)
        stop: str | None = ray.get(
            self._monitor.report.remote(
                self._name, num_images=len(done), num_failed=sum(r.status is Status.FAILED for r in done),
                num_skipped=sum(r.status is Status.SKIPPED for r in done),
                num_regions=sum(len(r.regions) for r in done), num_tokens=sum(c.num_tokens for c in captions),
                by_reason=dict(reasons), busy_s=self._captioner.loop.busy_s, first=first,
            )
        )  # fmt: skip
        return stop


def _prepared(row: dict[str, Any], side: int) -> list[PreparedRegion]:
    regions = [from_row(Region, r) for r in row["regions"]]
    fault = _error(row["fault"])
    if fault is not None:
        return [PreparedRegion(region=r, views_N8SS=None, error=fault) for r in regions]
    (views,) = unpack(row["views"], side)
    return [
        PreparedRegion(region=r, views_N8SS=v, error=_error(f))
        for r, v, f in zip(regions, views, row["faults"], strict=True)
    ]


def _guarded(work: Callable[[], Any], doing: str) -> tuple[Any, RowError | None]:
    """The one boundary where a row's exception becomes its status."""
    try:
        return work(), None
    except RowError as error:
        return None, error
    except Exception as error:  # noqa: BLE001 - see the docstring
        if type(error).__name__ == "EngineDied":  # the device is lost: leave, so that Ray starts another and retries
            os._exit(1)
        frames = "".join(traceback.format_tb(error.__traceback__))
        logger.error("%s while %s\n%s", type(error).__name__, doing, frames)
        reason = Reason.OUT_OF_MEMORY if isinstance(error, MemoryError) else Reason.INTERNAL_ERROR
        return None, RowError(reason, f"{type(error).__name__} while {doing}; its place is in the worker's log")
