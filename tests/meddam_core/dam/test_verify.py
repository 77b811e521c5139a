"""`verify`: equal where it should be, and unequal where something is wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from meddam_core.dam.checkpoint import load_dam, save_dam
from meddam_core.dam.model import Dam
from meddam_core.dam.verify import TOLERANCES, Verification, render_text, verify, verify_case
from meddam_core.focal import focal_box, focal_views
from tests.meddam_core.dam.small import CHECKPOINT, ORACLE, QUERY, small_config, small_dam


@pytest.fixture(scope="module")
def verification() -> Verification:
    return verify(CHECKPOINT, ORACLE)


def test_all_cases_of_the_oracle(verification: Verification) -> None:
    failures = [c for c in verification.checks if not c.passed]
    assert not failures and verification.passed
    cases = {c.case for c in verification.checks if c.case != "tokenizer"}
    assert len(cases) == 8
    for case in cases:
        assert {c.stage for c in verification.checks if c.case == case} == set(TOLERANCES)
    worst = {c.stage: max(d.difference for d in verification.checks if d.stage == c.stage) for c in verification.checks}
    assert worst["input8"] == 0 and worst["prefill_logits"] < 1e-4


def test_the_table_and_the_json_say_the_same(verification: Verification) -> None:
    table = render_text(verification)
    assert table.splitlines()[-1].startswith("PASSED: ") and "prefill_logits" in table
    document = json.loads(verification.to_json())
    assert document["passed"] is True and len(document["checks"]) == len(verification.checks)


def _halve_gates(dam: Dam) -> None:
    for name, parameter in dam.named_parameters():
        if name.endswith("_factor"):
            parameter.data *= 0.98


def _swap_projector(dam: Dam) -> None:
    dam.mm_projector.layers[3] = torch.nn.GELU(approximate="tanh")


def _shift_position(dam: Dam) -> None:
    table = dam.vision_tower.vision_model.embeddings.position_embedding.weight
    table.data[3, 5] += 1e-2


@pytest.mark.parametrize(
    ("spoil", "first_wrong"),
    [(_halve_gates, "ctx_out"), (_swap_projector, "proj_out"), (_shift_position, "embed_global")],
)
def test_a_mistake_shows_at_its_stage(spoil: Callable[[Dam], None], first_wrong: str) -> None:
    dam = load_dam(CHECKPOINT)
    spoil(dam)
    with np.load(ORACLE / "cases" / "c0_ellipse_640x480.npz") as arrays:
        checks = verify_case(dam, "c0", dict(arrays))
    assert next(c.stage for c in checks if not c.passed) == first_wrong
    text = render_text(Verification(checkpoint="x", oracle="y", checks=checks))
    assert f"FAILED c0 {first_wrong}" in text and text.splitlines()[-1].startswith("FAILED")


def test_a_wrong_token_and_an_unknown_stage_fail() -> None:
    with np.load(ORACLE / "cases" / "c2_tiny_blob_60x40.npz") as arrays:
        case: dict[str, Any] = {**arrays, "new_stage": np.zeros(3), "focal_box_xyxy": arrays["focal_box_xyxy"] + 1}
    case["tokens"] = case["tokens"].copy()
    case["tokens"][-1] += 1
    checks = {c.stage: c for c in verify_case(load_dam(CHECKPOINT), "c2", case)}
    assert not checks["tokens"].passed and not checks["new_stage"].passed and not checks["focal_box_xyxy"].passed
    assert "not a stage" in checks["new_stage"].detail
    assert checks["prefill_logits"].passed


def _write_case(dam: Dam, file: Path, seed: int) -> None:
    """An oracle case from our own network, in float64 so that it is not the same computation."""
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (90 + seed, 200, 3), dtype=np.uint8)
    mask = np.zeros(image.shape[:2], np.uint8)
    mask[20:50, 60:130] = 255
    views = torch.from_numpy(focal_views(image, mask, dam.config.view_size))[None]
    double = dam.double()
    with torch.inference_mode():
        stages = double.vision_stages(views)
        ids = dam.tokenizer.encode_prompt(QUERY)
        rows = double.merge(ids, stages.proj_out)
        tokens, logits, embeds = [], [], rows
        for _ in range(6):
            logits.append(double.llm.logits(double.llm(embeds[None])[0][0, -1]))
            tokens.append(int(logits[-1].argmax()))
            embeds = torch.cat((embeds, double.llm.embed(torch.tensor(tokens[-1:]))))
    arrays = {name: getattr(stages, name).numpy() for name in TOLERANCES if hasattr(stages, name)}
    np.savez(
        file, **arrays | {"image": image, "mask": mask, "query": np.array(QUERY), "input_ids": np.array(ids)},
        focal_box_xyxy=np.array([focal_box(mask)]), inputs_embeds_rows=rows.numpy(), tokens=np.array(tokens),
        prefill_logits=logits[0].numpy(), step_logits=torch.stack(logits).numpy(),
        text=np.array(dam.tokenizer.caption(tokens)),
    )  # fmt: skip


def test_another_oracle_with_an_odd_grid_and_grouped_queries(tmp_path: Path) -> None:
    """Other dimensions, the checkpoint inside the oracle folder, no tokenizer cases."""
    config = small_config(context__treat_image_as_cimage=True)
    save_dam(small_dam(config, seed=3), tmp_path / "checkpoint")
    (tmp_path / "cases").mkdir()
    for seed in (0, 1):
        _write_case(small_dam(config, seed=3), tmp_path / "cases" / f"d{seed}.npz", seed)
    result = verify(None, tmp_path)
    exact = ("input8", "focal_box_xyxy")
    assert result.passed, render_text(result)
    assert {c.case for c in result.checks} == {"d0", "d1"}
    assert all(c.difference < 1e-6 for c in result.checks if c.stage in exact)

    save_dam(small_dam(config, seed=4), tmp_path / "checkpoint")
    assert not verify(None, tmp_path).passed


def test_folders_that_are_no_oracle(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no cases"):
        verify(CHECKPOINT, tmp_path)
    shutil.copytree(ORACLE / "cases", tmp_path / "cases")
    with pytest.raises(ValueError, match="not a DAM checkpoint folder"):
        verify(None, tmp_path)
