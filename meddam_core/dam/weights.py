"""Weight files of one component: safetensors or .bin, single or sharded, read one tensor at a time.

Each tensor is read from a file mapping that is closed again soon, so that no more than a small part of a file is ever
resident beside the model. `.bin` files are only ever unpickled with weights_only=True.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from meddam_core.dam.config import read_json

MAX_SHARD_BYTES = 4 << 30
_REOPEN_SHARE = 16
"""A .bin file is mapped anew after this part of it was read, so that no more of it stays resident."""
_SINGLE = ("model.safetensors", "pytorch_model.bin")


class WeightFiles:
    """The tensors of a component's folder. Raises ValueError if there is no weight file or a shard is missing."""

    def __init__(self, folder: Path) -> None:
        self._file_of = _locate(folder)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        """As the file's format spells them."""
        self._names: dict[Path, list[str]] = {}
        for path in sorted(set(self._file_of.values())):
            headers = _headers(path)
            self._names[path] = list(headers)
            self.shapes |= {name: shape for name, (shape, _) in headers.items()}
            self.dtypes |= {name: dtype for name, (_, dtype) in headers.items()}

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every (name, tensor) on the CPU. A tensor is only good until the next one is asked for."""
        for path, names in self._names.items():
            if path.suffix == ".safetensors":
                for name in names:
                    with safe_open(path, framework="pt") as file:
                        yield name, file.get_tensor(name)
            else:
                yield from _bin_tensors(path, names)


def _locate(folder: Path) -> dict[str, Path]:
    """File by tensor name for sharded weights; for single files the name is the file's own."""
    for single in _SINGLE:
        index = folder / f"{single}.index.json"
        if (folder / single).is_file():
            return {single: folder / single}
        if index.is_file():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, Mapping):
                raise ValueError(f"{index} has no weight_map")
            files = {name: folder / Path(file).name for name, file in weight_map.items()}
            missing = sorted({str(f) for f in files.values() if not f.is_file()})
            if missing:
                raise ValueError(f"{index} names files that are not there: {', '.join(missing)}")
            return files
    raise ValueError(f"{folder} holds no weights: expected {' or '.join(_SINGLE)}, or an .index.json of one")


def _headers(path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype by tensor name."""
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {name: (tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}
    return {name: (tuple(t.shape), str(t.dtype)) for name, t in _unpickle(path).items()}


def _unpickle(path: Path) -> dict[str, Tensor]:
    values = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if not isinstance(values, dict) or not all(isinstance(v, Tensor) for v in values.values()):
        raise ValueError(f"{path} does not hold a dict of tensors")
    return values


def _bin_tensors(path: Path, names: list[str]) -> Iterator[tuple[str, Tensor]]:
    values, num_bytes = _unpickle(path), 0
    for name in names:
        if num_bytes > path.stat().st_size // _REOPEN_SHARE:
            del values
            values, num_bytes = _unpickle(path), 0
        yield name, values[name]
        num_bytes += values[name].nbytes


def write_weights(folder: Path, tensors: Mapping[str, Tensor], max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Write safetensors, in shards with an index where one file would be larger than `max_shard_bytes`."""
    shards: list[dict[str, Tensor]] = [{}]
    num_bytes = 0
    for name, tensor in tensors.items():
        if shards[-1] and num_bytes + tensor.nbytes > max_shard_bytes:
            shards.append({})
            num_bytes = 0
        shards[-1][name] = tensor
        num_bytes += tensor.nbytes
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file({name: t.detach().cpu().contiguous() for name, t in shard.items()}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
