"""WebDataset tars: for each caption KEY.png, KEY.txt and KEY.json (box, mask, labels, licence)."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path

from meddam_core.curation.exporters.item import Card, Item, facts
from meddam_core.curation.exporters.llava import write_card

CAPTIONS_PER_TAR = 1000


def write_webdataset(items: Iterable[Item], out: Path, card: Card) -> int:
    """One sample a caption. Returns their number."""
    out.mkdir(parents=True, exist_ok=True)
    num, tar = 0, None
    for item in items:
        picture = item.png() if item.picture_HWC is not None else None
        for caption in item.captions:
            if num % CAPTIONS_PER_TAR == 0:
                if tar is not None:
                    tar.close()
                tar = tarfile.open(out / f"captions-{num // CAPTIONS_PER_TAR:06d}.tar", "w")  # noqa: SIM115
            assert tar is not None
            key = f"{num:09d}"
            if picture is not None:
                _add(tar, f"{key}.png", picture)
            _add(tar, f"{key}.txt", (caption.text or "").encode())
            _add(tar, f"{key}.json", json.dumps(facts(caption)).encode())
            num += 1
    if tar is not None:
        tar.close()
    write_card(out, card, num)
    return num


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    tar.addfile(entry, io.BytesIO(data))
