"""Compare every stage of a DAM with activations saved from the reference.

    meddam verify --checkpoint DIR --oracle DIR [--json]

An oracle folder holds `cases/*.npz` and maybe a checkpoint; tests/data/oracle/dam_tiny/README.md names the arrays.
The pixels go through the whole network; each stage is compared as it passes. The vision side's attention runs in its
plain form here (matrix product, softmax, matrix product), as in the reference, so that what is measured is the network
and not the rounding of a kernel. Tolerances are the README's; tokens are found by feeding the oracle's own
tokens, so one difference does not hide what comes after it.

Invariant: a stage the oracle file holds is either compared or listed as a failure; nothing is left out silently.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.attention import SDPBackend, sdpa_kernel

from meddam_core.dam.checkpoint import load_dam
from meddam_core.dam.model import Dam
from meddam_core.dam.tokens import conversation
from meddam_core.focal import focal_box, focal_views

Case = Mapping[str, NDArray[Any]]

TOLERANCES = {
    "focal_box_xyxy": 0.0,
    "input8": 0.0,
    "is_cimage": 0.0,
    "embed_global": 2e-4,
    "embed_focal": 2e-4,
    "vis_global": 2e-4,
    "ctx_out": 2e-4,
    "proj_in": 2e-4,
    "proj_out": 1e-4,
    "prompt": 0.0,
    "input_ids": 0.0,
    "inputs_embeds_rows": 1e-4,
    "prefill_logits": 1e-4,
    "tokens": 0.0,
    "step_logits": 2e-4,  # the reference's own float32 rounding reaches 7e-5 here, against float64
    "text": 0.0,
}
"""Largest absolute difference by stage, in the order of the network; 0 means equal."""
_INPUTS = {"image", "mask", "images", "masks", "query", "top2_gap"}


@dataclass(frozen=True, slots=True, kw_only=True)
class StageCheck:
    """One stage of one case. `difference` is the largest absolute one, infinite if shapes differ."""

    case: str
    stage: str
    difference: float
    tolerance: float
    detail: str = ""

    @property
    def passed(self) -> bool:
        return self.difference <= self.tolerance


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """What came of a comparison."""

    checkpoint: str
    oracle: str
    checks: list[StageCheck] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return bool(self.checks) and all(check.passed for check in self.checks)

    def to_json(self) -> str:
        """The verdict, and each check with its own."""
        checks = [{**asdict(c), "difference": _finite(c.difference), "passed": c.passed} for c in self.checks]
        document = {"passed": self.passed, "checkpoint": self.checkpoint, "oracle": self.oracle, "checks": checks}
        return json.dumps(document, indent=1)


def _finite(value: float) -> float | str:
    return value if np.isfinite(value) else "inf"


def verify(checkpoint: str | Path | None, oracle: str | Path) -> Verification:
    """Load a checkpoint in float32 on the CPU and compare it with an oracle folder.

    `checkpoint` None means ORACLE/checkpoint. Raises ValueError if either folder is not what it should be.
    """
    oracle = Path(oracle)
    checkpoint = oracle / "checkpoint" if checkpoint is None else Path(checkpoint)
    files = sorted((oracle / "cases").glob("*.npz"))
    if not files:
        raise ValueError(f"{oracle} holds no cases/*.npz; see tests/data/oracle/dam_tiny/README.md for the format")
    dam = load_dam(checkpoint)
    result = Verification(checkpoint=str(checkpoint), oracle=str(oracle))
    tokenizer_cases = oracle / "tokenizer_cases.json"
    if tokenizer_cases.is_file():
        result.checks.extend(_check_tokenizer(dam, json.loads(tokenizer_cases.read_text(encoding="utf-8"))))
    for file in files:
        with np.load(file, allow_pickle=False) as arrays:
            result.checks.extend(verify_case(dam, file.stem, dict(arrays)))
    return result


def verify_case(dam: Dam, name: str, case: Case) -> list[StageCheck]:
    """Every stage of one case, as its .npz holds it."""
    dam.requires_grad_(False)  # and not inference mode: torch's own activations, rounded as the reference's are
    with sdpa_kernel(SDPBackend.MATH):
        ours = _vision(dam, case)
    ours |= _language(dam, case, ours.get("proj_out"))
    checks = []
    for stage in case:
        if stage in _INPUTS:
            continue
        if stage not in TOLERANCES or stage not in ours:
            what = "is not a stage this version compares" if stage not in TOLERANCES else "needs arrays the file lacks"
            checks.append(StageCheck(case=name, stage=stage, difference=float("inf"), tolerance=0.0, detail=what))
            continue
        difference, detail = _difference(ours[stage], case[stage])
        tolerance = TOLERANCES[stage]
        checks.append(StageCheck(case=name, stage=stage, difference=difference, tolerance=tolerance, detail=detail))
    order = list(TOLERANCES)
    return sorted(checks, key=lambda c: order.index(c.stage) if c.stage in order else len(order))


def render_text(verification: Verification) -> str:
    """A table with one row a stage and one column a case, failures spelt out below, and the verdict."""
    cases = list(dict.fromkeys(c.case for c in verification.checks))
    stages = list(dict.fromkeys(c.stage for c in verification.checks))
    cells = {(c.case, c.stage): c for c in verification.checks}
    short = [case.split("_")[0] for case in cases]
    titles = short if len(set(short)) == len(cases) else cases
    widths = [max(9, len(title)) for title in titles]
    first = max(map(len, [*stages, "stage"]))
    lines = [
        f"{'stage':<{first}}  {'allowed':>8}  " + "  ".join(f"{t:>{w}}" for t, w in zip(titles, widths, strict=True))
    ]
    for stage in stages:
        row = [cells.get((case, stage)) for case in cases]
        allowed = next(c.tolerance for c in row if c is not None)
        shown = [_cell(c) for c in row]
        line = "  ".join(f"{s:>{w}}" for s, w in zip(shown, widths, strict=True))
        lines.append(f"{stage:<{first}}  {'equal' if allowed == 0 else format(allowed, '.0e'):>8}  {line}")
    failures = [c for c in verification.checks if not c.passed]
    lines += [f"FAILED {c.case} {c.stage}: {c.detail or f'differs by {c.difference:.3g}'}" for c in failures]
    total = len(verification.checks)
    verdict = "PASSED" if verification.passed else "FAILED"
    lines.append(f"{verdict}: {total - len(failures)} of {total} comparisons hold, {verification.checkpoint}")
    return "\n".join(lines)


def _cell(check: StageCheck | None) -> str:
    if check is None:
        return ""
    if check.difference == 0:
        return "="
    return f"{check.difference:.1e}" + ("" if check.passed else " !")


def _vision(dam: Dam, case: Case) -> dict[str, Any]:
    images = case["images"] if "images" in case else case["image"][None] if "image" in case else None
    masks = case["masks"] if "masks" in case else case["mask"][None] if "mask" in case else None
    if images is None or masks is None:
        return {}
    size = dam.config.view_size
    views = np.stack([focal_views(image, mask, size) for image, mask in zip(images, masks, strict=True)])
    stages = dam.vision_stages(torch.from_numpy(views))
    ours: dict[str, Any] = {name: getattr(stages, name).numpy() for name in TOLERANCES if hasattr(stages, name)}
    ours["focal_box_xyxy"] = np.array([focal_box(mask) for mask in masks])
    return ours


def _language(dam: Dam, case: Case, proj_out: NDArray[Any] | None) -> dict[str, Any]:
    if "query" not in case or proj_out is None:
        return {}
    query = str(case["query"])
    input_ids = dam.tokenizer.encode_prompt(query)
    ours: dict[str, Any] = {"prompt": conversation(query), "input_ids": np.array(input_ids)}
    rows = dam.merge(input_ids, torch.from_numpy(proj_out))
    hidden, past = dam.llm(rows[None])
    logits = [dam.llm.logits(hidden[0, -1])]
    ours |= {"inputs_embeds_rows": rows.numpy(), "prefill_logits": logits[0].numpy()}
    if "tokens" not in case:
        return ours
    tokens = [int(t) for t in case["tokens"]]
    for token in tokens[:-1]:
        hidden, past = dam.llm(dam.llm.embed(torch.tensor([[token]])), past)
        logits.append(dam.llm.logits(hidden[0, -1]))
    chosen = [int(step.argmax()) for step in logits]
    ours |= {
        "tokens": np.array(chosen),
        "step_logits": torch.stack(logits).numpy(),
        "text": dam.tokenizer.caption(chosen),
    }
    return ours


def _difference(ours: Any, theirs: NDArray[Any]) -> tuple[float, str]:
    """Largest absolute difference, and what to say if there is one."""
    if isinstance(ours, str):
        same = ours == str(theirs)
        return (0.0, "") if same else (float("inf"), f"{ours!r} is not {str(theirs)!r}")
    if ours.shape != theirs.shape:
        return float("inf"), f"shape {list(ours.shape)} is not {list(theirs.shape)}"
    if not ours.size:
        return 0.0, ""
    gaps = np.abs(ours.astype(np.float64) - theirs.astype(np.float64))
    worst = float(gaps.max())
    return (worst, "") if np.isfinite(worst) else (float("inf"), "not finite")


def _check_tokenizer(dam: Dam, cases: list[dict[str, Any]]) -> list[StageCheck]:
    """Queries and raw strings against their ids."""
    encode: Callable[[str], list[int]]
    wrong = []
    for case in cases:
        encode = dam.tokenizer.encode_prompt if "query" in case else dam.tokenizer.encode
        text = case["query"] if "query" in case else case["raw"]
        ids = encode(text)
        if ids != case["input_ids"] or ("decoded" in case and dam.tokenizer.decode(ids) != case["decoded"]):
            wrong.append(text)
    detail = f"{len(wrong)} of {len(cases)} texts differ, first {wrong[0]!r}" if wrong else ""
    difference = float(len(wrong))
    return [StageCheck(case="tokenizer", stage="input_ids", difference=difference, tolerance=0.0, detail=detail)]
