"""DeepSpeed's compiled kernels: built once a node, then loaded from its cache.

    MEDDAM_OPS_CACHE=/local/ops python -c "from meddam_core.engines.mii.ops import load_ops; print(load_ops())"

The cache is a folder on the node's own disk (home folders on NFS would serve all nodes at once, and their locks are
weak). Below it, one folder for each combination of torch, CUDA, GPU generation, Python and DeepSpeed. An op is used
from it once its file `complete` is there; a folder that was built elsewhere can be copied in, or baked into an image,
and is then loaded without a compiler. One process at a time builds, under a lock that ends with its process.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import importlib
import importlib.util
import os
import platform
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from meddam_core.engines.mii.compat import VERSIONS, MiiUnavailable

BUILDERS = {
    "ragged_ops": "RaggedUtilsBuilder",
    "ragged_device_ops": "RaggedOpsBuilder",
    "inference_core_ops": "InferenceCoreBuilder",
}
"""The ops that FastGen's Llama needs, and what builds them."""
CACHE_VARIABLE = "MEDDAM_OPS_CACHE"
FLASH_LIBRARY = "libblockedflash.so"


def load_ops(root: Path | None = None) -> Path:
    """Makes the compiled kernels available to DeepSpeed in this process; builds what the cache lacks.

    Args:
        root: the cache; None takes $MEDDAM_OPS_CACHE, else a private folder under the system's temporary one.

    Returns the folder they were loaded from. Raises MiiUnavailable with the cause.
    """
    from deepspeed.ops.op_builder.builder import CUDAOpBuilder, OpBuilder

    if not issubclass(importlib.import_module("deepspeed.ops.op_builder").RaggedOpsBuilder, CUDAOpBuilder):
        raise MiiUnavailable(
            "DeepSpeed was imported before for another accelerator: unset DS_ACCELERATOR and start again"
        )
    preload_flash_library(_flash_folder())
    folder = (root or cache_root()) / cache_key(torch.cuda.get_device_capability())
    for name in BUILDERS:
        if name not in OpBuilder._loaded_ops and not is_complete(folder, name):
            build(folder, name)  # leaves it loaded, unless another process built it
        if name not in OpBuilder._loaded_ops:
            OpBuilder._loaded_ops[name] = load_extension(folder, name)
    return folder


def cache_root() -> Path:
    """The cache folder; made if it is the default one. Raises MiiUnavailable if another user owns that."""
    named = os.environ.get(CACHE_VARIABLE)
    if named:
        return Path(named)
    folder = Path(tempfile.gettempdir()) / f"meddam-ops-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise MiiUnavailable(f"{folder} belongs to somebody else: set {CACHE_VARIABLE} to a folder of your own")
    return folder


def cache_key(capability: tuple[int, int]) -> str:
    """What compiled kernels depend on, as a folder name."""
    return "-".join(
        (
            f"torch{torch.__version__.replace('+', '_')}",
            f"cuda{torch.version.cuda}",
            f"sm{capability[0]}{capability[1]}",
            f"py{sys.version_info.major}.{sys.version_info.minor}",
            f"deepspeed{VERSIONS['deepspeed']}",
            platform.machine(),
        )
    )


def is_complete(folder: Path, name: str) -> bool:
    """Whether an op lies in the cache, built to the end."""
    return (folder / name / "complete").is_file() and (folder / name / f"{name}.so").is_file()


def load_extension(folder: Path, name: str) -> Any:
    """The extension module in `folder/name/name.so`. Raises MiiUnavailable if it does not load here."""
    path = folder / name / f"{name}.so"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except ImportError as error:
        raise MiiUnavailable(f"{path} does not load here: {error}. Delete the folder to build it again") from error
    return module


def preload_flash_library(folder: Path) -> None:
    """Loads the flash attention library for the ops to find: they name it, and do not say where it is."""
    try:
        ctypes.CDLL(str(folder / FLASH_LIBRARY), mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise MiiUnavailable(f"{FLASH_LIBRARY} of the package deepspeed-kernels does not load: {error}") from error


def _flash_folder() -> Path:
    try:
        package = importlib.import_module("dskernels")
    except ImportError:
        raise MiiUnavailable("deepspeed-kernels is not installed: pip install 'meddam[mii-kernels]'") from None
    return Path(package.library_path())


def build(folder: Path, name: str) -> None:
    """Compiles an op into the cache, minutes for the largest; others that want it wait. Raises MiiUnavailable."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / f"{name}.lock").open("w")
    except OSError as error:
        raise MiiUnavailable(f"the kernels are not in {folder}, and it cannot be written to: {error}") from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if is_complete(folder, name):
            return
        # torch's own lock file outlives a killed process, and would be waited for without end
        (folder / name / "lock").unlink(missing_ok=True)
        builder = getattr(importlib.import_module("deepspeed.ops.op_builder"), BUILDERS[name])()
        try:
            with _build_environment(folder):
                builder.jit_load(verbose=False)
        except Exception as error:  # compilers, linkers and torch raise what they like
            raise MiiUnavailable(f"the kernels {name} do not build: {error}") from error
        (folder / name / "complete").touch()


@contextlib.contextmanager
def _build_environment(folder: Path) -> Iterator[None]:
    """Where torch puts extensions, for which GPU, and the CUDA headers that only pip packages carry."""
    major, minor = torch.cuda.get_device_capability()
    values = {
        "TORCH_EXTENSIONS_DIR": str(folder),
        "TORCH_CUDA_ARCH_LIST": f"{major}.{minor}",
        "MAX_JOBS": os.environ.get("MAX_JOBS", str(len(os.sched_getaffinity(0)))),
        "CPATH": ":".join(filter(None, [os.environ.get("CPATH", ""), *_pip_cuda_headers()])),
    }
    before = {key: os.environ.get(key) for key in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value


def _pip_cuda_headers() -> list[str]:
    """Headers of cuBLAS and others that a minimal CUDA toolkit lacks and torch's dependencies bring."""
    try:
        package = importlib.import_module(f"nvidia.cu{(torch.version.cuda or '').split('.')[0]}")
    except ImportError:
        return []
    return [str(Path(path) / "include") for path in package.__path__]
