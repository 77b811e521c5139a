"""The decoder with its static cache computes what the plain language model computes."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from meddam_core.engines.decoder import GROUP, LENGTH_STEP, Decoder
from tests.meddam_core.dam.small import CONFIG, small_config, small_dam


def _prompts(num: int, seed: int = 0) -> tuple[list[list[int]], list[list[int]], list[torch.Tensor]]:
    rng = torch.Generator().manual_seed(seed)
    ids, positions, rows = [], [], []
    for _ in range(num):
        length = int(torch.randint(49, 65, (), generator=rng))  # all round up to 64
        ids.append(torch.randint(3, 1000, (length,), generator=rng).tolist())
        positions.append([5, 6, 7, length - 2])
        rows.append(torch.randn(4, CONFIG.llm.hidden_size, generator=rng))
    return ids, positions, rows


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_logits_of_the_plain_model(kv_heads: int) -> None:
    """Prefill, several steps, and a row that moves to another slot on the way."""
    llm = small_dam(small_config(llm__num_kv_heads=kv_heads)).llm
    decoder = Decoder(llm)
    decoder.reserve(5, 80)
    ids, positions, rows = _prompts(5)
    logits = decoder.prefill(ids, positions, rows, 0)
    with torch.inference_mode():
        embeds = [llm.embed(torch.tensor(row)) for row in ids]
        for i in range(5):
            embeds[i][positions[i]] = rows[i]
        for step in range(6):
            for i in range(len(embeds)):
                hidden, _ = llm(embeds[i][None])
                assert (llm.logits(hidden[0, -1]) - logits[i]).abs().max() < 2e-4
            if step == 3:
                assert decoder.remove(1, 5) == [(4, 1)]  # the last row continues in slot 1
                embeds[1] = embeds.pop()
                logits = torch.cat((logits[:1], logits[4:], logits[2:4]))
            tokens = logits.argmax(-1).tolist()
            embeds = [torch.cat((e, llm.embed(torch.tensor([t])))) for e, t in zip(embeds, tokens, strict=True)]
            logits = decoder.step(tokens)


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    """Bit for bit, with one row or forty, a long neighbour or none, a small cache or a large one."""
    llm = small_dam().llm
    ids, positions, rows = _prompts(40)
    decoder = Decoder(llm)
    decoder.reserve(40, 100)
    prefilled = decoder.prefill(ids, positions, rows, 0)
    stepped = decoder.step(list(range(40)))
    for start, stop, length in ((0, 1, 96), (7, 9, 400), (3, 20, 128)):
        other = Decoder(llm)
        other.reserve(stop - start, length)
        cut = slice(start, stop)
        assert torch.equal(other.prefill(ids[cut], positions[cut], rows[cut], 0), prefilled[cut])
        assert torch.equal(other.step(list(range(start, stop))), stepped[cut])


def test_gaps_are_closed_and_the_longest_rows_stay_in_front() -> None:
    """Removing rows of several groups leaves every other row's numbers as they were, long groups before short ones."""
    llm = small_dam().llm
    short = _prompts(50)
    long = _prompts(40, seed=1)
    long = [row + row[:40] for row in long[0]], long[1], long[2]
    ids = [*long[0], *short[0]]
    decoder, alone = Decoder(llm), Decoder(llm)
    for each in (decoder, alone):
        each.reserve(90, 160)
        each.prefill(*long, 0)
        each.prefill(*short, 40)
    active = list(range(90))
    for slot in (70, 38, 5, 0, 84, 33, 2, 1, 3):
        for source, target in decoder.remove(slot, len(active)):
            active[target] = active[source]
        active.pop()
        lengths = [len(ids[i]) for i in active]
        groups = [lengths[i : i + GROUP] for i in range(0, len(active), GROUP)]
        assert all(min(front) > max(back) - LENGTH_STEP for front, back in pairwise(groups))
    assert sum(i < 40 for i in active[:GROUP]) == GROUP, "the first group holds long rows only"
    assert len(set(active)) == 81
    assert torch.equal(decoder.step(active), alone.step(list(range(90)))[active])


def test_growing_keeps_what_is_cached() -> None:
    llm = small_dam().llm
    ids, positions, rows = _prompts(3)
    small, large = Decoder(llm), Decoder(llm)
    large.reserve(64, 300)
    small.reserve(3, 66)
    for decoder in (small, large):
        decoder.prefill(ids, positions, rows, 0)
    small.reserve(40, 200)
    assert (small.num_slots, small.length) == (48, 208)
    assert torch.equal(small.step([1, 2, 3]), large.step([1, 2, 3]))
    small.release()
    assert small.num_slots == 0


def test_the_fused_weights_are_the_models_own() -> None:
    """No second copy: the module's parameters look into the fused buffers."""
    llm = small_dam().llm
    before = {name: p.clone() for name, p in llm.named_parameters()}
    decoder = Decoder(llm)
    assert all(torch.equal(p, before[name]) for name, p in llm.named_parameters())
    attention = llm.layers()[0].self_attn
    storages = {p.weight.untyped_storage().data_ptr() for p in (attention.q_proj, attention.k_proj, attention.v_proj)}
    assert len(storages) == 1
    assert decoder.bytes_per_position == 2 * 2 * 2 * 8 * 4


def test_unmerged_adapters_are_not_left_out_silently() -> None:
    class Adapted(torch.nn.Linear):
        pass

    llm = small_dam().llm
    llm.layers()[1].mlp.up_proj = Adapted(48, 80, bias=False)
    with pytest.raises(ValueError, match=r"wrapped in \{'Adapted'\}; merge adapters"):
        Decoder(llm)
