"""One driver at a time on a run directory.

Two drivers on one run wrote 1,580 rows for 1,000 and both reported success, so a driver takes the lease first.

- On S3: an object put with `If-None-Match: *`, renewed every few seconds with `If-Match: <etag>`. A lease whose etag
  did not change for a whole `ttl_s`, by this machine's monotonic clock, belongs to a dead driver and is taken over.
  No machine's wall clock is compared with another's.
- On disk: an exclusive `flock`, which the kernel releases when its holder dies.

A driver whose lease was taken (it was cut off for longer than `ttl_s`) is told through `on_lost`.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from meddam_core import storage
from ray_jobs.summary import EXIT_HELD

logger = logging.getLogger(__name__)

TTL_S = 20.0
"""A driver that has not renewed for this long is taken for dead: a slow bucket takes some of it, a person waits it."""
RENEWAL_ATTEMPTS = 2
"""Of one renewal's request; each may take a quarter of the ttl. A further renewal is due by then."""


class LeaseHeld(RuntimeError):
    """Another driver works on this run directory."""


class Lease:
    """Held from `with` to its end.

    Args:
        uri: the run directory.
        ttl_s: seconds after which a holder that does not renew is taken for dead (S3 only).
        on_lost: called from a daemon thread when another driver took the lease over.

    Raises LeaseHeld on entering when another driver is alive.
    """

    def __init__(self, uri: str, *, ttl_s: float = TTL_S, on_lost: Callable[[], None] | None = None) -> None:
        self.uri = storage.join(uri, "lease")
        self.ttl_s = ttl_s
        self.holder = f"process {os.getpid()} on {socket.gethostname()}"
        self._token = uuid.uuid4().hex
        self._on_lost = on_lost
        self._backend: _FileLease | _S3Lease = _S3Lease(self) if storage.is_s3(uri) else _FileLease(self)

    def __enter__(self) -> Lease:
        self._backend.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._backend.release()

    def body(self, beat: int) -> bytes:
        """What the lease file says; `beat` makes each renewal a new object."""
        return json.dumps({"holder": self.holder, "token": self._token, "beat": beat}).encode()

    def owns(self, body: bytes) -> bool:
        """Whether a lease file's text is this lease's own."""
        return self._token.encode() in body

    def lost(self) -> None:
        """Tells the driver that another one took over."""
        if self._on_lost is not None:
            self._on_lost()


class _FileLease:
    def __init__(self, lease: Lease) -> None:
        self._lease = lease
        self._file: IO[bytes] | None = None

    def acquire(self) -> None:
        path = Path(storage.open_uri(self._lease.uri)[1])
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+b")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise LeaseHeld(_held_message(self._lease.uri, file.read())) from None
        file.truncate(0)
        file.write(self._lease.body(0))
        file.flush()
        self._file = file

    def release(self) -> None:
        if self._file is not None:
            self._file.close()


class _S3Lease:
    def __init__(self, lease: Lease) -> None:
        self._lease = lease
        self._bucket, _, self._key = lease.uri.removeprefix("s3://").partition("/")
        self._client: Any = None
        self._brief_s = max(1.0, lease.ttl_s / 4)
        self._etag = ""
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)

    def acquire(self) -> None:
        self._client = storage.s3_client()
        etag = self._put(IfNoneMatch="*")
        if etag is None:
            etag = self._take_over()
        self._etag = etag
        self._client = storage.s3_client(RENEWAL_ATTEMPTS, self._brief_s)
        self._thread.start()

    def release(self) -> None:
        """A bucket that answers badly now does not undo the run's success: the next driver waits the ttl."""
        from botocore.exceptions import BotoCoreError, ClientError

        self._stopped.set()
        self._thread.join(timeout=self._lease.ttl_s)
        try:
            if self._current()[0] == self._etag:
                self._client.delete_object(Bucket=self._bucket, Key=self._key)
        except (BotoCoreError, ClientError) as error:
            logger.warning(
                "%s could not be given back (%s); the next driver waits %g s for it",
                self._lease.uri, error, self._lease.ttl_s,
            )  # fmt: skip

    def _take_over(self) -> str:
        """Waits a whole ttl; a lease that changes meanwhile has a living holder."""
        etag, body = self._current()
        deadline = time.monotonic() + self._lease.ttl_s
        while etag and time.monotonic() < deadline:
            time.sleep(min(1.0, self._lease.ttl_s / 10))
            now, body = self._current()
            if now and now != etag:
                raise LeaseHeld(_held_message(self._lease.uri, body))
            etag = now
        taken = self._put(IfMatch=etag) if etag else self._put(IfNoneMatch="*")
        if taken is None:  # of two that waited, the other was first
            raise LeaseHeld(_held_message(self._lease.uri, self._current()[1]))
        return taken

    def _renew(self) -> None:
        beat, last = 0, time.monotonic()
        while not self._stopped.wait(self._lease.ttl_s / 4):
            beat += 1
            try:
                etag = self._put(IfMatch=self._etag, beat=beat)
            except Exception:  # noqa: BLE001 - a bucket may answer badly for a while; the ttl decides
                if time.monotonic() - last > self._lease.ttl_s:
                    return self._lease.lost()
                continue
            if etag is None:
                return self._lease.lost()
            self._etag, last = etag, time.monotonic()

    def _put(self, *, beat: int = 0, **condition: str) -> str | None:
        """The etag of this driver's lease, or None when the lease is another's.

        A put whose answer got lost went through all the same; boto3 sends it again, and its condition no longer holds.
        So a refusal counts only where the object is not this driver's own.
        """
        from botocore.exceptions import ClientError

        try:
            answer = self._client.put_object(
                Bucket=self._bucket, Key=self._key, Body=self._lease.body(beat), **condition
            )
        except ClientError as error:
            if error.response["Error"]["Code"] not in ("PreconditionFailed", "ConditionalRequestConflict", "NoSuchKey"):
                raise
            etag, body = self._current()
            return etag if self._lease.owns(body) else None
        return str(answer["ETag"])

    def _current(self) -> tuple[str, bytes]:
        """(etag, body) of the lease object; ("", b"") where there is none.

        boto3 repeats requests, but not the reading of a body that breaks off: that is repeated here, for a while that
        leaves a renewal time to be told of its loss.
        """
        from botocore.exceptions import HTTPClientError, IncompleteReadError

        until = time.monotonic() + 2 * self._brief_s
        for attempt in range(1, storage.S3_ATTEMPTS):
            try:
                return self._read()
            except (HTTPClientError, IncompleteReadError):
                if time.monotonic() > until:
                    raise
                time.sleep(0.1 * attempt)
        return self._read()

    def _read(self) -> tuple[str, bytes]:
        from botocore.exceptions import ClientError

        try:
            answer = self._client.get_object(Bucket=self._bucket, Key=self._key)
        except ClientError as error:
            if error.response["Error"]["Code"] in ("NoSuchKey", "404"):
                return "", b""
            raise
        return str(answer["ETag"]), bytes(answer["Body"].read())


def give_way() -> None:
    """For `on_lost`: ends the process at once, before two of them write or pay for the same. It can be run again."""
    sys.stderr.write("meddam: lost the lease of the place it works at to another job; stopping\n")
    sys.stderr.flush()
    os._exit(EXIT_HELD)


def _held_message(uri: str, body: bytes) -> str:
    try:
        holder = json.loads(body)["holder"]
    except (ValueError, KeyError):
        holder = "another driver"
    return (
        f"{uri} is held by {holder}, which is still at work. Wait for it or stop it, or caption into another directory."
    )
