"""kernels="cuda" without a GPU: everything but the kernels themselves, which stand-ins replace by their contracts."""

from __future__ import annotations

import pytest
import torch

from meddam_core.dam.model import Dam
from meddam_core.engines.base import Sampling
from meddam_core.engines.mii import engine as engine_module
from meddam_core.engines.mii.engine import MiiEngine
from tests.meddam_core.engines.mii import compiled_ops
from tests.meddam_core.engines.mii.conftest import VIDEO, grouped_dam, make_request


def half_dam() -> Dam:
    """bfloat16, heads of 64 in groups of 2, RMSNorm epsilon 1e-6."""
    return grouped_dam(head_dim=64, heads=4, kv_heads=2, layers=2).to(torch.bfloat16)


@pytest.fixture
def fake_ops(monkeypatch: pytest.MonkeyPatch) -> compiled_ops.Ops:
    fake = compiled_ops.install(monkeypatch)
    monkeypatch.setattr(engine_module, "check_supported", lambda *arguments: None)
    return fake


def test_logits_agree_through_deepspeeds_own_modules(fake_ops: compiled_ops.Ops) -> None:
    engine = MiiEngine(half_dam(), kernels="cuda", max_sequences=4, token_budget=128, num_blocks=24)
    assert engine.kernels == "cuda"
    assert engine.logit_difference is not None
    assert engine.logit_difference < 0.03
    # the model's own epsilon, not FastGen's 1e-5
    assert {round(e, 9) for e in fake_ops.epsilons} == {1e-6}
    requests = [make_request(i, Sampling(max_new_tokens=6)) for i in range(5)]
    requests.append(make_request(9, Sampling(max_new_tokens=4), VIDEO, num_views=3))
    results = engine.generate(requests)
    assert [len(r.token_ids) for r in results] == [6] * 5 + [4]
    assert engine.scheduler.num_free_blocks == engine.num_blocks
    engine.close()


def test_prompts_beside_decoding_sequences_do_not_overflow_the_list_of_atoms(fake_ops: compiled_ops.Ops) -> None:
    engine = MiiEngine(half_dam(), kernels="cuda", max_sequences=3, token_budget=512, startup_check=False)
    engine.generate([make_request(i, Sampling(max_new_tokens=2), VIDEO, num_views=3) for i in range(3)])
    assert fake_ops.max_atoms > 3  # FastGen's own list would have had room for one a sequence
    assert fake_ops.max_atoms <= fake_ops.room_for_atoms
    with pytest.raises(ValueError, match="need at least"):
        MiiEngine(half_dam(), kernels="cuda", max_sequences=64, token_budget=64, startup_check=False)


def test_a_wrong_kernel_is_found_before_serving(fake_ops: compiled_ops.Ops, monkeypatch: pytest.MonkeyPatch) -> None:
    right = fake_ops.flash_attn_by_atoms

    def wrong(out: torch.Tensor, *arguments: torch.Tensor) -> None:
        right(out, *arguments)  # type: ignore[arg-type]
        out.mul_(1.4)

    monkeypatch.setattr(fake_ops, "flash_attn_by_atoms", wrong)
    with pytest.raises(ValueError, match="start-up check failed"):
        MiiEngine(half_dam(), kernels="cuda", max_sequences=4, token_budget=128)
