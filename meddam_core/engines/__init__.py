"""Engines by name: `make_engine("torch", folder)`, and `resolve_engine("auto", folder)` to learn which one it would be.

auto takes mii where it can run and its start-up check passes, otherwise torch, and says why. An engine that is named
never falls back. `package.module:Class` is an engine of your own: a class that takes (folder, device=, dtype=, slots=).

Importing this package loads neither torch nor DeepSpeed.
"""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

from meddam_core.engines.base import Engine

NAMES = ("auto", "torch", "mii")


class Resolved(NamedTuple):
    """Which engine serves a checkpoint on this machine, and why."""

    name: str
    kernels: str
    why: str


def make_engine(
    name: str, folder: str, *, device: str = "cpu", dtype: str = "float32", slots: int | None = None
) -> tuple[Engine, str]:
    """An engine over the checkpoint in `folder`, and why it was chosen.

    Args:
        name: auto, torch, mii or `package.module:Class`.
        folder: DAM checkpoint in the official layout.
        device: cpu or cuda.
        dtype: float32, bfloat16 or float16.
        slots: captions decoded at once; None for the engine's own choice.

    Raises ValueError for an unknown name, or a checkpoint that cannot be loaded.
    """
    if ":" in name:
        return _own_class(name)(folder, device=device, dtype=dtype, slots=slots), "named explicitly"
    if name == "torch" or (name == "auto" and device == "cpu"):
        import torch

        from meddam_core.dam.checkpoint import load_dam
        from meddam_core.engines.torch_engine import TorchEngine

        dam = load_dam(folder, device=device, dtype=getattr(torch, dtype))
        why = "named explicitly" if name == "torch" else "the device is a CPU"
        return TorchEngine(dam, max_batch=slots) if slots else TorchEngine(dam), why
    raise ValueError(f"no engine {name!r}: choose one of {', '.join(NAMES)}, or package.module:Class")


def resolve_engine(name: str, folder: str, *, device: str = "cpu", dtype: str = "float32") -> Resolved:
    """Makes the engine once to see that it works here, and frees it again."""
    engine, why = make_engine(name, folder, device=device, dtype=dtype)
    chosen = Resolved(name if ":" in name else engine.name, engine.kernels, why)
    engine.close()
    return chosen


def _own_class(path: str) -> Any:
    module, _, attribute = path.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"no engine class at {path!r}: {error}") from error
