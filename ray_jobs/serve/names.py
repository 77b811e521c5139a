"""Fresh ids and times of answers."""

from __future__ import annotations

import time
import uuid


def request_name() -> str:
    """A fresh id for an answer."""
    return f"chatcmpl-{uuid.uuid4().hex}"


def now_s() -> int:
    """Seconds since 1970."""
    return int(time.time())
