"""Pictures that were decoded a moment ago, for who asks about region after region of the same one.

    kept = KeptPictures(max_bytes=256_000_000)
    decoded = kept.get(owner, data, frame, decode)

A client gets back what it sent itself: by its own name and by a digest of all bytes. Pictures are forgotten when others
need the room and after FORGET_S; they are in memory only, and nowhere told of.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from meddam_core.imaging.decoded import Decoded

FORGET_S = 600.0
_Key = tuple[str, bytes, int | None]


@dataclass(slots=True)
class _Entry:
    decoded: Decoded
    num_bytes: int
    at_s: float


class KeptPictures:
    """A bounded memory of decoded pictures. Threads may share it.

    Args:
        max_bytes: of pixels; 0 keeps nothing, and takes no digests.
        now_s: a clock.
    """

    def __init__(self, max_bytes: int, now_s: Callable[[], float] = time.monotonic) -> None:
        self._max_bytes = max_bytes
        self._now_s = now_s
        self._lock = threading.Lock()
        self._entries: OrderedDict[_Key, _Entry] = OrderedDict()
        self._num_bytes = 0

    @property
    def num_bytes(self) -> int:
        """Bytes of the pixels that are kept."""
        return self._num_bytes

    def get(self, owner: str, data: bytes, frame: int | None, decode: Callable[[], Decoded]) -> Decoded:
        """The picture of `data` as `decode` gives it, whose errors are raised and not kept. Nobody may write to it."""
        if not self._max_bytes:
            return decode()
        key = (owner, hashlib.blake2b(data, digest_size=32).digest(), frame)
        with self._lock:
            if (entry := self._entries.get(key)) is not None:
                entry.at_s = self._now_s()
                self._entries.move_to_end(key)
                return entry.decoded
        decoded = decode()
        arrays = [decoded.stored, decoded.alpha_HW, *decoded.context]
        num_bytes = sum(a.nbytes for a in arrays if a is not None)
        with self._lock:
            if num_bytes <= self._max_bytes and key not in self._entries:
                self._entries[key] = _Entry(decoded, num_bytes, self._now_s())
                self._num_bytes += num_bytes
                while self._num_bytes > self._max_bytes:
                    self._drop_oldest()
        return decoded

    def forget_old(self) -> None:
        """Drops what nobody asked for in FORGET_S. Called now and then."""
        with self._lock:
            while self._entries and next(iter(self._entries.values())).at_s < self._now_s() - FORGET_S:
                self._drop_oldest()

    def _drop_oldest(self) -> None:
        _, entry = self._entries.popitem(last=False)
        self._num_bytes -= entry.num_bytes
