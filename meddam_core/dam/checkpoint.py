"""Load and save the official checkpoint folder, and make random DAMs of given dimensions.

    dam = load_dam("checkpoints/DAM-3B", device="cuda", dtype=torch.bfloat16)

Invariants:
- Nothing is guessed: configuration that is not implemented, and missing, unexpected or misshaped tensors, end in one
  error that lists all of them.
- The model is built without memory and filled tensor by tensor, so the peak stays near the weights' own size.
- Rows of the embedding and the output layer beyond the tokenizer's vocabulary are cut, as the reference does.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from meddam_core.dam.architecture import DamConfig
from meddam_core.dam.config import COMPONENTS, component_folders, read_config
from meddam_core.dam.documents import documents
from meddam_core.dam.model import Dam
from meddam_core.dam.tokens import Tokenizer, read_tokenizer
from meddam_core.dam.weights import MAX_SHARD_BYTES, WeightFiles, write_weights

_VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")
_FLOATING = ("F64", "F32", "F16", "BF16", "torch.float64", "torch.float32", "torch.float16", "torch.bfloat16")
"""Dtypes of weights that can be read, as safetensors and torch spell them."""
_DERIVED = ("rotary_emb.inv_freq", "embeddings.position_ids")
"""Buffers that older files carry and that follow from the configuration."""


def load_dam(folder: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> Dam:
    """The DAM in a checkpoint folder, in evaluation mode.

    Raises ValueError that lists everything about the folder that is missing, unexpected or not implemented.
    """
    dam, sources = _open(Path(folder))
    for name in COMPONENTS:
        _fill(dam.get_submodule(name), sources[name].tensors(), torch.device(device), dtype)
    dam.llm.tie_weights()
    return dam.eval()


def check_dam(folder: str | Path) -> None:
    """All that `load_dam` finds out before it reads the weights: the same ValueError, from the files' headers."""
    _open(Path(folder))


def _open(folder: Path) -> tuple[Dam, dict[str, WeightFiles]]:
    """The DAM without memory, and the files that fit it."""
    config = read_config(folder)
    parts = component_folders(folder)
    tokenizer = read_tokenizer(parts["llm"])
    if len(tokenizer) > config.llm.vocab_size:
        raise ValueError(
            f"{folder}: the tokenizer has {len(tokenizer)} tokens for {config.llm.vocab_size} embedding rows; "
            "the missing rows would have to be made up"
        )
    dam = build_dam(config, tokenizer)
    sources = {name: WeightFiles(parts[name]) for name in COMPONENTS}
    problems = [p for name in COMPONENTS for p in _mismatches(name, dam, sources[name])]
    if problems:
        raise ValueError(
            f"{folder}: the weights do not fit the configuration:" + "".join(f"\n  - {p}" for p in problems)
        )
    return dam, sources


def build_dam(config: DamConfig, tokenizer: Tokenizer | None = None) -> Dam:
    """A DAM on the meta device: every name and shape, no memory."""
    with torch.device("meta"), _WithoutDrawing():
        return Dam(config, tokenizer)


class _WithoutDrawing(TorchFunctionMode):
    """Leaves out the first draw of weights: there is no memory for them, and it would load all of torch._dynamo."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == nn.init.__name__:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def random_dam(
    config: DamConfig,
    seed: int,
    tokenizer: Tokenizer | None = None,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    zero_gates: bool = False,
) -> Dam:
    """A DAM of the given dimensions with random weights of sensible size.

    The same seed gives the same weights on the same kind of device. `zero_gates` starts the adapters' gates at zero, as
    training does; otherwise they are random too, so that every part of the network shows in the output.
    """
    dam = build_dam(config, tokenizer)

    def drawn() -> Iterable[tuple[str, Tensor]]:
        for name, parameter in part.named_parameters():
            generator = torch.Generator(device=device).manual_seed(seed * 0x9E3779B1 + zlib.crc32(name.encode()))
            yield name, _random(name, parameter.shape, generator, zero_gates)

    for component in COMPONENTS:
        part = dam.get_submodule(component)
        _fill(part, drawn(), torch.device(device), dtype)
    dam.llm.tie_weights()
    return dam.eval()


def save_dam(dam: Dam, folder: str | Path, *, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Write `dam` in the official layout; ROOT/config.json comes last, so a folder with one is complete."""
    folder = Path(folder)
    config = replace(dam.config, llm=replace(dam.config.llm, vocab_size=dam.llm.vocab_size))
    texts = documents(config)
    for name in COMPONENTS:
        (folder / name).mkdir(parents=True, exist_ok=True)
        tensors = dict(dam.get_submodule(name).named_parameters())  # shared parameters come once, as in HF's files
        write_weights(folder / name, tensors, max_shard_bytes)
    for file, content in dam.tokenizer.files.items():
        (folder / "llm" / file).write_bytes(content)
    for path, document in reversed(texts.items()):
        (folder / path).write_text(json.dumps(document, indent=1), encoding="utf-8")


def _mismatches(component: str, dam: Dam, source: WeightFiles) -> list[str]:
    """Every tensor that is missing, unexpected, or of another shape."""
    expected = {name: tuple(p.shape) for name, p in dam.get_submodule(component).named_parameters()}
    if component == "llm":
        rows = (dam.config.llm.vocab_size, dam.config.llm.hidden_size)
        expected |= {name: rows for name in _VOCABULARY if name in expected}
    ignored = set(_VOCABULARY) if dam.config.llm.tie_word_embeddings and component == "llm" else set()
    found = {n: s for n, s in source.shapes.items() if n not in ignored - set(expected) and not n.endswith(_DERIVED)}
    return (
        [f"{component}: {name} is missing; expected {list(expected[name])}" for name in expected if name not in found]
        + [f"{component}: {name} {list(found[name])} is unexpected" for name in found if name not in expected]
        + [
            f"{component}: {name} is {list(found[name])}; expected {list(shape)}"
            for name, shape in expected.items()
            if name in found and found[name] != shape
        ]
        + [
            f"{component}: {name} is {dtype}; quantised weights are not implemented"
            for name, dtype in source.dtypes.items()
            if name in expected and dtype not in _FLOATING
        ]
    )


def _fill(module: nn.Module, tensors: Iterable[tuple[str, Tensor]], device: torch.device, dtype: torch.dtype) -> None:
    """Replace the module's meta parameters by copies of `tensors`; rows beyond a parameter's own are cut."""
    parameters = dict(module.named_parameters())
    for name, tensor in tensors:
        if name not in parameters:
            continue
        shape = parameters[name].shape
        value = torch.empty(shape, dtype=dtype, device=device)
        value.copy_(tensor[: shape[0]])
        parent, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(parent), leaf, nn.Parameter(value))


def _random(name: str, shape: torch.Size, generator: torch.Generator, zero_gates: bool) -> Tensor:
    noise: Tensor = torch.randn(shape, generator=generator, device=generator.device)
    if name.endswith("_factor"):
        return torch.zeros(shape) if zero_gates else 0.5 * noise
    if len(shape) == 1:
        is_norm_weight = name.endswith("weight")  # every one-dimensional weight in the network belongs to a norm
        return 1.0 + 0.1 * noise if is_norm_weight else 0.1 * noise
    if name.endswith(("embed_tokens.weight", "position_embedding.weight", "probe")):
        return noise
    spread = 3.0 if name == "lm_head.weight" else 1.0
    fan_in = shape[1:].numel()
    return noise.mul_(spread / fan_in**0.5)
