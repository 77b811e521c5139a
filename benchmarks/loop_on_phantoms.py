"""Does a model learn from its own captions? The loop on phantoms, with curation, without, and with labels alone.

    python -m benchmarks.loop_on_phantoms --out loop-phantoms                     # over an hour on two shared cores
    python -m benchmarks.loop_on_phantoms --out loop-mini --mini                  # a few steps: only that it works

Run it again to resume. A small model is trained from scratch on the labels of LABELLED_IMAGES phantoms, a tenth of what
the packaged one had, through the same three stages: labels, language, all. It then describes the regions of as many
phantoms as UNLABELLED_IMAGES, whose shards hold no labels, and learns for two rounds from what curation leaves;
beside it one arm takes every caption, and one trains as many steps on the labelled phantoms alone, since more training
by itself may help. All three share the first model, the seeds and the captions of round 1. The locked set is read once,
in wordings that are used nowhere else.

After that, and for this page only, the labels of the unlabelled phantoms, which were kept aside, say how right the
captions were that each arm learnt from. OUT/report.html is the loop's own page, OUT/figures.json holds all figures.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from benchmarks.tiny_variants import LABELS
from meddam_core import storage
from meddam_core.shards import read_shard, write_shard

# -- what may be changed ----------------------------------------------------------------------------------------------
MODEL = "tiny"
"""From scratch; or a checkpoint folder, which then goes through no stage before START."""
LABELLED_IMAGES = 240
UNLABELLED_IMAGES = 140
DEVELOPMENT_IMAGES = 40
TEST_IMAGES = 100
SEED = 4_100
PAINTED: dict[str, Any] = {"surroundings": "anatomy", "images_per_shard": 30}
"""Further settings of `meddam ingest phantoms`, of all sets."""
ARMS = ("curated", "uncurated", "labelled")
ROUNDS = 2
SAMPLES = 3
SWAPPED = {"swap": 0.3}
"""Where captions are made from truth; captions of a model cannot follow an exchanged view."""
SEE: dict[str, Any] = {
    "learn": "labels", "labels": LABELS, "open_gates": 1.0, "learning_rate": 1e-3, "max_steps": 700, **SWAPPED,
}  # fmt: skip
SPEAK: dict[str, Any] = {"train": "language", "learning_rate": 1e-3, "max_steps": 350, **SWAPPED}
"""Of `meddam finetune`: the stages before the first model, which START ends."""
START: dict[str, Any] = {"max_steps": 250, "learning_rate": 5e-4, "warmup_steps": 50, "batch_size": 16, **SWAPPED}
FINETUNE: dict[str, Any] = {"max_steps": 200, "learning_rate": 3e-4, "warmup_steps": 30, "batch_size": 16}
"""Of each round."""
TRAINING: dict[str, Any] = {
    "dtype": "float32", "num_workers": 0, "num_threads": 1, "cache_views": True, "gate_rate": 1.0, "augment": 0.5,
}  # fmt: skip
"""Of all."""
CAPTION: dict[str, Any] = {"temperature": 0.7, "max_new_tokens": 96}
CURATE: dict[str, Any] = {"min_verdicts": 0.85, "keep_confident": 0.6}
REPEAT_LABELLED = 1
MINI: dict[str, Any] = {
    "LABELLED_IMAGES": 3, "UNLABELLED_IMAGES": 3, "DEVELOPMENT_IMAGES": 3, "TEST_IMAGES": 3, "SAMPLES": 2, "ROUNDS": 1,
    "PAINTED": {"size": 512, "max_lesions": 2, "distractors": False},
    "START": {"max_steps": 2, "learning_rate": 1e-4, "warmup_steps": 1, "batch_size": 2},
    "FINETUNE": {"max_steps": 2, "learning_rate": 1e-4, "warmup_steps": 1, "batch_size": 2},
    "CAPTION": {"temperature": 0.5, "max_new_tokens": 40}, "CURATE": {"min_verdicts": 0.01},
}  # fmt: skip
"""What --mini changes, beside starting from the packaged model: every stage runs, and nothing is learnt."""
# ---------------------------------------------------------------------------------------------------------------------


def painted(folder: Path) -> dict[str, str]:
    """The sets: each of its own pictures, the unlabelled one without labels, which lie apart as `answers`."""
    from ray_jobs import ingest
    from ray_jobs.ingest_config import PhantomsConfig

    sets = {
        "labelled": LABELLED_IMAGES, "unlabelled": UNLABELLED_IMAGES, "development": DEVELOPMENT_IMAGES,
        "test": TEST_IMAGES,
    }  # fmt: skip
    first, found = 0, {}
    for number, (name, count) in enumerate(sets.items()):
        found[name] = str(folder / "sets" / name)
        out = str(folder / "sets" / "answers") if name == "unlabelled" else found[name]
        settings = {"count": count, "phantom_seed": SEED, "first": first, "first_shard": 1000 * number, **PAINTED}
        ingest.run(PhantomsConfig(out=out, num_cpus=2, **settings))
        first += count
    found["answers"] = str(folder / "sets" / "answers")
    without_labels(found["answers"], found["unlabelled"])
    return found


def without_labels(source: str, out: str) -> None:
    """Shards as `meddam ingest phantoms --no-labels` writes them, without painting them a second time."""
    from ray_jobs.snapshot import shards_below

    for shard in shards_below(source):
        to = storage.join(out, "shards", shard.uri.rpartition("/")[2])
        if not storage.exists(to):
            blind = (replace(i, labels=[], regions=[replace(r, labels=[]) for r in i.regions])
                     for i in read_shard(shard.uri))  # fmt: skip
            write_shard(to, blind)


def taught(folder: Path, labelled: str) -> str:
    """Takes a model from scratch through its first two stages. Returns the checkpoint that START begins with."""
    from ray_jobs import finetune
    from ray_jobs.finetune_config import Config

    model = MODEL
    if model == "tiny":
        shared: dict[str, Any] = {**TRAINING, "shards": (labelled,), "batch_size": 16, "warmup_steps": 50, "seed": SEED}
        for name, stage in (("see", SEE), ("speak", SPEAK)):
            out = folder / name
            if not (out / "model" / "config.json").exists():
                finetune.run(Config(**shared, **stage, model=model, out=str(out)))
            model = str(out / "model")
    return model


def loop_config(folder: Path, sets: dict[str, str], model: str) -> Any:
    """The settings of the loop."""
    from ray_jobs.loop_config import Config

    return Config(
        out=str(folder / "loop"), model=model, labelled=(sets["labelled"],), unlabelled=(sets["unlabelled"],),
        development=(sets["development"],), test=(sets["test"],), arms=ARMS, max_rounds=ROUNDS, patience=ROUNDS,
        repeat_labelled=REPEAT_LABELLED, start={**TRAINING, **START}, finetune={**TRAINING, **FINETUNE},
        caption={"num_samples": SAMPLES, **CAPTION}, curate=CURATE, same_judge=True, seed=SEED, num_cpus=2,
    )  # fmt: skip


def rightness(run: str, kept: str, answers: str) -> dict[str, list[int]]:
    """(right, asked) by the lexical judge against the truth, of the captions of a run that were kept and dropped."""
    from meddam_core.judging.lexical import LexicalJudge
    from qa_library.build import Settings, questions_of_image
    from qa_library.loader import load_library
    from ray_jobs.qa import COLUMNS
    from ray_jobs.run_directory import RunDirectory
    from ray_jobs.snapshot import shards_below

    library = load_library()
    judge = LexicalJudge(library)
    questions: dict[int, list[Any]] = defaultdict(list)
    for image in (i for s in shards_below(answers) for i in read_shard(s.uri, columns=COLUMNS, batch_rows=256)):
        for question in questions_of_image(image, library, Settings(seed=SEED)).questions:
            questions[question.region_id].append(question)
    chosen = {(r["region_id"], r["sample"]) for r in pq.read_table(kept, columns=["region_id", "sample"]).to_pylist()}
    counts = {"kept": [0, 0], "dropped": [0, 0]}
    for file in RunDirectory(run).published() or []:
        for row in pq.read_table(file, columns=["region_id", "sample", "text"]).to_pylist():
            count = counts["kept" if (row["region_id"], row["sample"]) in chosen else "dropped"]
            outcomes = [judge.judge(q, row["text"] or "").outcome for q in questions[row["region_id"]]]
            count[0] += outcomes.count("correct")
            count[1] += len(outcomes)
    return counts


def figures(folder: Path, summary: Any, answers: str) -> dict[str, Any]:
    """Scores, differences, and how right what was learnt from was."""
    state = summary.state
    found: dict[str, Any] = json.loads(state.model_dump_json(include={"start", "arms", "test", "remarks"}))
    found["pseudo_labels"] = [
        {"arm": arm.name, "round": r.number, "kept": r.num_kept, "of": r.num_captions,
         "right": rightness(r.captions, f"{summary.out}/{arm.name}/round-{r.number}/set/captions", answers)}
        for arm in state.arms for r in arm.rounds if r.captions is not None
    ]  # fmt: skip
    (folder / "figures.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    return found


def markdown(found: dict[str, Any]) -> str:
    """All figures as tables."""
    test = found["test"]
    start = test["scores"]["start"]["value"]
    lines = ["| model | MedDLC-score, strict (95 % interval) | ratio to the first model |", "|---|---|---|"]
    for name, s in test["scores"].items():
        ratio = f"{s['value'] / start:.3f}" if start and name in test["models"] else ""
        lines.append(f"| {name} | {100 * s['value']:.1f} ({100 * s['low']:.1f} to {100 * s['high']:.1f}) | {ratio} |")
    lines += ["", "| first | second | first less second (95 % interval) | p |", "|---|---|---|---|"]
    for p in test["pairs"]:
        d = p["difference"]
        around = f"{100 * d['value']:+.1f} ({100 * d['low']:+.1f} to {100 * d['high']:+.1f})"
        lines.append(f"| {p['first']} | {p['second']} | {around} | {p['p']:.3f} |")
    lines += [
        "",
        "| arm | round | captions kept | right, of questions | right where dropped |",
        "|---|---|---|---|---|",
    ]
    for row in found["pseudo_labels"]:
        cells = [f"{100 * r / a:.1f} %" if a else "" for r, a in (row["right"]["kept"], row["right"]["dropped"])]
        lines.append(f"| {row['arm']} | {row['round']} | {row['kept']:,} of {row['of']:,} | {cells[0]} | {cells[1]} |")
    return "\n".join([*lines, "", *found["remarks"]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--mini", action="store_true", help="a few steps on a few pictures")
    args = parser.parse_args()
    if args.mini:
        from meddam_core.models import default_model

        globals().update(MINI, MODEL=str(default_model()))
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    from ray_jobs import loop
    from ray_jobs.session import session

    with session(2):
        sets = painted(args.out)
        summary = loop.run(loop_config(args.out, sets, taught(args.out, sets["labelled"])))
        print("\n".join(summary.lines()))
        if summary.exit_code == 0:
            print(markdown(figures(args.out, summary, sets["answers"])))
    raise SystemExit(summary.exit_code)


if __name__ == "__main__":
    main()
