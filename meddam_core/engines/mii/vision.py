"""Moved: both engines share meddam_core.engines.vision."""

from meddam_core.engines.vision import Pending, VisionQueue

__all__ = ["Pending", "VisionQueue"]
