"""DeepSpeed and MII held at arm's length: exact versions, quiet imports, global state set only while it is needed.

This package uses private names of both libraries, so the versions are exact: another one is refused in one sentence.

What importing or using DeepSpeed changes in a process, and what is done about it:
- the accelerator is a process-wide variable: `deepspeed_session` sets it while an engine is built and puts back the old
  one; nothing in a forward pass reads it;
- DeepSpeed has no CPU version of two small ops and pins host memory without asking: replaced inside a session, by
  module attribute, and put back;
- loggers "DeepSpeed", "DS-Inference" and "MII" write to stdout, which would spoil `--json`: their handlers are removed,
  their warnings go to the root logger;
- PYTORCH_NVML_BASED_CUDA_CHECK and warning filters change on import: put back;
- `Allocator.cache` keeps every buffer of every engine alive: `forget_buffers` empties it.
With one process an engine, no process group is made, no port is opened and no RANK or MASTER_PORT is read.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import threading
import types
import warnings
from collections.abc import Iterator
from importlib import metadata
from typing import Any

import torch

VERSIONS = {"deepspeed": "0.19.8", "deepspeed-mii": "0.3.3"}
"""The versions that the private names below belong to."""

INSTALL = (
    "pip install 'meddam[mii]' ('meddam[mii-kernels]' on a GPU), then "
    f"pip install --no-deps deepspeed-mii=={VERSIONS['deepspeed-mii']}"
)

PRIVATE_NAMES = {
    "deepspeed.inference.v2.engine_v2:InferenceEngineV2": "put flush query free_blocks _initialize_tp_group",
    "deepspeed.inference.v2.model_implementations.llama_v2.model:Llama2InferenceModel": (
        "_forward_embed _forward_unembed _forward_transformer_layer prepare_batch make_norm_layer make_qkv_layer "
        "make_attn_layer make_attn_out_layer make_mlp_1_layer make_mlp_2_layer make_embedding_layer "
        "make_unembedding_layer"
    ),
    "deepspeed.inference.v2.model_implementations.llama_v2.policy:Llama2Policy": (
        "instantiate_model build_container_map populate_model_parameters"
    ),
    "deepspeed.inference.v2.allocator:Allocator": "cache",
    "deepspeed.ops.op_builder.builder:OpBuilder": "_loaded_ops",
    "mii.batching.ragged_batching:RaggedBatchBase": (
        "generate _bcast_requests _process_logits _generate_output schedule_requests reset_request_status put flush "
        "_schedule_prompts _schedule_token_gen"
    ),
}
"""What is subclassed or replaced, `module:class` -> attributes; checked at start."""

_lock = threading.RLock()


class MiiUnavailable(ValueError):
    """DeepSpeed-MII cannot serve this model here. The message says why and what to do; `auto` then takes torch."""


def check_versions() -> None:
    """Raises MiiUnavailable unless exactly the supported DeepSpeed and MII are installed. Imports neither."""
    for package, wanted in VERSIONS.items():
        try:
            found = metadata.version(package)
        except metadata.PackageNotFoundError:
            raise MiiUnavailable(f"{package} is not installed. {INSTALL}") from None
        if found != wanted:
            raise MiiUnavailable(
                f"{package} {found} is installed, and this engine works with exactly {wanted}: it uses internals that "
                f"change between versions. {INSTALL}"
            )


def import_deepspeed() -> None:
    """Imports DeepSpeed and MII quietly and checks the private names. Raises MiiUnavailable."""
    check_versions()
    with _lock, warnings.catch_warnings(), _import_environment():
        try:
            modules = {target: importlib.import_module(target.split(":")[0]) for target in PRIVATE_NAMES}
        except ImportError as error:
            raise MiiUnavailable(f"DeepSpeed-MII does not import here: {error}. {INSTALL}") from error
    for target, names in PRIVATE_NAMES.items():
        owner = getattr(modules[target], target.split(":")[1], None)
        missing = [name for name in names.split() if not hasattr(owner, name)]
        if missing:
            raise MiiUnavailable(f"{target} lacks {', '.join(missing)}: the installed package is not the published one")
    _quieten()


def _quieten() -> None:
    from deepspeed.inference.v2.logging import inference_logger

    inference_logger()  # made on first use, with a handler on stdout
    for name in ("DeepSpeed", "DS-Inference", "MII", "MII_legacy"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
        logger.setLevel(logging.WARNING)


@contextlib.contextmanager
def _import_environment() -> Iterator[None]:
    """The accelerator named outright, so that DeepSpeed does not guess and warn; the environment is put back."""
    names = ("DS_ACCELERATOR", "PYTORCH_NVML_BASED_CUDA_CHECK")
    before = {name: os.environ.get(name) for name in names}
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextlib.contextmanager
def deepspeed_session(device: torch.device, kernels: str) -> Iterator[None]:
    """While it is open, DeepSpeed builds engines on `device`; afterwards its global state is as it was.

    Sessions exclude each other within a process (a lock), so that engines can be built from several threads.
    """
    from deepspeed.accelerator import real_accelerator
    from deepspeed.inference.v2.model_implementations import flat_model_helpers
    from deepspeed.inference.v2.ragged import blocked_allocator, ragged_manager, ragged_wrapper

    with _lock, contextlib.ExitStack() as stack:
        accelerator = _cuda_accelerator() if kernels == "cuda" else _torch_accelerator(device)
        stack.enter_context(_attribute(real_accelerator, "ds_accelerator", accelerator))
        if kernels == "torch":
            for module in (ragged_wrapper, ragged_manager, flat_model_helpers):
                stack.enter_context(_attribute(module, "RaggedUtilsBuilder", _HostBuffers))
        if not torch.cuda.is_available():
            stack.enter_context(_attribute(blocked_allocator, "torch", _UnpinnedTorch()))
        if device.type == "cuda":
            stack.enter_context(torch.cuda.device(device))
        yield


def forget_buffers() -> None:
    """Empties DeepSpeed's cache of views, which would keep a closed engine's buffers alive; it refills when used."""
    from deepspeed.inference.v2.allocator import Allocator

    Allocator.cache.clear()


@contextlib.contextmanager
def _attribute(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _cuda_accelerator() -> Any:
    from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator

    return CUDA_Accelerator()


def _torch_accelerator(device: torch.device) -> Any:
    """An accelerator that answers with a torch device; DeepSpeed's own for CPUs answers with a process's rank."""
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    class TorchAccelerator(CPU_Accelerator):  # type: ignore[misc]
        def current_device(self) -> str:
            return str(device)

        def current_device_name(self) -> str:
            return str(device)

        def create_op_builder(self, class_name: str) -> None:
            """Nothing is compiled; DeepSpeed would build a shared-memory op for a tensor-parallel group on a CPU."""

    return TorchAccelerator()


class _HostBuffers:
    """Stands in for DeepSpeed's compiled `ragged_ops`: host copies of small device buffers."""

    def load(self) -> types.SimpleNamespace:
        return types.SimpleNamespace(allocate_fast_host_buffer=_host_buffer)


def _host_buffer(like: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(like, device="cpu", pin_memory=like.is_cuda)


class _UnpinnedTorch:
    """`torch` for DeepSpeed's block allocator on machines without CUDA, where asking for pinned memory is an error."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def arange(*args: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        del pin_memory
        return torch.arange(*args, **options)
