"""The page of a loop: the development score over rounds, what curation left, and the one reading of the test.

html = loop_report("loops/one", state)           # state: OUT/loop.json (ray_jobs.loop_state)

One HTML file without scripts that loads nothing. Every score stands with its interval; what a reader has to know to
read the figures rightly stands above them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from meddam_core.judging.statistics import Interval
from meddam_core.reports.leaderboard_report import bounds, points
from meddam_core.reports.page import NOT_FOR_DIAGNOSIS, environment
from meddam_core.reports.round_curve import Series, round_curve_svg

ARM_NAMES = {"curated": "curated", "uncurated": "not curated", "labelled": "labelled only"}
ARM_MEANING = {
    "curated": "learns from the pseudo-labels that curation left",
    "uncurated": "learns from every finished caption: the control",
    "labelled": "trains as long, without pseudo-labels: the control for training alone",
}
FILTERS = {
    "best_of_samples": "another sample was better", "verdicts": "verdicts", "agreement": "agreement",
    "confidence": "confidence", "length": "length", "hedging": "hedging", "repetition": "repetition",
    "status": "no finished caption", "same_text": "same words too often", "balance": "balance",
    "patient": "one patient", "pairwise": "lost the pairwise choice",
}  # fmt: skip


def loop_report(title: str, state: Mapping[str, Any]) -> str:
    """The whole page as a string of HTML."""
    arms = [_arm(a) for a in state["arms"]]
    return environment().get_template("loop_report.html.j2").render(
        title=title, state=state, arms=arms, curve=_curve(state), yields=_yields(state), test=_test(state),
        verdict=_verdict(state), facts=_facts(state), not_for_diagnosis=NOT_FOR_DIAGNOSIS,
    )  # fmt: skip


def model_name(key: str) -> str:
    """`curated-round-2` in words."""
    arm, _, number = key.rpartition("-round-")
    if not arm:
        return {"start": "first model", "majority": "majority caption", "truth": "truth-made caption",
                "blank": "blank", "shuffled": "shuffled"}.get(key, key)  # fmt: skip
    return f"{ARM_NAMES.get(arm, arm)}, round {number}"


def _finished(arm: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [r for r in arm["rounds"] if r["development"] is not None]


def _arm(arm: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "key": arm["name"], "name": ARM_NAMES.get(arm["name"], arm["name"]),
        "meaning": ARM_MEANING.get(arm["name"], ""), "ended": arm["ended"], "chosen": arm["chosen"],
        "rounds": [
            {**r, "score": _text(r["development"]), "bounds": _bounds(r["development"])} for r in _finished(arm)
        ],
    }  # fmt: skip


def _interval(score: Mapping[str, Any]) -> Interval:
    nan = float("nan")
    low, high = score["low"], score["high"]
    return Interval(score["value"], nan if low is None else low, nan if high is None else high)


def _text(score: Mapping[str, Any] | None, signed: bool = False) -> str:
    return "" if score is None else points(score["value"], signed)


def _bounds(score: Mapping[str, Any] | None, signed: bool = False) -> str:
    return "" if score is None else bounds(_interval(score), signed)


def _curve(state: Mapping[str, Any]) -> str | None:
    """Every arm from the first model on; None while there is nothing to draw."""
    if state["start"] is None:
        return None
    series = []
    for arm in state["arms"]:
        scores = [state["start"], *(r["development"] for r in _finished(arm))]
        shown = [tuple(None if s[k] is None else 100 * s[k] for k in ("value", "low", "high")) for s in scores]
        series.append(Series(arm["name"], ARM_NAMES.get(arm["name"], arm["name"]), shown, arm["chosen"]))  # type: ignore[arg-type]
    return round_curve_svg(series, y_label="development score", alt="Development score over rounds, by arm")


def _yields(state: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A stacked bar a round of an arm that curates: what was kept, and what each filter dropped."""
    found = []
    for arm in state["arms"]:
        for r in arm["rounds"]:
            if r["captions"] is None or not r["num_captions"]:
                continue
            dropped = sorted(r["dropped"].items(), key=lambda i: -i[1])
            parts = [(FILTERS.get(name, name), count, count / r["num_captions"]) for name, count in dropped]
            found.append(
                {"arm": ARM_NAMES.get(arm["name"], arm["name"]), "number": r["number"], "num": r["num_captions"],
                 "kept": r["num_kept"], "share": r["num_kept"] / r["num_captions"], "dropped": parts}
            )  # fmt: skip
    return found


def _test(state: Mapping[str, Any]) -> dict[str, Any] | None:
    test = state["test"]
    if test is None or not test["scores"]:
        return None
    chosen = {"start"} | {f"{a['name']}-round-{a['chosen']}" for a in state["arms"] if a["chosen"]}
    rows = [_row(name, score, chosen) for name, score in test["scores"].items() if name in test["models"]]
    rows.sort(key=lambda r: list(test["models"]).index(r["key"]))
    marks = [
        {"role": n, "name": model_name(n), "at": _percent(test["scores"][n]["value"])}
        for n in ("majority", "truth") if n in test["scores"]
    ]  # fmt: skip
    pairs = [_pair(p) for p in sorted(test["pairs"], key=lambda p: "start" not in (p["first"], p["second"]))]
    return {**test, "rows": rows, "marks": marks, "pairs": pairs}


def _row(name: str, score: Mapping[str, Any], chosen: set[str]) -> dict[str, Any]:
    low, high = (score[k] if score[k] is not None else score["value"] for k in ("low", "high"))
    return {
        "key": name, "name": model_name(name), "chosen": name in chosen and name != "start", "score": _text(score),
        "bounds": _bounds(score), "positive": "" if score["positive"] is None else points(score["positive"]),
        "negative": "" if score["negative"] is None else points(score["negative"]), "at": _percent(score["value"]),
        "low": _percent(low), "width": round(100 * (high - low), 2),
    }  # fmt: skip


def _percent(value: float) -> float:
    return round(100 * value, 2)


def _pair(pair: Mapping[str, Any]) -> dict[str, Any]:
    """The difference from the first model where that is one of the two, else first less second."""
    first, second, difference = pair["first"], pair["second"], dict(pair["difference"])
    if first == "start":
        first, second = second, first
        low, high = difference["low"], difference["high"]
        flipped = {"low": None if high is None else -high, "high": None if low is None else -low}
        difference = {**difference, "value": -difference["value"], **flipped}
    return {
        "first": model_name(first), "second": model_name(second), "difference": _text(difference, True),
        "bounds": _bounds(difference, True), "p": "< 0.01" if pair["p"] < 0.01 else f"{pair['p']:.2f}",
        "significant": pair["p"] < 0.05, "gain": difference["value"],
    }  # fmt: skip


def _verdict(state: Mapping[str, Any]) -> list[str]:
    """What came out, in sentences."""
    test = state["test"]
    if test is None or not test["scores"]:
        return ["The test has not been read yet." if state["state"] != "incomplete" else "The loop is not finished."]
    said, start = [], test["scores"]["start"]
    said.append(f"The first model scores {_text(start)} ({_bounds(start)}) on the locked test.")
    for arm in state["arms"]:
        name = ARM_NAMES.get(arm["name"], arm["name"])
        if not arm["chosen"]:
            said.append(f"{name.capitalize()}: no round was better than the first model on development.")
            continue
        key = f"{arm['name']}-round-{arm['chosen']}"
        score = test["scores"][key]
        pair = next((_pair(p) for p in test["pairs"] if {p["first"], p["second"]} == {key, "start"}), None)
        told = "" if pair is None else (
            f", {pair['difference']} points against the first model ({pair['bounds']}), "
            + ("a difference that holds" if pair["significant"] else "which cannot be told from chance")
        )  # fmt: skip
        said.append(f"{name.capitalize()}: round {arm['chosen']} scores {_text(score)} ({_bounds(score)}){told}.")
    return said


def _facts(state: Mapping[str, Any]) -> list[tuple[str, str]]:
    config = state["config"]
    images = ", ".join(f"{name} {num:,}" for name, num in state["num_images"].items())
    rows = [("Images", images), ("Curating judge, and of development", state["judge"])]
    if state["test"] is not None:
        rows += [("Judge of the test", state["test"]["judge"]), ("Test opened", state["test"]["opened_at"])]
    for name in ("model", "prompt", "max_rounds", "patience", "min_gain", "restart", "repeat_labelled", "pool_labels",
                 "seed"):  # fmt: skip
        rows.append((name.replace("_", " "), str(config[name])))
    for name in ("start", "caption", "judge", "curate", "finetune", "test_judge"):
        if config[name]:
            rows.append((name.replace("_", " "), ", ".join(f"{k} {_plain(v)}" for k, v in config[name].items())))
    return rows


def _plain(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, Sequence) and not isinstance(value, str) else str(value)
