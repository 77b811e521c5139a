"""What the packaged small model knows, and which of its views tells it: all figures of its card, by one command.

    python -m benchmarks.meddam_tiny                                  # about five minutes on one core
    python -m benchmarks.meddam_tiny --model DIR --num-regions 100 --json figures.json

Sets are painted anew from seeds that training never used. `unseen` is the distribution that the model was trained on;
`held-out` holds combinations of attributes that it never saw, `second` comes from the generator written otherwise.
Scores are MedDLC-score, strict, by the lexical judge. For the swap, full view (with its mask), crop and the crop's mask
each come from one region or from another, in all eight ways; a fact follows a view if the caption says what is
true of the region that the view came from (one half by chance).
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from meddam_core.datasets.phantoms import Options, Phantoms
from meddam_core.datasets.phantoms.captions import grammars, worded
from meddam_core.datasets.rows import RowRules, rows_of
from meddam_core.judging.lexical import value_stated
from meddam_core.judging.scores import make_sheet, with_interval
from meddam_core.training.batch import Batch, Collator
from meddam_core.training.examples import Example, examples_of
from meddam_core.training.looks import Look
from qa_library.loader import load_library
from qa_library.truth import truth_of
from ray_jobs.score_model import Held, describe, judged, without_picture

HELD_OUT = (
    "margin=spiculated&density=ground-glass", "margin=lobulated&density=calcified", "colour=purple&surface=crusted",
    "colour=yellow&surface=scaly",
)  # fmt: skip
"""Combinations that training never saw."""
SEED = 909
FULL_FACTS = ("side", "zone", "column", "size")
CROP_FACTS = ("margin", "texture", "surface", "elevation", "density", "colour")


def painted(num_regions: int, size: int, first: int = 0, **settings: Any) -> Held:
    """The first `num_regions` regions of a set of phantoms, rendered for a model of that view size."""
    source = Phantoms(count=10_000, seed=SEED, first=first, **settings)
    rules = RowRules(dataset="phantoms", licence=source.licence, egress="open", image_secret=b"benchmark")
    held = Held([], [])
    for ordinal, item in enumerate(source.items()):
        for image in rows_of(source, item, ordinal=ordinal, rules=rules, shard=0, first_row=ordinal)[0]:
            found = list(examples_of(image, size))[: num_regions - len(held.examples)]
            held.examples.extend(found)
            held.images.append(without_picture(image, {e.region_id for e in found}))
        if len(held.examples) >= num_regions:
            return held
    return held


class Reader:
    """Which value of an attribute a caption states, and which is true, in the terms of the question library."""

    def __init__(self) -> None:
        self._library = load_library()

    def true(self, example: Example) -> dict[str, str]:
        """Attribute -> value id."""
        template_set = self._library.find("phantoms", example.modality)
        labels = [_Row(name, value) for name, value in example.labels.items()]
        assert template_set is not None
        return {f.attribute.id: f.value.id for f in truth_of(template_set, labels).present() if f.number is None}

    def stated(self, example: Example, attribute: str, caption: str) -> str:
        """The value's id, or what there is instead."""
        template_set = self._library.find("phantoms", example.modality)
        assert template_set is not None
        return value_stated(template_set, template_set.attribute(attribute), caption)[0]


class _Row:
    """A label as the question library takes it."""

    trust = 1.0

    def __init__(self, name: str, value: str) -> None:
        self.name, self.value = name, value


def score(dam: Any, held: Held, look: Look = "both") -> tuple[dict[str, Any], list[str]]:
    """MedDLC-score, strict, with intervals in percent, and the captions."""
    texts = describe(dam, held.examples, "meddam-v1", look)
    rows = judged(held, {e.region_id: t for e, t in zip(held.examples, texts, strict=True)})
    found = with_interval(make_sheet(rows, strict=True), num=500)
    named = {"positive": found.positive, "negative": found.negative, "average": found.average}
    return {k: [round(100 * v, 1) for v in (i.value, i.low, i.high)] for k, i in named.items()}, texts


def accuracy(reader: Reader, examples: Sequence[Example], texts: Sequence[str]) -> dict[str, float]:
    """Percent of lesions of which the caption states the true value, by attribute."""
    right: dict[str, list[bool]] = defaultdict(list)
    for example, text in zip(examples, texts, strict=True):
        if example.labels["kind"] == "lesion":
            for attribute, value in reader.true(example).items():
                right[attribute].append(reader.stated(example, attribute, text) == value)
    return {a: round(100 * float(np.mean(r)), 1) for a, r in sorted(right.items())}


def chance(reader: Reader, examples: Sequence[Example], attributes: Sequence[str]) -> dict[str, float]:
    """Percent right of always stating the value that is most frequent in its kind of picture."""
    counts: dict[tuple[str, str], dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for example in examples:
        if example.labels["kind"] == "lesion":
            for attribute, value in reader.true(example).items():
                counts[attribute, example.modality][value] += 1
    return {
        a: round(100 * sum(max(c.values()) for k, c in counts.items() if k[0] == a)
                 / sum(sum(c.values()) for k, c in counts.items() if k[0] == a), 1)
        for a in attributes if any(k[0] == a for k in counts)
    }  # fmt: skip


def gates_at_zero(dam: Any) -> Callable[[], None]:
    """Closes the adapters' gates; returns what opens them again."""
    gates = [p for n, p in dam.named_parameters() if n.endswith(("attn_factor", "mlp_factor"))]
    kept = [p.detach().clone() for p in gates]

    def fill(values: Sequence[Any]) -> None:
        with torch.no_grad():
            for gate, value in zip(gates, values, strict=True):
                gate.copy_(value)

    fill([torch.zeros_like(k) for k in kept])
    return lambda: fill(kept)


def swaps(dam: Any, reader: Reader, examples: Sequence[Example], num_pairs: int) -> dict[str, dict[str, float]]:
    """For each fact the percent of captions that follow the full view, the crop and the mask of the crop."""
    lesions = [e for e in examples if e.labels["kind"] == "lesion" and e.labels["part"] == "whole"]
    pairs = [
        p for p in itertools.pairwise(sorted(lesions, key=lambda e: (e.modality, e.region_id)))
        if p[0].modality == p[1].modality and p[0].image_id != p[1].image_id
    ][:: max(1, len(lesions) // num_pairs)][:num_pairs]  # fmt: skip
    shown, sources = [], []
    for pair in pairs:
        for full, crop, mask in itertools.product((0, 1), repeat=3):
            parts = [pair[full].views_8SS[:4], pair[crop].views_8SS[4:7], pair[mask].views_8SS[7:]]
            shown.append(replace(pair[0], views_8SS=np.concatenate(parts)))
            sources.append((pair, {"full view": full, "crop": crop, "mask": mask}))
    follows: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for (pair, origin), text in zip(sources, describe(dam, shown, "meddam-v1"), strict=True):
        true = [reader.true(e) for e in pair]
        for attribute in (*FULL_FACTS, *CROP_FACTS, "shape"):
            values = [t.get(attribute) for t in true]
            if None in values or values[0] == values[1]:
                continue
            stated = reader.stated(pair[0], attribute, text)
            if stated in values:
                for view, owner in origin.items():
                    follows[attribute][view].append(stated == values[owner])
    return {
        a: {**{v: round(100 * float(np.mean(hits)), 1) for v, hits in by.items()}, "captions": len(by["crop"])}
        for a, by in follows.items()
    }


def parts(dam: Any, reader: Reader, examples: Sequence[Example], look: Look) -> dict[str, float]:
    """Percent of twins, and of cores and halos, whose own density or colour the caption states."""
    chosen = [e for e in examples if e.labels.get("part", "whole") != "whole"]
    right: dict[str, list[bool]] = defaultdict(list)
    for example, text in zip(chosen, describe(dam, chosen, "meddam-v1", look), strict=True):
        kind = "twins" if example.labels["part"] == "twin" else "core and halo"
        attribute = "colour" if "colour" in example.labels else "density"
        stated = reader.stated(example, attribute, text)
        right[kind].append(stated == reader.true(example)[attribute])
    return {k: round(100 * float(np.mean(r)), 1) for k, r in right.items()}


def preference(dam: Any, examples: Sequence[Example], *, held_out: bool) -> float:
    """Percent of captions in some wordings that are likelier than the same with one fact of another region's."""
    rng = np.random.default_rng(SEED)
    lesions = [e for e in examples if e.labels["kind"] == "lesion"]
    chosen = [g for g in grammars() if g.subject == "lesion" and g.length == "paragraph" and g.held_out == held_out]
    won = []
    for example in lesions:
        others = [o for o in lesions if o.modality == example.modality]
        names = [n for n in (*FULL_FACTS, *CROP_FACTS) if n in example.labels]
        name = names[int(rng.integers(len(names)))]
        wrong = [o.labels[name] for o in others if o.labels[name] != example.labels[name]]
        if not wrong:
            continue
        grammar = chosen[int(rng.integers(len(chosen)))]
        false = {**example.labels, name: wrong[int(rng.integers(len(wrong)))]}
        losses = [_loss(dam, example, worded(labels, grammar)) for labels in (example.labels, false)]
        won.append(losses[0] < losses[1])
    return round(100 * float(np.mean(won)), 1)


def _loss(dam: Any, example: Example, caption: str) -> float:
    from meddam_core.prompts import load_prompt
    from meddam_core.training.augment import Augmentation
    from meddam_core.training.loss import caption_loss
    from meddam_core.training.texts import Texts

    texts = Texts((load_prompt("meddam-v1"),), "table")
    collate = Collator(dam.tokenizer, dam.config.num_image_tokens, texts, Augmentation(0), 0)
    batch: Batch = collate([replace(example, captions=(("meddam-v1", caption),))], 0)
    with torch.inference_mode():
        return float(caption_loss(dam, batch)) / batch.num_targets


def figures(dam: Any, num_regions: int) -> dict[str, Any]:
    """All of them."""
    reader, size = Reader(), dam.config.view_size
    few = max(min(num_regions // 2, 150), 10)
    usual = Options(without=HELD_OUT)
    sets = {
        "unseen": painted(num_regions, size, options=usual),
        "held-out combinations": painted(few, size, options=Options(only=HELD_OUT), distractors=False),
        "second generator": painted(few, size, generator="second"),
    }
    found: dict[str, Any] = {"num_regions": {k: len(h.examples) for k, h in sets.items()}, "scores": {}, "facts": {}}
    for name, held in sets.items():
        found["scores"][name], texts = score(dam, held)
        found["facts"][name] = accuracy(reader, held.examples, texts)
    unseen = sets["unseen"]
    found["chance"] = chance(reader, unseen.examples, (*FULL_FACTS, *CROP_FACTS, "shape", "finding"))
    first = painted(few, size, options=usual)  # the beginning of the same set
    restore = gates_at_zero(dam)
    found["scores"]["gates at zero"], texts = score(dam, first)
    found["facts"]["gates at zero"] = accuracy(reader, first.examples, texts)
    restore()
    neutral = painted(few, size, first=1000, options=replace(usual, surroundings="neutral"))
    found["scores"]["neutral surroundings"], texts = score(dam, neutral)
    found["facts"]["neutral surroundings"] = accuracy(reader, neutral.examples, texts)
    found["num_regions"] |= {"gates at zero": few, "neutral surroundings": few}
    found["swap"] = swaps(dam, reader, neutral.examples, few // 5)
    many = [*unseen.examples, *neutral.examples]
    found["parts"] = {"with the mask": parts(dam, reader, many, "both"), "without": parts(dam, reader, many, "no-mask")}
    found["preference"] = {
        "trained wordings": preference(dam, unseen.examples[:few], held_out=False),
        "held-out wordings": preference(dam, unseen.examples[:few], held_out=True),
    }
    return found


def markdown(found: Mapping[str, Any]) -> str:
    """The figures as tables."""
    lines = ["| set | regions | positive | negative | MedDLC-score (95 % interval) |", "|---|---|---|---|---|"]
    for name, s in found["scores"].items():
        count = found["num_regions"].get(name, found["num_regions"]["unseen"])
        p, n, a = s["positive"], s["negative"], s["average"]
        lines.append(f"| {name} | {count} | {p[0]} | {n[0]} | {a[0]} ({a[1]} to {a[2]}) |")
    names = list(found["facts"])
    lines += ["", f"| fact | {' | '.join(names)} | most frequent value |", "|---" * (len(names) + 2) + "|"]
    for fact in sorted({f for by in found["facts"].values() for f in by}):
        cells = [str(found["facts"][n].get(fact, "")) for n in names]
        lines.append(f"| {fact} | {' | '.join(cells)} | {found['chance'].get(fact, '')} |")
    lines += ["", "| fact | follows the full view | the crop | the crop's mask | captions |", "|---|---|---|---|---|"]
    for fact, by in found["swap"].items():
        lines.append(f"| {fact} | {by['full view']} | {by['crop']} | {by['mask']} | {by['captions']} |")
    lines += ["", "| part | with the mask | without |", "|---|---|---|"]
    for kind in found["parts"]["with the mask"]:
        lines.append(f"| {kind} | {found['parts']['with the mask'][kind]} | {found['parts']['without'][kind]} |")
    lines += ["", *(f"True caption likelier than one with a wrong fact, {k}: {v} %." for k, v in
                    found["preference"].items())]  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    from meddam_core.dam.checkpoint import load_dam
    from meddam_core.models import default_model

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="checkpoint folder; by default the packaged one")
    parser.add_argument("--num-regions", type=int, default=500)
    parser.add_argument("--json", type=Path, default=None, help="also write the figures here")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    found = figures(load_dam(args.model or default_model()), args.num_regions)
    print(markdown(found))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
