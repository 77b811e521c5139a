"""Engines by name: `make_engine("torch", folder)`, and `resolve_engine("auto", folder)` to learn which one it would be.

auto takes mii where it can run and its start-up check passes, otherwise torch, and says why. An engine that is named
never falls back. `package.module:Class` is an engine of your own: a class that takes (folder, device=, dtype=, slots=).

Importing this package loads neither torch nor DeepSpeed.
"""

from __future__ import annotations

import importlib
import logging
import warnings
from typing import Any, NamedTuple

from meddam_core.engines.base import Engine

NAMES = ("auto", "torch", "mii")

_log = logging.getLogger(__name__)


class Resolved(NamedTuple):
    """Which engine serves a checkpoint on this machine, and why."""

    name: str
    kernels: str
    why: str


def make_engine(
    name: str, folder: str, *, device: str = "cpu", dtype: str = "float32", slots: int | None = None,
    kernels: str | None = None,
) -> tuple[Engine, str]:  # fmt: skip
    """An engine over the checkpoint in `folder`, and why it was chosen.

    Args:
        name: auto, torch, mii or `package.module:Class`.
        folder: DAM checkpoint in the official layout.
        device: cpu or cuda.
        dtype: float32, bfloat16 or float16.
        slots: captions decoded at once; None for the engine's own choice.
        kernels: for mii, cuda or torch; None for cuda on a GPU and torch on a CPU.

    auto warns (RuntimeWarning) when it gives up mii on a GPU. Raises ValueError for an unknown name, a checkpoint that
    cannot be loaded, or an engine named explicitly that cannot run here.
    """
    if ":" in name:
        return _own_class(name)(folder, device=device, dtype=dtype, slots=slots), "named explicitly"
    if name not in NAMES:
        raise ValueError(f"no engine {name!r}: choose one of {', '.join(NAMES)}, or package.module:Class")
    if why := _why_torch(name, device):
        return _make_torch(folder, device, dtype, slots), why
    if name == "mii":
        return _make_mii(folder, device, dtype, slots, kernels), "named explicitly"
    return _make_auto(folder, device, dtype, slots, kernels)


def _make_auto(folder: str, device: str, dtype: str, slots: int | None, kernels: str | None) -> tuple[Engine, str]:
    """mii on a GPU if it can serve there, otherwise torch, never silently."""
    from meddam_core.engines.mii.compat import MiiUnavailable, check_versions
    from meddam_core.engines.mii.trial import run_trial

    try:
        check_versions()
        run_trial(folder, device=device, dtype=dtype, kernels=kernels)
        return _make_mii(folder, device, dtype, slots, kernels), "a trial of its kernels and the start-up check passed"
    except MiiUnavailable as error:
        why = f"mii cannot serve here, torch does: {error}"
    _log.warning("engine auto: %s", why)
    warnings.warn(why, RuntimeWarning, stacklevel=3)
    return _make_torch(folder, device, dtype, slots), why


def _make_torch(folder: str, device: str, dtype: str, slots: int | None) -> Engine:
    import torch

    from meddam_core.dam.checkpoint import load_dam
    from meddam_core.engines.torch_engine import TorchEngine

    return TorchEngine(load_dam(folder, device=device, dtype=getattr(torch, dtype)), max_batch=slots)


def _make_mii(folder: str, device: str, dtype: str, slots: int | None, kernels: str | None) -> Engine:
    import torch

    from meddam_core.dam.checkpoint import load_dam
    from meddam_core.engines.mii.compat import check_versions
    from meddam_core.engines.mii.engine import MiiEngine

    check_versions()  # before gigabytes are read
    dam = load_dam(folder, device=device, dtype=getattr(torch, dtype))
    return MiiEngine(dam, kernels=kernels, max_sequences=slots)


def resolve_engine(name: str, folder: str, *, device: str = "cpu", dtype: str = "float32") -> Resolved:
    """Makes the engine once to see that it works here, and frees it again; torch works with whatever fits its headers.

    Raises as `make_engine` does.
    """
    if why := _why_torch(name, device):
        from meddam_core.dam.checkpoint import check_dam
        from meddam_core.engines.torch_engine import TorchEngine

        check_dam(folder)
        return Resolved(TorchEngine.name, TorchEngine.kernels, why)
    engine, why = make_engine(name, folder, device=device, dtype=dtype)
    chosen = Resolved(name if ":" in name else engine.name, engine.kernels, why)
    engine.close()
    return chosen


def _why_torch(name: str, device: str) -> str:
    """Why it is torch, where that is known without a trial; else ""."""
    if name == "torch":
        return "named explicitly"
    return "the device is a CPU" if (name, device) == ("auto", "cpu") else ""


def _own_class(path: str) -> Any:
    module, _, attribute = path.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"no engine class at {path!r}: {error}") from error
