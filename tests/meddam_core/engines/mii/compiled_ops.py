"""DeepSpeed's compiled ops by their contracts, in plain Python on the CPU.

What the C++ sources of DeepSpeed 0.19.8 say each op reads and writes, so that the Python around them (FastGen's
modules, and what this package changes in them) can run end to end without a GPU. The arithmetic of the real kernels is
not tested by this; the tests marked gpu do that.
"""

from __future__ import annotations

import ctypes
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

Q_BLOCK = 64


class Ops:
    """Functions of ragged_ops, ragged_device_ops and inference_core_ops that FastGen's Llama calls."""

    def __init__(self) -> None:
        self.max_atoms = 0
        self.room_for_atoms = 0
        self.epsilons: set[float] = set()
        self.atoms: list[tuple[int, int, int, list[int]]] = []

    # ragged_ops
    def allocate_fast_host_buffer(self, mirror: Tensor) -> Tensor:
        return torch.empty_like(mirror, device="cpu")

    # inference_core_ops
    def create_handle(self) -> None: ...

    def blas_linear(self, output: Tensor, hidden: Tensor, weights: Tensor) -> None:
        assert output.dtype == hidden.dtype == weights.dtype
        output.copy_(F.linear(hidden, weights))

    def bias_activation(self, activation: Tensor, bias: Tensor | None, kind: int) -> None:
        assert bias is None
        assert kind == 6  # identity

    def gated_activation(self, output: Tensor, input: Tensor, bias: Tensor | None, kind: int) -> None:
        assert bias is None
        assert kind == 5  # SiLU, gate and value in turns
        output.copy_(F.silu(input[..., 0::2].float()) * input[..., 1::2].float())

    def rms_norm(self, output: Tensor, x: Tensor, gamma: Tensor, epsilon: float) -> None:
        self.epsilons.add(epsilon)
        output.copy_(F.rms_norm(x.float(), x.shape[-1:], gamma.float(), epsilon))

    def rms_pre_norm(self, z_hid: Tensor, z_res: Tensor, y_hid: Tensor, x_res: Tensor, gamma: Tensor, e: float) -> None:
        z_res.copy_(x_res + y_hid)
        self.rms_norm(z_hid, z_res, gamma, e)

    # ragged_device_ops
    def build_atoms(
        self, atoms: Tensor, metadata: Tensor, sequences: Tensor, kv_ptrs: Tensor, q_block: int, kv_block: int
    ) -> int:
        self.atoms = []
        for i in range(int(metadata[1])):
            start, num, seen, _ = sequences[i].tolist()
            blocks = _read(int(kv_ptrs[i]), -(-(seen + num) // kv_block))
            for offset in range(0, num, q_block):
                self.atoms.append((start + offset, min(q_block, num - offset), seen + offset, blocks))
        self.max_atoms, self.room_for_atoms = max(self.max_atoms, len(self.atoms)), len(atoms)
        assert len(self.atoms) <= len(atoms), "the real op would write past the end"
        return len(self.atoms)

    def kv_trained_rotary_embeddings(
        self, cache: Tensor, q: Tensor, k: Tensor, v: Tensor, frequencies: Tensor, metadata: Tensor,
        sequences: Tensor, tokens_to_seq: Tensor, kv_ptrs: Tensor,
    ) -> None:  # fmt: skip
        assert frequencies.dtype == torch.float32
        num, block_size, head_size = int(metadata[0]), cache.shape[1], cache.shape[4]
        assert len(q) == num
        for token in range(num):
            sequence = int(tokens_to_seq[token])
            start, _, seen, _ = sequences[sequence].tolist()
            position = seen + token - start
            block = _read(int(kv_ptrs[sequence]), position // block_size + 1)[-1]
            angle = frequencies * position
            cos, sin = torch.cat((angle.cos(),) * 2), torch.cat((angle.sin(),) * 2)
            q[token] = _rotate(q[token].view(-1, head_size), cos, sin).flatten()
            cache[block, position % block_size, 0] = _rotate(k[token].view(-1, head_size), cos, sin)
            cache[block, position % block_size, 1] = v[token].view(-1, head_size)

    def flash_attn_by_atoms(
        self, out: Tensor, q: Tensor, k: Tensor, v: Tensor, atoms: Tensor, scale: float, causal: bool
    ) -> None:
        head_size, groups = k.shape[-1], q.shape[-1] // (k.shape[-2] * k.shape[-1])
        assert causal
        assert len(atoms) == len(self.atoms)
        assert math.isclose(scale, head_size**-0.5, rel_tol=1e-6)
        for start, num, first, blocks in self.atoms:
            keys, values = (x[blocks].flatten(0, 1)[: first + num].float() for x in (k, v))
            query = q[start : start + num].view(num, -1, head_size).float()
            keys, values = (x.repeat_interleave(groups, dim=1) for x in (keys, values))
            scores = torch.einsum("nhe,phe->hnp", query, keys) * scale
            hidden = torch.arange(first + num)[None] > torch.arange(first, first + num)[:, None]
            found = torch.einsum("hnp,phe->nhe", scores.masked_fill(hidden, -torch.inf).softmax(-1), values)
            out[start : start + num] = found.flatten(1)

    def gather_for_logits(self, final: Tensor, hidden: Tensor, metadata: Tensor, sequences: Tensor) -> None:
        for i in range(int(metadata[1])):
            start, num = sequences[i, :2].tolist()
            final[i] = hidden[start + num - 1]


def _read(address: int, count: int) -> list[int]:
    return list((ctypes.c_int32 * count).from_address(address))


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.float().chunk(2, dim=-1)
    return (x.float() * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


def install(monkeypatch: pytest.MonkeyPatch) -> Ops:
    """DeepSpeed believes that it is on an H100 with its ops built."""
    import sys

    from meddam_core.engines.mii import compat, ops, startup

    compat.import_deepspeed()
    fake = Ops()

    class Builder:
        def load(self) -> Any:
            return fake

    for name, module in list(sys.modules.items()):
        if name.startswith("deepspeed.inference.v2"):
            for builder in ops.BUILDERS.values():
                if hasattr(module, builder):
                    monkeypatch.setattr(module, builder, Builder)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(compat, "_cuda_accelerator", lambda: compat._torch_accelerator(torch.device("cpu")))
    monkeypatch.setattr(ops, "load_ops", lambda: None)
    monkeypatch.setattr(startup, "check_supported", lambda *arguments: None)
    return fake
