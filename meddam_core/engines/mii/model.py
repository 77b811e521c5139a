"""Llama as FastGen builds it, with DAM's visual rows injected into the embeddings.

A prompt comes in with T placeholder tokens a view, so that FastGen's accounting of lengths and cache blocks is right.
In `_forward_embed`, rows that fall on placeholders are overwritten with the visual rows of their sequence, by position;
a prompt may be cut anywhere, and a sequence that starts again from 0 after a preemption finds its rows still there.

Axes: R rows of a ragged batch, D hidden size, H heads.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import deepspeed.comm as dist
import numpy as np
import torch
import torch.distributed
import torch.nn.functional as F
from deepspeed.accelerator import get_accelerator
from deepspeed.inference.v2.engine_v2 import InferenceEngineV2
from deepspeed.inference.v2.inference_utils import DtypeEnum
from deepspeed.inference.v2.model_implementations.llama_v2.model import Llama2InferenceModel
from deepspeed.inference.v2.model_implementations.llama_v2.policy import Llama2Policy
from deepspeed.inference.v2.modules.configs import RotateHalfConfig
from torch import Tensor, nn

from meddam_core.dam.config import LlmConfig
from meddam_core.engines.mii import torch_kernels
from meddam_core.engines.mii.tensor_parallel import TensorGroup
from meddam_core.engines.mii.torch_kernels import BLOCK_SIZE, SequenceState

FASTGEN_EPS = 1e-5
"""The epsilon that FastGen gives its RMSNorm kernels, whatever the model's configuration says."""
CPU_GROUP_BYTES, GPU_GROUP_BYTES = 1 << 20, 1 << 28
"""Keys and values that a group of sequences gathers: on a CPU no more than its cache holds."""


@dataclass(frozen=True, slots=True)
class VisualRows:
    """A request's visual tokens and the prompt positions they stand at."""

    positions: list[int]
    """Ascending."""
    rows: Tensor
    """(len(positions), D), on the engine's device."""


def fastgen_config(llm: LlmConfig, vocab_size: int, max_length: int, dtype: torch.dtype) -> SimpleNamespace:
    """The attributes of a Hugging Face configuration that FastGen's Llama reads."""
    return SimpleNamespace(
        hidden_size=llm.hidden_size,
        intermediate_size=llm.intermediate_size,
        num_hidden_layers=llm.num_layers,
        num_attention_heads=llm.num_heads,
        num_key_value_heads=llm.num_kv_heads,
        vocab_size=vocab_size,
        hidden_act="silu",
        rope_theta=llm.rope_theta,
        rms_norm_eps=llm.rms_norm_eps,
        torch_dtype=dtype,
        max_seq_length=max_length,
    )


class DamLlama(Llama2InferenceModel):  # type: ignore[misc]
    """FastGen's Llama plus injection. With its compiled layers."""

    def __init__(self, **arguments: Any) -> None:
        self.visual: dict[int, VisualRows] = {}
        """Sequence id -> rows; kept until the request is released."""
        self.batch_uids: list[int] = []
        """The sequences of the forward in progress, in the order of its rows."""
        self.blocks_of: dict[int, list[int]] = {}
        """Tracking id of a sequence -> its cache blocks."""
        super().__init__(**arguments)

    @property
    def tp_rank(self) -> int:
        return 0 if self._base_mp_group is None else int(dist.get_rank(group=self._base_mp_group))

    @property
    def tp_size(self) -> int:
        return 1 if self._base_mp_group is None else int(dist.get_world_size(group=self._base_mp_group))

    @property
    def activation_dtype(self) -> DtypeEnum:
        return DtypeEnum(self._config.torch_dtype)

    def make_norm_layer(self) -> None:
        super().make_norm_layer()
        self.norm._fp_rms.epsilon = self.norm._fp_rms_pre.epsilon = self._config.rms_norm_eps

    @property
    def positional_embedding_config(self) -> RotateHalfConfig:
        return RotateHalfConfig(use_trained_freqs=True)

    def make_attn_layer(self) -> None:
        super().make_attn_layer()
        device = get_accelerator().current_device()
        frequencies = torch_kernels.rotary_frequencies(self.rope_theta, self.head_size).to(device)
        self.attn: Any = _ExactRotary(self.attn, frequencies)

    def make_unembedding_layer(self) -> None:
        super().make_unembedding_layer()
        self.unembed._norm.epsilon = self._config.rms_norm_eps

    def make_embedding_layer(self) -> None:
        """Nothing: the lookup is torch's, since the compiled one leaves stale rows at placeholder ids."""

    def finish_loading(self) -> None:
        """Called once all weights are in place."""
        self._word_emb = self._non_transformer.word_emb.as_subclass(Tensor)

    def maybe_allocate_kv(self, sequence: Any, n_new_tokens: int) -> None:
        # its blocks are also kept as plain numbers: FastGen reads them from the device, which waits for it each time
        blocks = self.blocks_of.setdefault(sequence.tracking_id, [])
        missing = -(-(sequence.seen_tokens + n_new_tokens) // self.attn.kv_block_size) - len(blocks)
        if missing > 0:
            new_blocks = self.state_manager.allocate_blocks(missing)
            sequence.extend_kv_cache(new_blocks)
            blocks += new_blocks.tolist()

    def set_state_manager(self, state_manager: Any) -> None:
        super().set_state_manager(state_manager)
        # blocks are read whole: what was never written is masked, but 0 * NaN would not be 0
        store = state_manager._kv_cache
        store._caches = tuple(_zeros_like(cache) for cache in store._caches)

    def _forward_embed(self, ragged_batch: Any) -> Tensor:
        ids_R = ragged_batch.input_ids()
        x_RD = F.embedding(ids_R, self._word_emb)
        targets: list[int] = []
        sources: list[Tensor] = []
        start = 0
        for uid in self.batch_uids:
            sequence = self.state_manager.get_sequence(uid)
            visual = self.visual.get(uid)
            if visual is not None and sequence.seen_tokens <= visual.positions[-1]:
                seen, end = sequence.seen_tokens, sequence.seen_tokens + sequence.in_flight_tokens
                first, last = bisect_left(visual.positions, seen), bisect_left(visual.positions, end)
                targets += [start + position - seen for position in visual.positions[first:last]]
                sources.append(visual.rows[first:last])
            start += sequence.in_flight_tokens
        if targets:
            rows = torch.cat(sources).to(x_RD.dtype)
            x_RD.index_copy_(0, torch.tensor(targets, device=x_RD.device), rows)
        return x_RD


class TorchDamLlama(DamLlama):
    """The same model with every layer in plain torch (torch_kernels)."""

    def make_norm_layer(self) -> None:
        self.norm = torch_kernels.TorchNorm(self._config.rms_norm_eps)

    def make_qkv_layer(self) -> None:
        self.qkv = torch_kernels.TorchLinear()

    def make_attn_layer(self) -> None:
        # FastGen asks the attention layer for the size of a block
        self.attn: Any = _Attention(self)

    def make_attn_out_layer(self) -> None:
        self.attn_out = torch_kernels.TorchLinear()

    def make_mlp_1_layer(self) -> None:
        self.mlp_1 = torch_kernels.TorchSwiGlu()

    def make_mlp_2_layer(self) -> None:
        self.mlp_2 = torch_kernels.TorchLinear()

    def make_unembedding_layer(self) -> None:
        self.unembed = self._unembed

    def finish_loading(self) -> None:
        super().finish_loading()
        top = self._non_transformer
        for owner in (top, *self._transformer):
            for name in owner.annotation_attrs:  # plain tensors: a subclass costs time in every call
                setattr(owner, name, getattr(owner, name).as_subclass(Tensor))
        device = self._word_emb.device
        self._cos, self._sin = torch_kernels.rotary_table(
            self.rope_theta, self.head_size, self.max_sequence_length, device
        )
        position_bytes = 2 * self.n_heads_kv_local * self.head_size * self._config.torch_dtype.itemsize
        self._max_positions = (GPU_GROUP_BYTES if device.type == "cuda" else CPU_GROUP_BYTES) // position_bytes

    def prepare_batch(self, wrapped_batch: Any) -> None:
        del wrapped_batch
        sequences = [self.state_manager.get_sequence(uid) for uid in self.batch_uids]
        states = [
            SequenceState(s.in_flight_tokens, s.seen_tokens, s.kv_cache_ids(on_device=False)[0].numpy())
            for s in sequences
        ]
        self.plan = torch_kernels.plan_batch(
            states, self._cos, self._sin, self._config.torch_dtype, self._max_positions
        )

    def _forward_unembed(self, hidden_states: Tensor, ragged_batch_info: Any) -> Tensor:
        top = self._non_transformer
        logits = self._unembed(hidden_states, top.word_unembed, ragged_batch_info, top.final_norm)
        if self.tp_size == 1:
            return logits
        parts = [torch.empty_like(logits) for _ in range(self.tp_size)]  # of the vocabulary
        torch.distributed.all_gather(parts, logits, group=self._base_mp_group)
        return torch.cat(parts, dim=-1)

    def _unembed(self, hidden: Tensor, weight: Tensor, batch: Any, gamma: Tensor) -> Tensor:
        del batch
        return F.linear(self.norm.rms(hidden[self.plan.last_S], gamma), weight)


def _zeros_like(cache: Tensor) -> Tensor:
    """Zeros of the same shape; on a CPU memory is taken only as it is written to."""
    if cache.is_cuda:
        return cache.zero_()
    memory = torch.from_numpy(np.zeros(cache.numel() * cache.element_size(), np.uint8))
    return memory.view(cache.dtype).view(cache.shape)


class _ExactRotary(nn.Module):
    """DeepSpeed's attention, with the rotary frequencies handed in.

    Left to itself its kernel rounds them to bfloat16 or float16 before it multiplies them by the position. In bfloat16
    that is up to 0.2 %, more than half a radian after 300 tokens. A float32 table that is handed in is used as it is.
    """

    def __init__(self, attention: Any, frequencies: Tensor) -> None:
        super().__init__()
        self._attention = attention
        self._frequencies = frequencies
        self.kv_block_size: int = attention.kv_block_size
        self.q_block_size: int = attention.q_block_size
        self.build_atoms = attention.build_atoms

    def forward(self, qkv: Tensor, cache: Tensor, batch: Any) -> Tensor:
        attended: Tensor = self._attention(qkv, cache, batch, self._frequencies)
        return attended


class _Attention:
    kv_block_size = BLOCK_SIZE

    def __init__(self, model: TorchDamLlama) -> None:
        self._model = model

    def __call__(self, qkv: Tensor, cache: Tensor, batch: Any) -> Tensor:
        del batch
        model = self._model
        return torch_kernels.attend(
            qkv, cache, model.plan,
            num_heads=model.n_heads_q_local, num_kv_heads=model.n_heads_kv_local, head_size=model.head_size,
        )  # fmt: skip


class DamPolicy(Llama2Policy):  # type: ignore[misc]
    """Builds a DamLlama and fills it from a Handover, without FastGen's second, flattened copy of the weights."""

    def __init__(self, config: Any, handover: Any, kernels: str) -> None:
        super().__init__(config, checkpoint_engine=handover)
        self._kernels = kernels

    def instantiate_model(self, engine_config: Any, mp_group: Any) -> DamLlama:
        model_class = TorchDamLlama if self._kernels == "torch" else DamLlama
        return model_class(config=self._model_config, engine_config=engine_config, base_mp_group=mp_group)

    def populate_model_parameters(self) -> None:
        containers = self.build_container_map()
        for name, parameter in self._checkpoint_engine.parameters():
            containers.map_param(name, parameter)
            del parameter
        layers, top = containers.transformer_params, containers.non_transformer_params
        incomplete = [i for i, layer in enumerate((top, *layers)) if layer._finalized_params != layer.n_params]
        if incomplete:
            raise ValueError(f"the language model lacks weights in {len(incomplete)} of {len(layers) + 1} parts")
        self.model.set_parameters(
            transformer=layers, non_transformer=top, flattened_param_buffer=None, flattened_param_metadata=None
        )
        self.model.finish_loading()


class RaggedEngine(InferenceEngineV2):  # type: ignore[misc]
    """FastGen's engine: one `put` is one forward over a ragged batch. Without a process group for a single process.

    The compiled kernels must run on the device's default stream: their BLAS handle knows no other.
    """

    def __init__(self, policy: Any, config: Any, group: TensorGroup | None = None) -> None:
        self._group = group
        self._announced: set[int] = set()
        self._launched: torch.cuda.Event | None = None
        super().__init__(policy, config)

    def _initialize_tp_group(self) -> Any:
        return None if self._group is None else super()._initialize_tp_group()

    def put(self, batch_uids: Iterable[int], batch_tokens: Sequence[Tensor], do_checks: bool = False) -> Tensor:
        """Logits (sequences, vocabulary) after the last new token of each sequence; valid until the next `put`.

        The caller has checked that everything fits; FastGen's own check compares a number with a list and fails.
        """
        assert not do_checks
        uids = list(batch_uids)
        self._model.batch_uids = uids
        if self._group is not None and self._group.rank == 0:
            self._announce(self._group, uids, batch_tokens)
        if self._launched is not None:
            self._launched.synchronize()  # its copies from host buffers, which are filled anew now
        with torch.inference_mode():
            logits: Tensor = super().put(uids, batch_tokens, do_checks=False)
        if logits.is_cuda:
            self._launched = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._launched.record()
        return logits

    def flush(self, uid: int) -> None:
        """Frees a sequence's blocks and its place in the tracker."""
        if self._group is not None and self._group.rank == 0:
            self._group.send(uid)
            self._announced.discard(uid)
        manager = self._state_manager
        sequence = manager._seqs.pop(uid)
        manager._kv_cache.free(self._model.blocks_of.pop(sequence.tracking_id))
        manager._tracking_allocator.free(sequence.tracking_id)

    def _announce(self, group: TensorGroup, uids: list[int], tokens: Sequence[Tensor]) -> None:
        """Lets the other ranks do the same forward; visual rows go with a sequence's first part."""
        visual = self._model.visual
        rows = {
            u: (visual[u].positions, visual[u].rows.cpu()) for u in uids if u in visual and u not in self._announced
        }
        self._announced.update(uids)
        group.send((uids, list(tokens), rows))
