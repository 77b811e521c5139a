"""A small model through the compiled kernels, in a process of its own: a crash or a hang there ends nothing else.

    python -m meddam_core.engines.mii.trial checkpoints/DAM-3B --device cuda --dtype bfloat16

A kernel that does not fit a driver may end its process or never return; `auto` finds that out here before it starts the
engine. Exit code 0: the kernels loaded and their logits were right. Otherwise the last line says what is wrong.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from meddam_core.engines.mii.compat import MiiUnavailable

TIMEOUT_S = 1800.0
"""Building all kernels with few cores takes a good part of it; a hang takes the rest."""


def run_trial(
    folder: str | Path, *, device: str, dtype: str, kernels: str | None = None, timeout_s: float = TIMEOUT_S
) -> None:  # fmt: skip
    """Runs the trial for the checkpoint in `folder`. Raises MiiUnavailable with what went wrong."""
    command = [sys.executable, "-m", __name__, str(folder), "--device", device, "--dtype", dtype]
    command += ["--kernels", kernels] if kernels else []
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired:
        raise MiiUnavailable(f"a trial of the kernels did not end within {timeout_s:.0f} s") from None
    if done.returncode < 0:
        raise MiiUnavailable(f"a trial of the kernels was ended by signal {-done.returncode}")
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        raise MiiUnavailable(f"a trial of the kernels failed: {lines[-1] if lines else 'it said nothing'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="DAM checkpoint, for the shape of its heads")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--kernels", choices=("cuda", "torch"))
    args = parser.parse_args()
    try:
        difference = try_kernels(args.folder, args.device, args.dtype, args.kernels)
    except MiiUnavailable as error:
        sys.exit(str(error))
    print(f"logits differ by {difference:.2g} of their size")


def try_kernels(folder: str | Path, device: str, dtype: str, kernels: str | None) -> float:
    """The logit check on two layers with random weights and the checkpoint's head size, grouping and epsilon."""
    import torch

    from meddam_core.dam.checkpoint import random_dam
    from meddam_core.dam.config import read_config
    from meddam_core.engines.mii.engine import load_kernels
    from meddam_core.engines.mii.startup import Limits, build_ragged_engine, check_logits, logit_reference

    config = read_config(folder)
    heads = 2 * config.llm.num_heads // config.llm.num_kv_heads
    llm = replace(
        config.llm, num_layers=2, num_heads=heads, num_kv_heads=2, hidden_size=heads * config.llm.head_dim,
        intermediate_size=512, vocab_size=1024,
    )  # fmt: skip
    small = replace(
        config, llm=llm, vision=replace(config.vision, num_layers=2), context=replace(config.context, num_layers=2)
    )
    dam = random_dam(small, 0, device=device, dtype=getattr(torch, dtype))
    chosen = load_kernels(dam, kernels)
    reference = logit_reference(dam, config.context_length)
    ragged = build_ragged_engine(dam, chosen, Limits(4, 1024, config.context_length, num_blocks=64), keep_weights=False)
    return check_logits(ragged, reference, dam.dtype)


if __name__ == "__main__":
    main()
