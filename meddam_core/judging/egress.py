"""Whether a dataset's captions may go to an endpoint. Captions are derived from patients' pictures.

| policy of the dataset | endpoints that may see its captions              |
|-----------------------|--------------------------------------------------|
| deny (default)        | those inside the cluster                         |
| zero-retention        | those, and ones that keep nothing of what they see |
| open                  | any                                              |

An endpoint is what the user declares it to be, and what retains unless declared otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit

from meddam_core.records import Egress

Retention = Literal["inside", "zero-retention", "retains"]
"""inside: runs in the cluster, nothing leaves it. zero-retention: keeps nothing, by contract. retains: all others."""

_ALLOWED: dict[Egress, frozenset[Retention]] = {
    "deny": frozenset({"inside"}),
    "zero-retention": frozenset({"inside", "zero-retention"}),
    "open": frozenset({"inside", "zero-retention", "retains"}),
}


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where text is sent, and what the user declares about it. Raises ValueError for a URL that is none."""

    base_url: str
    retention: Retention = "retains"

    def __post_init__(self) -> None:
        parts = urlsplit(self.base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("the judge's base_url must begin with http:// or https:// and name a host")
        if parts.username or parts.password:
            raise ValueError("the judge's base_url holds credentials; give the key through the environment instead")
        if parts.scheme == "http" and self.retention != "inside":
            raise ValueError("a judge outside the cluster needs https://; declare retention=inside if it is inside")

    def may_see(self, policy: Egress) -> bool:
        """Whether captions under this policy may be sent here."""
        return self.retention in _ALLOWED[policy]

    @property
    def host(self) -> str:
        """For messages: without path and query."""
        return urlsplit(self.base_url).hostname or ""
