"""How far a judge can be trusted: clinicians answer a sample of its questions, blind, and the scores are corrected.

    items = draw(candidates, num=200, seed=0)              # half of them where the judge said right, half wrong
    sheet goes out as CSV or HTML, twice; filled sheets come back
    found = assess(items, first_answers, second_answers)
    found.sensitivity, found.specificity, found.alpha, corrected(0.62, found)

Notes:
- Blind: a sheet holds the caption, the question and its options; no judge, no verdict, no model, no truth. Item ids are
  hashes, and each reader gets another order.
- Each reader's option is turned into right or wrong by the question's own expectation, as the judge's was. What the two
  agree on is the reference; what they disagree on, or leave open, is counted and left out.
- sensitivity: of the answers that are right, the share the judge counts right; specificity: of the wrong ones, the
  share it counts wrong. Both are weighted back to how often the judge says right in the whole run, because the sample
  is balanced.
- Rogan and Gladen (1978): corrected = (apparent + specificity - 1) / (sensitivity + specificity - 1), cut to 0 to 1.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from meddam_core.judging.protocol import Verdict
from meddam_core.judging.statistics import Interval, krippendorff_alpha, percentiles, wilson
from qa_library.questions import Question

NUM_RESAMPLES = 2000
UNSURE = "unsure"
"""What a reader may answer instead of an option."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A verdict that could be adjudicated."""

    question: Question
    caption: str
    verdict: Verdict
    caption_key: str = ""
    """Which of the region's captions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """A question on the sheets."""

    item_id: str
    question: Question
    caption: str
    judged_right: bool


def draw(candidates: Sequence[Candidate], num: int, seed: int = 0) -> list[Item]:
    """At most `num` scored verdicts, half of them right ones and half wrong ones, spread over attributes.

    Raises ValueError where none was scored.
    """
    pools: dict[bool, dict[str, list[Candidate]]] = {True: {}, False: {}}
    for candidate in candidates:
        if candidate.verdict.outcome != "unscored":
            right = candidate.verdict.outcome == "correct"
            key = f"{candidate.question.template_id}/{candidate.question.polarity}"
            pools[right].setdefault(key, []).append(candidate)
    rng = random.Random(seed)
    sizes = {right: sum(map(len, pool.values())) for right, pool in pools.items()}
    if not sum(sizes.values()):
        raise ValueError("there is no scored verdict to adjudicate")
    wrong = min(sizes[False], num - min(sizes[True], num // 2))
    taken = {False: wrong, True: min(sizes[True], num - wrong)}
    chosen = [c for right, pool in pools.items() for c in _in_turn(pool, taken[right], rng)]
    return [_item(c, seed) for c in rng.sample(chosen, len(chosen))]


def _in_turn(pools: Mapping[str, list[Candidate]], num: int, rng: random.Random) -> list[Candidate]:
    """One of each pool in turn, at random within it."""
    order = [rng.sample(pools[k], len(pools[k])) for k in sorted(pools)]
    chosen: list[Candidate] = []
    while len(chosen) < num:
        for pool in order:
            if pool and len(chosen) < num:
                chosen.append(pool.pop())
    return chosen


def _item(candidate: Candidate, seed: int) -> Item:
    named = f"{seed}/{candidate.question.dataset}/{candidate.question.question_id}/{candidate.caption_key}"
    return Item(
        item_id=hashlib.blake2b(named.encode(), digest_size=6).hexdigest(), question=candidate.question,
        caption=candidate.caption, judged_right=candidate.verdict.outcome == "correct",
    )  # fmt: skip


def order_of(items: Sequence[Item], reader: str, seed: int = 0) -> list[Item]:
    """The items as one reader sees them."""
    return random.Random(f"{seed}/{reader}").sample(list(items), len(items))


@dataclass(frozen=True, slots=True, kw_only=True)
class Assessment:
    """How a judge compares with two readers."""

    num_items: int
    num_reference: int
    """Items on which both readers agree whether the caption is right."""
    num_disagreed: int
    num_open: int
    """Items that a reader left open or answered as unsure."""
    alpha: float
    """Krippendorff's alpha of the two readers over right and wrong."""
    same_option: Interval
    """Share of items on which both readers chose the same option."""
    sensitivity: Interval
    specificity: Interval
    agreement: Interval
    """Share of reference items on which judge and readers agree, in the sample."""
    draws: tuple[tuple[float, float], ...]
    """Resamples of (sensitivity, specificity), for corrected scores."""


def assess(
    items: Sequence[Item], first: Mapping[str, str], second: Mapping[str, str], share_right: float, *, seed: int = 0
) -> Assessment:
    """Compares the judge with two readers' answers (option ids by item id).

    `share_right` is the share of the judge's scored verdicts in the whole run that are right. Raises ValueError for an
    answer to an item or with an option that does not exist, and where nothing remains to compare with.
    """
    for answers in (first, second):
        _check(items, answers)
    ratings = [[_right(i, answers) for i in items] for answers in (first, second)]
    both = [(i, a) for i, a, b in zip(items, *ratings, strict=True) if a is not None and a == b]
    answered = [(first[i.item_id], second[i.item_id]) for i in items if _given(i, first) and _given(i, second)]
    if not both or not answered:
        raise ValueError("the two readers agree on no item: there is nothing to hold the judge against")
    table = np.asarray([[i.judged_right, right] for i, right in both], dtype=bool)
    rng = np.random.default_rng(seed)
    draws = [_rates(table[rng.integers(0, len(table), len(table))], share_right) for _ in range(NUM_RESAMPLES)]
    value = _rates(table, share_right)
    agree = int((table[:, 0] == table[:, 1]).sum())
    return Assessment(
        num_items=len(items), num_reference=len(both),
        num_disagreed=sum(a is not None and b is not None and a != b for a, b in zip(*ratings, strict=True)),
        num_open=sum(a is None or b is None for a, b in zip(*ratings, strict=True)),
        alpha=krippendorff_alpha(ratings), same_option=wilson(sum(a == b for a, b in answered), len(answered)),
        sensitivity=percentiles(value[0], np.asarray([d[0] for d in draws])),
        specificity=percentiles(value[1], np.asarray([d[1] for d in draws])),
        agreement=wilson(agree, len(both)), draws=tuple(draws),
    )  # fmt: skip


def _rates(table_N2: np.ndarray, share_right: float) -> tuple[float, float]:
    """(sensitivity, specificity) of rows (judged right, is right), weighted back from the balanced sample."""
    judged, is_right = table_N2[:, 0], table_N2[:, 1]
    if not judged.any() or judged.all():
        return float("nan"), float("nan")
    right_if_right, right_if_wrong = is_right[judged].mean(), is_right[~judged].mean()
    true_right = share_right * right_if_right + (1 - share_right) * right_if_wrong
    sensitivity = share_right * right_if_right / true_right if true_right > 0 else float("nan")
    specificity = (1 - share_right) * (1 - right_if_wrong) / (1 - true_right) if true_right < 1 else float("nan")
    return float(sensitivity), float(specificity)


def _given(item: Item, answers: Mapping[str, str]) -> bool:
    return answers.get(item.item_id, UNSURE) not in ("", UNSURE)


def _right(item: Item, answers: Mapping[str, str]) -> bool | None:
    return answers[item.item_id] in item.question.expected if _given(item, answers) else None


def _check(items: Sequence[Item], answers: Mapping[str, str]) -> None:
    options = {i.item_id: {*i.question.option_ids, "", UNSURE} for i in items}
    for item_id, answer in answers.items():
        if item_id not in options:
            raise ValueError(f"the sheet answers {item_id}, which is no item of this adjudication")
        if answer not in options[item_id]:
            wanted = ", ".join(sorted(options[item_id] - {""}))
            raise ValueError(f"the item {item_id} is answered with {answer!r}; it takes {wanted}")


def corrected(apparent: Interval, found: Assessment) -> Interval:
    """What a score would be with a judge that makes no error (Rogan and Gladen); nan for a judge no better than chance.

    The interval carries both the adjudication's uncertainty and, as a normal error, that of the apparent score.
    """
    value = _rogan_gladen(apparent.value, found.sensitivity.value, found.specificity.value)
    spread = 0.0 if math.isnan(apparent.low) else (apparent.high - apparent.low) / (2 * 1.96)
    noise = np.random.default_rng(0).normal(0.0, spread, len(found.draws))
    draws = [_rogan_gladen(apparent.value + e, *rates) for e, rates in zip(noise, found.draws, strict=True)]
    return percentiles(value, np.asarray(draws))


def _rogan_gladen(apparent: float, sensitivity: float, specificity: float) -> float:
    youden = sensitivity + specificity - 1
    if math.isnan(youden) or youden <= 0:
        return float("nan")
    return min(1.0, max(0.0, (apparent + specificity - 1) / youden))
