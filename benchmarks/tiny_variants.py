"""What each view is worth: small models trained alike, of which some see less, measured on the same unseen regions.

    python -m benchmarks.tiny_variants phantoms/neutral phantoms/anatomy --out variants --seeds 2

The phantoms are those of docs/training.md. Each variant goes through the three stages of the packaged model (labels,
language, all), shortened. Trained models are kept: run again, it goes on where it stopped. `both` sees what a DAM sees;
the others see one view twice, or no mask.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.meddam_tiny import CROP_FACTS, FULL_FACTS, HELD_OUT, Reader, accuracy, painted, parts, score
from meddam_core.datasets.phantoms import Options
from meddam_core.training.looks import Look
from ray_jobs import finetune
from ray_jobs.finetune_config import Config

LOOKS: tuple[Look, ...] = ("both", "focal", "full", "no-mask")
PROMPTS = ("meddam-v1",)
LABELS = ("kind", "finding", "part", "density", "colour", "shape", "margin", "texture", "surface", "elevation", "side",
          "zone", "column", "size")  # fmt: skip


def stages(shards: list[str], out: Path, look: Look, seed: int, steps: tuple[int, int, int]) -> list[Config]:
    """The three runs of one variant; the model of each is what the next begins with."""
    shared: dict[str, Any] = {
        "shards": tuple(shards), "view": look, "seed": seed, "swap": 0.3, "augment": 0.5, "batch_size": 16,
        "dtype": "float32", "num_threads": 1, "num_workers": 0, "cache_views": True, "gate_rate": 1.0,
        "prompts": PROMPTS, "warmup_steps": 50, "log_every": 50, "checkpoint_every": 250,
    }  # fmt: skip
    see, speak, both = (str(out / name) for name in ("see", "speak", "both"))
    return [
        Config(**shared, out=see, model="tiny", learn="labels", labels=LABELS, open_gates=1.0, learning_rate=1e-3,
               max_steps=steps[0]),
        Config(**shared, out=speak, model=f"{see}/model", train="language", learning_rate=1e-3, max_steps=steps[1]),
        Config(**shared, out=both, model=f"{speak}/model", learning_rate=5e-4, max_steps=steps[2]),
    ]  # fmt: skip


def train(shards: list[str], out: Path, look: Look, seed: int, steps: tuple[int, int, int]) -> Path:
    """Trains one variant, or finds it trained. Returns its checkpoint folder."""
    views = out.parent / "views"  # the same for all: what a variant does not see is left out when it is shown
    views.mkdir(parents=True, exist_ok=True)
    for cfg in stages(shards, out, look, seed, steps):
        folder = Path(cfg.out)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "views").exists():
            (folder / "views").symlink_to(views.resolve())
        if not (folder / "model" / "config.json").exists():
            finetune.run(cfg)
    return out / "both" / "model"


def measure(model: Path, look: Look, num_regions: int) -> dict[str, float]:
    """Percent right: strict score, facts by where they are seen, twins."""
    from meddam_core.dam.checkpoint import load_dam

    dam, reader = load_dam(model), Reader()
    unseen = painted(num_regions, dam.config.view_size, options=Options(without=HELD_OUT))
    neutral = painted(
        num_regions, dam.config.view_size, first=1000, options=Options(without=HELD_OUT, surroundings="neutral")
    )
    found, _ = score(dam, unseen, look)
    _, texts = score(dam, neutral, look)
    facts = accuracy(reader, neutral.examples, texts)

    def mean(names: tuple[str, ...]) -> float:
        return round(float(np.mean([facts[n] for n in names if n in facts])), 1)

    own = parts(dam, reader, [*unseen.examples, *neutral.examples], look)
    return {"strict score": found["average"][0], "full view's facts": mean(FULL_FACTS),
            "crop's facts": mean(CROP_FACTS), "twins": own.get("twins", float("nan"))}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--look", choices=LOOKS, action="append", help="only these variants")
    parser.add_argument("--steps", default="1200,400,400", help="of the three stages")
    parser.add_argument("--num-regions", type=int, default=200)
    args = parser.parse_args()
    torch.set_num_threads(1)
    first, second, third = (int(s) for s in args.steps.split(","))
    rows: list[dict[str, Any]] = []
    for seed in range(args.seeds):
        for look in args.look or LOOKS:
            model = train(args.shards, args.out / f"{look}-{seed}", look, seed, (first, second, third))
            rows.append({"sees": look, "seed": seed, **measure(model, look, args.num_regions)})
            print(rows[-1], flush=True)
    (args.out / "figures.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    names = list(rows[0])[2:]
    print("\n| sees | seeds | " + " | ".join(names) + " |\n" + "|---" * (len(names) + 2) + "|")
    for look in args.look or LOOKS:
        mine = [r for r in rows if r["sees"] == look]
        cells = [f"{np.mean([r[n] for r in mine]):.1f}" + (
            f" ({min(r[n] for r in mine):.1f} to {max(r[n] for r in mine):.1f})" if len(mine) > 1 else ""
        ) for n in names]  # fmt: skip
        print(f"| {look} | {len(mine)} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
