"""Splits that leak nothing: one patient, one split; where the patient is unknown, near-duplicates stay together.

    shares = parse_shares("train=0.8,test=0.2")
    groups = group_items(features)                       # union of equal patients and of pictures that look the same
    split = deal(groups, features, shares, seed=0)       # a split for each item

Look-alikes are found by difference hashes (dHash): the signs of differences between neighbours of a thumbnail, 64 of
8 x 8 to find candidates and 256 of 16 x 16 to confirm them. Re-encoding, scaling and changes of brightness leave nearly
all of them as they are; films of two patients differ in far more. A picture whose patient is known is compared with
those whose patient is not, never with another known patient's.

Invariants:
- items of one patient, of one study, or of one look are of one split, whatever the shares and the seed;
- the same items give the same splits, in whatever order they come;
- memory holds 56 bytes an item; time grows with the number of look-alike candidates, not with all pairs.

Arrays: N items; hashes are uint64, the long one as four of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

MAX_SHORT, MAX_LONG = 4, 16
"""Bits of 64 and of 256 in which look-alikes may differ."""
_BANDS = MAX_SHORT + 1
"""Two hashes that differ in at most MAX_SHORT bits are equal in one of this many bands."""
_FLAT = 0.02
"""Neighbours that differ by less than this share of the picture's range count as equal: noise must not decide."""
_PAIRS_AT_ONCE = 1 << 20

Hashes = NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class Features:
    """What splits are decided by: five numbers an item."""

    names: Hashes
    """(N,): stands for the item's key, the same in every ingest."""
    patients: Hashes
    """(N,): stands for the patient; 0 where unknown."""
    studies: Hashes
    """(N,): stands for the study; 0 where unknown."""
    short: Hashes
    """(N,): the 64-bit dHash."""
    long: Hashes
    """(N, 4): the 256-bit dHash; all 0 in both where there is no picture, which looks like no other."""

    @staticmethod
    def joined(parts: list[Features]) -> Features:
        """All items of several parts."""
        return Features(*(np.concatenate([getattr(p, n) for p in parts]) for n in Features.__slots__))


def parse_shares(text: str) -> dict[str, float]:
    """{"train": 0.8, "test": 0.2} of "train=0.8,test=0.2". Raises ValueError unless they are names and sum to 1."""
    shares: dict[str, float] = {}
    for part in text.split(","):
        name, _, share = part.partition("=")
        try:
            shares[name.strip()] = float(share)
        except ValueError:
            raise ValueError(f"splits are written train=0.8,test=0.2, not {text!r}") from None
    if len(shares) != text.count(",") + 1 or not all(shares) or min(shares.values()) <= 0:
        raise ValueError(f"every split needs a name of its own and a share above 0: {text!r}")
    if abs(sum(shares.values()) - 1) > 1e-6:
        raise ValueError(f"the shares of {text!r} sum to {sum(shares.values()):g}; they must sum to 1")
    return shares


def number_of(text: str) -> int:
    """64 bits that stand for a text; never 0."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") or 1


def look_of(stored: NDArray[Any], inverted: bool = False) -> tuple[int, tuple[int, int, int, int]]:
    """(64-bit, 256-bit) dHash of a picture's stored values, (H, W) or (H, W, 3).

    inverted: of a MONOCHROME1 film, whose hash is that of its MONOCHROME2 twin.
    """
    grey = stored.astype(np.float32) if stored.ndim == 2 else stored[..., :3].astype(np.float32).mean(axis=-1)
    short = _signs(grey, 8, inverted)
    long = _signs(grey, 16, inverted).reshape(4, 64)
    return _packed(short), (_packed(long[0]), _packed(long[1]), _packed(long[2]), _packed(long[3]))


def _signs(grey_HW: NDArray[np.float32], side: int, inverted: bool) -> NDArray[np.bool_]:
    small = cv2.resize(grey_HW, (side + 1, side), interpolation=cv2.INTER_AREA)
    low, high = np.percentile(small, (2, 98))
    step = np.diff(np.asarray(np.clip(small, low, high), np.float32), axis=1) * (-1 if inverted else 1)
    return np.asarray(step > _FLAT * max(float(high - low), 1e-6)).ravel()


def _packed(bits_64: NDArray[np.bool_]) -> int:
    return int.from_bytes(np.packbits(bits_64).tobytes(), "little")


def group_items(features: Features) -> NDArray[np.int64]:
    """(N,): for each item the number of its group, which is that of its first item."""
    parents = np.arange(len(features.names), dtype=np.int64)
    for keys in (features.patients, features.studies):
        known = np.flatnonzero(keys)
        order = known[np.argsort(keys[known], kind="stable")]
        same = keys[order[1:]] == keys[order[:-1]]
        _unite(parents, order[1:][same], order[:-1][same])
    for left, right in _look_alikes(features):
        _unite(parents, left, right)
    return np.array([_root(parents, i) for i in range(len(parents))], np.int64)


def _look_alikes(features: Features) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Pairs of items that look the same, at least one of unknown patient."""
    seen = np.flatnonzero(features.long.any(axis=1) | (features.short != 0))
    if not len(seen):
        return
    width = -(-64 // _BANDS)
    for band in range(_BANDS):
        bits = features.short[seen] >> np.uint64(band * width) & np.uint64((1 << width) - 1)
        order = np.lexsort((features.short[seen], bits))
        starts = np.flatnonzero(np.r_[True, bits[order][1:] != bits[order][:-1]])
        for bucket in np.split(seen[order], starts[1:]):
            yield from _within(features, bucket)


def _within(features: Features, bucket: NDArray[np.int64]) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """The look-alikes among the items of one bucket, compared in blocks."""
    rows = max(1, _PAIRS_AT_ONCE // max(len(bucket), 1))
    for start in range(0, len(bucket) - 1, rows):
        block = bucket[start : start + rows]
        apart = np.bitwise_count(features.short[block][:, None] ^ features.short[bucket][None, start:])
        i, j = np.nonzero(apart <= MAX_SHORT)
        i, j = i[j > i], j[j > i]
        left, right = block[i], bucket[start + j]
        unknown = (features.patients[left] == 0) | (features.patients[right] == 0)
        left, right = left[unknown], right[unknown]
        far = np.bitwise_count(features.long[left] ^ features.long[right]).sum(axis=1) > MAX_LONG
        yield left[~far], right[~far]


def _unite(parents: NDArray[np.int64], left: NDArray[np.int64], right: NDArray[np.int64]) -> None:
    for a, b in zip(left.tolist(), right.tolist(), strict=True):
        a, b = _root(parents, a), _root(parents, b)
        parents[max(a, b)] = min(a, b)


def _root(parents: NDArray[np.int64], i: int) -> int:
    while parents[i] != i:
        parents[i] = parents[parents[i]]
        i = int(parents[i])
    return i


def deal(groups: NDArray[np.int64], features: Features, shares: dict[str, float], seed: int) -> NDArray[np.uint8]:
    """(N,): for each item the index of its split in `shares`.

    Groups are dealt in an order drawn by the seed, each to the split that lacks most of its share: the counts come as
    near to the shares as the groups' sizes allow.
    """
    roots, members, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    names = np.full(len(roots), np.iinfo(np.uint64).max, np.uint64)
    np.minimum.at(names, members, features.names)  # a group is known by its first name: positions don't matter
    lots = [hashlib.sha256(f"{seed}/{name}".encode()).digest() for name in names.tolist()]
    left = np.array(list(shares.values())) * len(groups)
    split = np.zeros(len(roots), np.uint8)
    for group in sorted(range(len(roots)), key=lambda g: (-int(sizes[g] > 0.01 * len(groups)), lots[g])):
        split[group] = int(np.argmax(left / np.array(list(shares.values()))))
        left[split[group]] -= sizes[group]
    return np.asarray(split[members], np.uint8)
