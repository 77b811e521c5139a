"""Ablations of what a model sees, by what is put into its views: the network and its cost stay the same.

| view    | full view              | focal crop             |
|---------|------------------------|------------------------|
| both    | as it is               | as it is               |
| focal   | the focal crop, too    | as it is               |
| full    | as it is               | the full view, too     |
| no-mask | as it is, all of it marked | as it is, all of it marked |

With equal views a DAM takes its un-flagged route: no adapter runs (facts of the reference).
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

Look = Literal["both", "focal", "full", "no-mask"]


def seen(views_8SS: NDArray[np.uint8], look: Look) -> NDArray[np.uint8]:
    """(8, S, S) uint8 as an ablated model sees it. Raises ValueError for an unknown look."""
    if look == "both":
        return views_8SS
    if look == "focal":
        return np.concatenate([views_8SS[4:], views_8SS[4:]])
    if look == "full":
        return np.concatenate([views_8SS[:4], views_8SS[:4]])
    if look == "no-mask":
        changed = views_8SS.copy()
        changed[3], changed[7] = 255, 255
        return changed
    raise ValueError(f"there is no look {look!r}; use both, focal, full or no-mask")
