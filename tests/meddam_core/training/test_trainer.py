"""Steps equal those of a plain PyTorch loop; states, LoRA and written checkpoints keep what they must."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from meddam_core.dam.checkpoint import load_dam, save_dam
from meddam_core.dam.model import Dam
from meddam_core.dam.tokens import IMAGE_TOKEN_ID
from meddam_core.training.adapt import adapt, dead_modules, merge_lora
from meddam_core.training.batch import IGNORED, Batch
from meddam_core.training.loss import CaptionLoss, caption_loss
from meddam_core.training.optim import Schedule
from meddam_core.training.trainer import Settings, Trainer
from tests.meddam_core.training.made import collator, examples, small_dam
from tests.meddam_core.training.plain_loop import RATE, plain_losses

SCHEDULE = Schedule(learning_rate=RATE, warmup_steps=4, max_steps=20)


def batches(dam: Dam, count: int, size: int = 4) -> list[Batch]:
    shown = examples(count * size, dam.config.view_size)
    collate = collator(dam)
    return [collate(shown[i * size : (i + 1) * size], 0) for i in range(count)]


def test_twenty_steps_equal_a_plain_loop() -> None:
    dam, reference = small_dam(), small_dam()
    for model in (dam, reference):
        adapt(model, "full")
    given = batches(dam, 40, size=2)
    trainer = Trainer(dam, Settings(schedule=SCHEDULE))
    found = [trainer.train_step(given[2 * i : 2 * i + 2]) for i in range(20)]
    assert found == pytest.approx(plain_losses(reference, given, 20), abs=1e-4)
    assert found[-1] < found[0] - 0.5


def test_a_state_goes_on_as_it_would_have() -> None:
    whole = Trainer(_adapted("full"), Settings(schedule=SCHEDULE))
    given = batches(whole.dam, 8, size=2)
    expected = [whole.train_step([b]) for b in given]
    first = Trainer(_adapted("full"), Settings(schedule=SCHEDULE))
    found = [first.train_step([b]) for b in given[:4]]
    second = Trainer(_adapted("full"), Settings(schedule=SCHEDULE))
    second.load_state(first.state())
    assert second.step == 4
    found += [second.train_step([b]) for b in given[4:]]
    assert found == expected


def test_a_state_of_other_weights_is_refused() -> None:
    full, projector = _adapted("full"), _adapted("projector")
    state = Trainer(full, Settings(schedule=SCHEDULE)).state()
    with pytest.raises(ValueError, match="trains other weights"):
        Trainer(projector, Settings(schedule=SCHEDULE)).load_state(state)


def _adapted(mode: str) -> Dam:
    torch.manual_seed(0)
    dam = small_dam()
    adapt(dam, mode)  # type: ignore[arg-type]
    return dam


def test_projector_training_leaves_the_rest_alone() -> None:
    dam, before = _adapted("projector"), small_dam()
    trainer = Trainer(dam, Settings(schedule=SCHEDULE))
    trainer.train_step(batches(dam, 1))
    moved = {n.split(".")[0] for (n, p), (_, q) in zip(dam.named_parameters(), before.named_parameters(), strict=True)
             if not torch.equal(p, q)}  # fmt: skip
    assert moved == {"mm_projector", "context_provider"}


def test_dead_weights_leave_as_they_came() -> None:
    dam, before = _adapted("full"), small_dam()
    Trainer(dam, Settings(schedule=SCHEDULE)).train_step(batches(dam, 1))
    for module, old in zip(dead_modules(dam), dead_modules(before), strict=True):
        for new, was in zip(module.parameters(), old.parameters(), strict=True):
            assert torch.equal(new, was)


def test_lora_starts_as_no_change_and_merges_into_the_same_captions() -> None:
    dam, plain = _adapted("lora"), small_dam()
    batch = batches(dam, 1)[0]
    assert float(caption_loss(dam, batch)) == pytest.approx(float(caption_loss(plain, batch)), abs=1e-4)
    trainer = Trainer(dam, Settings(schedule=SCHEDULE))
    for _ in range(3):
        trainer.train_step([batch])
    unmerged = [_caption(dam, e) for e in examples(3, dam.config.view_size)]
    merge_lora(dam)
    assert not any("lora" in n for n, _ in dam.named_parameters())
    assert [_caption(dam, e) for e in examples(3, dam.config.view_size)] == unmerged


def _caption(dam: Dam, example: object) -> list[int]:
    """Greedy ids by the plain forward pass, which LoRA's modules take part in."""
    collate = collator(dam)
    batch = collate([example], 0)  # type: ignore[list-item]
    given = int((batch.targets_BL[0] == IGNORED).nonzero()[0]) if batch.targets_BL[0, 0] == IGNORED else 0
    given = int((batch.targets_BL[0] != IGNORED).nonzero()[0]) + 1
    ids = batch.ids_BL[:, :given]
    found: list[int] = []
    with torch.inference_mode():
        tokens = dam.encode(batch.views_B8SS)
        for _ in range(12):
            rows = dam.llm.embed(ids.clamp(min=0))
            rows = rows.masked_scatter((ids == IMAGE_TOKEN_ID)[..., None], tokens)
            hidden, _past = dam.llm(rows)
            found.append(int(dam.llm.logits(hidden[:, -1]).argmax()))
            ids = torch.cat([ids, torch.tensor([[found[-1]]])], dim=1)
    return found


def test_gradients_flow_through_gates_that_start_at_zero() -> None:
    dam = _adapted("full")
    with torch.no_grad():
        for name, parameter in dam.named_parameters():
            if name.endswith("_factor"):
                parameter.zero_()
    CaptionLoss(dam)(batches(dam, 1)[0]).backward()
    used = dam.config.num_used_layers
    for adapter in list(dam.context_provider.adapters)[:used]:
        assert adapter.attn_factor.grad.abs() > 0
        assert adapter.cross_attn.q_proj.weight.grad.abs().sum() == 0  # nothing gets past a closed gate


def test_recomputing_layers_changes_nothing() -> None:
    losses = []
    for checkpointing in (False, True):
        trainer = Trainer(_adapted("full"), Settings(schedule=SCHEDULE, checkpointing=checkpointing))
        given = batches(trainer.dam, 3, size=2)
        losses.append([trainer.train_step([b]) for b in given])
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def test_what_is_written_is_what_was_trained(tmp_path: Path) -> None:
    trainer = Trainer(_adapted("full"), Settings(schedule=SCHEDULE))
    batch = batches(trainer.dam, 1)[0]
    trainer.train_step([batch])
    before = trainer.dam.eval().vision_stages(batch.views_B8SS)
    loss = float(caption_loss(trainer.dam, batch))
    save_dam(trainer.dam, tmp_path)
    loaded = load_dam(tmp_path)
    after = loaded.vision_stages(batch.views_B8SS)
    for stage in ("embed_global", "vis_global", "ctx_out", "proj_out"):
        assert torch.equal(getattr(before, stage), getattr(after, stage)), stage
    assert float(caption_loss(loaded, batch)) == loss


def test_a_diverging_step_is_not_taken() -> None:
    dam = _adapted("full")
    trainer = Trainer(dam, Settings(schedule=SCHEDULE))
    with torch.no_grad():
        dam.llm.model.norm.weight.fill_(float("nan"))
    before = dam.llm.lm_head.weight.clone()
    with pytest.raises(FloatingPointError, match="lower the learning rate"):
        trainer.train_step(batches(dam, 1))
    assert torch.equal(before, dam.llm.lm_head.weight)
