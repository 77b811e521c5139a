"""Keeps the warnings and log lines of decoding libraries to themselves: they quote header values.

pydicom warns with the offending value ("Invalid value for VR UI: ..."), Pillow logs TIFF tags at debug level. While a
thread is inside `quiet()`, those lines go nowhere; what is wrong with a file is said by our own RowError.

The warnings module has one process-wide filter list, so entering and leaving are counted under a lock: several threads
may decode at once.
"""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_LOGGERS = (
    "pydicom",
    "pylibjpeg",
    "openjpeg.utils",
    "libjpeg",
    "nibabel",
    "nibabel.global",
    "PIL.Image",
    "PIL.JpegImagePlugin",
    "PIL.PngImagePlugin",
    "PIL.TiffImagePlugin",
)


class _Here(threading.local):
    depth = 0


_here = _Here()
_lock = threading.Lock()
_inside = 0
_saved: warnings.catch_warnings[None] | None = None


def _outside(_record: logging.LogRecord) -> bool:
    return _here.depth == 0


for _name in _LOGGERS:
    logging.getLogger(_name).addFilter(_outside)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence decoding libraries in this thread for the length of the block."""
    global _inside, _saved
    with _lock:
        if _inside == 0:
            _saved = warnings.catch_warnings()
            _saved.__enter__()
            warnings.simplefilter("ignore")
        _inside += 1
    _here.depth += 1
    try:
        yield
    finally:
        _here.depth -= 1
        with _lock:
            _inside -= 1
            if _inside == 0 and _saved is not None:
                _saved.__exit__(None, None, None)
                _saved = None
