"""The language model equals transformers' LlamaForCausalLM."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from meddam_core.dam.checkpoint import random_dam
from meddam_core.dam.llm import Llama
from tests.meddam_core.dam.small import CONFIG


def _theirs(llm: Llama) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    c = llm.config
    config = LlamaConfig(
        vocab_size=llm.vocab_size, hidden_size=c.hidden_size, intermediate_size=c.intermediate_size,
        num_hidden_layers=c.num_layers, num_attention_heads=c.num_heads, num_key_value_heads=c.num_kv_heads,
        rms_norm_eps=c.rms_norm_eps, rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
        max_position_embeddings=c.max_position_embeddings, tie_word_embeddings=c.tie_word_embeddings,
        attn_implementation="eager",
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.load_state_dict(llm.state_dict())
    return model


@pytest.mark.parametrize(
    ("heads", "kv_heads", "theta", "eps", "tied"),
    [(6, 2, 10000.0, 1e-5, False), (6, 6, 5e5, 1e-6, True), (4, 1, 1e4, 1e-2, False), (3, 3, 100.0, 1e-5, False)],
)
def test_equal_logits_at_every_position(heads: int, kv_heads: int, theta: float, eps: float, tied: bool) -> None:
    torch.manual_seed(0)
    llm_config = replace(
        CONFIG.llm, num_heads=heads, num_kv_heads=kv_heads, rope_theta=theta, rms_norm_eps=eps, tie_word_embeddings=tied
    )
    llm = random_dam(replace(CONFIG, llm=llm_config), seed=1).llm
    embeds_BLD = torch.randn(2, 70, CONFIG.llm.hidden_size)
    with torch.inference_mode():
        hidden, _ = llm(embeds_BLD)
        ours, theirs = llm.logits(hidden), _theirs(llm)(inputs_embeds=embeds_BLD).logits
    assert (ours - theirs).abs().max() < 2e-4  # logits reach about 10
    assert torch.equal(ours.argmax(-1), theirs.argmax(-1))


def test_a_cache_changes_nothing() -> None:
    torch.manual_seed(0)
    llm = random_dam(CONFIG, seed=1).llm
    embeds = torch.randn(2, 40, CONFIG.llm.hidden_size)
    with torch.inference_mode():
        whole, _ = llm(embeds)
        head, past = llm(embeds[:, :25])
        middle, past = llm(embeds[:, 25:39], past)
        last, _ = llm(embeds[:, 39:], past)
    assert torch.allclose(torch.cat((head, middle, last), dim=1), whole, atol=1e-5)


def test_padding_on_the_right_is_never_seen() -> None:
    torch.manual_seed(0)
    llm = random_dam(CONFIG, seed=1).llm
    embeds = torch.randn(1, 30, CONFIG.llm.hidden_size)
    with torch.inference_mode():
        alone, _ = llm(embeds)
        padded, _ = llm(torch.cat((embeds, torch.full((1, 9, CONFIG.llm.hidden_size), 1e3)), dim=1))
    assert torch.allclose(padded[:, :30], alone, atol=1e-5)


def test_gradients_flow() -> None:
    llm = random_dam(CONFIG, seed=1).llm
    hidden, _ = llm(torch.randn(1, 5, CONFIG.llm.hidden_size))
    llm.logits(hidden).logsumexp(-1).sum().backward()
    assert all(
        p.grad is not None and torch.isfinite(p.grad).all() for n, p in llm.named_parameters() if "embed" not in n
    )
