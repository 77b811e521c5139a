"""Pictures from https URLs, only where the configuration names their hosts.

An allow-listed host is trusted to be what it is; nothing else is reached: no redirects, no port but 443 or the one that
is listed ("images.lab:8443"), no credentials, no proxies from the environment. A certificate authority of one's own is
named in SSL_CERT_FILE.
"""

from __future__ import annotations

import urllib.error
import urllib.request
from collections.abc import Sequence
from email.message import Message
from typing import IO
from urllib.parse import urlsplit

from ray_jobs.serve.errors import ApiError

TIMEOUT_S = 10.0


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Message, newurl: str
    ) -> None:
        return None


def fetch(url: str, hosts: Sequence[str], max_bytes: int) -> bytes:
    """The content of an https URL on one of `hosts`. Raises ApiError for any other, and for whatever goes wrong."""
    parts = urlsplit(url)
    try:
        port = parts.port
    except ValueError:
        port = -1
    host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
    place = host if port in (None, 443) else f"{host}:{port}"
    if parts.scheme != "https" or place not in hosts or parts.username or parts.password:
        raise ApiError(400, "pictures are not fetched from this URL", code="url_not_allowed", param="image_url")
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirect)
    try:
        with opener.open(url, timeout=TIMEOUT_S) as answer:
            content: bytes = answer.read(max_bytes + 1)
    except (urllib.error.URLError, OSError, ValueError):
        raise ApiError(400, "the picture could not be fetched", code="url_failed", param="image_url") from None
    if len(content) > max_bytes:
        raise ApiError(413, "the picture is too large", code="too_large", param="image_url")
    return content
