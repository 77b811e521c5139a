"""What is kept of pictures: one's own, within the room there is, for a while."""

from __future__ import annotations

import numpy as np
import pytest

from meddam_core.imaging.decoded import Decoded
from meddam_core.records import Reason, RowError
from ray_jobs.serve.keeping import FORGET_S, KeptPictures


class Decoder:
    """Counts what is decoded: pictures of 100 bytes."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self) -> Decoded:
        self.times += 1
        return Decoded(stored=np.zeros((10, 10), np.uint8))


def test_the_same_picture_of_the_same_client_is_decoded_once() -> None:
    kept, decode = KeptPictures(1000), Decoder()
    first = kept.get("ward", b"a", None, decode)
    assert kept.get("ward", b"a", None, decode) is first
    assert decode.times == 1
    for owner, data, frame in (("other", b"a", None), ("ward", b"b", None), ("ward", b"a", 1)):
        assert kept.get(owner, data, frame, decode) is not first
    assert decode.times == 4 and kept.num_bytes == 400


def test_the_room_is_bounded_and_what_was_asked_for_last_stays() -> None:
    kept, decode = KeptPictures(300), Decoder()
    for data in (b"a", b"b", b"c", b"a", b"d"):  # d takes the place of b
        kept.get("", data, None, decode)
    assert decode.times == 4 and kept.num_bytes == 300
    kept.get("", b"a", None, decode)
    assert decode.times == 4
    kept.get("", b"b", None, decode)
    assert decode.times == 5
    none, small = KeptPictures(0), KeptPictures(99)
    for too_small in (none, small):
        assert too_small.get("", b"a", None, decode) is not too_small.get("", b"a", None, decode)
        assert too_small.num_bytes == 0


def test_it_is_forgotten_after_a_while() -> None:
    now = [0.0]
    kept, decode = KeptPictures(1000, lambda: now[0]), Decoder()
    kept.get("", b"a", None, decode)
    now[0] = FORGET_S / 2
    kept.get("", b"b", None, decode)
    now[0] = FORGET_S + 1
    kept.forget_old()
    assert kept.num_bytes == 100
    kept.get("", b"b", None, decode)
    assert decode.times == 2


def test_what_cannot_be_decoded_is_not_kept() -> None:
    kept = KeptPictures(1000)

    def broken() -> Decoded:
        raise RowError(Reason.CORRUPT, "the file is empty")

    for _ in range(2):
        with pytest.raises(RowError):
            kept.get("", b"", None, broken)
    assert kept.num_bytes == 0
