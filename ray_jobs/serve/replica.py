"""From settings to a working service: finds the model and starts its engine, in a process of its own. No Ray."""

from __future__ import annotations

from pathlib import Path

import meddam_core
from meddam_core.dam.config import read_config
from meddam_core.engines.apart import ApartLoop
from ray_jobs.serve.config import Config
from ray_jobs.serve.keys import Ledger
from ray_jobs.serve.metrics import Metrics
from ray_jobs.serve.service import Service

PACKAGED = Path(meddam_core.__file__).parent / "models" / "meddam-tiny"
"""The small model of synthetic images that comes with the package."""


def model_folder(cfg: Config) -> str:
    """The checkpoint to serve. Raises ValueError where there is none."""
    folder = cfg.model or str(PACKAGED)
    if not (Path(folder) / "config.json").is_file():
        if cfg.model is None:
            raise ValueError("no model comes with this installation; give one: meddam serve --model /weights/DAM-3B")
        raise ValueError(f"{folder} holds no DAM checkpoint: there is no config.json in it")
    return folder


def make_service(cfg: Config, *, ledger: Ledger | None = None, in_ray: bool = False) -> Service:
    """The service of one replica, its model loaded. Raises ValueError for a model or engine that cannot be had."""
    folder = model_folder(cfg)
    loop = ApartLoop(
        cfg.engine, folder, device=cfg.device, dtype=cfg.dtype, slots=cfg.slots, num_threads=cfg.num_threads
    )
    segmenter = None
    if cfg.segmenter is not None:
        from meddam_core.regions.promptable import load_segmenter

        segmenter = load_segmenter(cfg.segmenter, device=_device(cfg.device))
    name = cfg.model_name or Path(folder).resolve().name
    return Service(
        cfg, loop, read_config(folder).view.size, name, metrics=Metrics(in_ray), ledger=ledger,
        segmenter=segmenter,
    )  # fmt: skip


def _device(wanted: str) -> str:
    if wanted != "auto":
        return wanted
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
