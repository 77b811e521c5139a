"""What a machine has and lacks for a run, looked at from within: versions, GPUs, disk, limits, weights.

    facts = node_facts("/weights/DAM-3B", sent_s=time.time())         # in a process of each node
    facts = node_facts(store_bytes=8e9, spill="/scratch/ray")         # where Ray has begun: what it took, and where
    findings = judged(facts)

Needs no Ray, so that it can also say what is wrong with a machine that Ray won't start on.
"""

from __future__ import annotations

import os
import platform
import resource
import shutil
import socket
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

State = Literal["ok", "warning", "problem"]

PACKAGES = ("meddam", "ray", "torch", "transformers", "pyarrow", "pydicom", "numpy", "deepspeed", "deepspeed-mii")
OF_GPU_NODES = ("deepspeed", "deepspeed-mii")
"""Packages that the image for CPUs does not hold."""
MIN_OPEN_FILES = 8192
MIN_DISK_GB = 20.0
STORE_SHARE, STORE_MOST_BYTES, STORE_NEVER_CUT_BYTES, STORE_OF_SHM = 0.3, 200e9, 10e9, 0.95
"""Of Ray's rule for the size of an object store that is not told one: see `store_size`."""
MAX_SKEW_S = 60.0
"""S3 refuses requests from clocks that are a quarter of an hour off; leases and logs suffer before."""
MIN_CAPABILITY = (8, 0)
MIN_GPU_GB = 15.0


class Finding(BaseModel):
    """One thing that was looked at."""

    model_config = ConfigDict(frozen=True)

    about: str
    state: State
    said: str
    todo: str | None = None


def node_facts(
    model: str | None = None, sent_s: float | None = None, store_bytes: float | None = None, spill: str | None = None
) -> dict[str, Any]:
    """What this machine is.

    Args:
        model: checkpoint folder to look for.
        sent_s: the asker's clock when it asked.
        store_bytes: size of the object store, where Ray runs here; by default what it would take.
        spill: folder that Ray spills to, where it runs here; by default where it would.
    """
    memory = memory_bytes()
    shm = shutil.disk_usage("/dev/shm").total if Path("/dev/shm").is_dir() else 0
    folder = _existing(spill or os.environ.get("RAY_TMPDIR") or tempfile.gettempdir())
    return {
        "node": socket.gethostname(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "cpus": os.cpu_count() or 1,
        "memory_gb": round(memory / 1e9, 1),
        "shm_gb": round(shm / 1e9, 2),
        "store_gb": round((store_bytes or store_size(memory, shm)) / 1e9, 2),
        "disk_gb": round(shutil.disk_usage(folder).free / 1e9, 1),
        "spill": folder,
        "spill_device": _device(folder),
        "open_files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        "clock_s": None if sent_s is None else time.time() - sent_s,
        "gpus": _gpus(),
        "weights": None if model is None else (Path(model) / "config.json").is_file(),
        "root": os.geteuid() == 0,
    }


def judged(facts: dict[str, Any]) -> list[Finding]:
    """What its facts mean for a run."""
    found = [
        _python(facts["python"]),
        _room("shared memory", facts["shm_gb"], facts["store_gb"], "GB",
              "give the container more (--shm-size, or an emptyDir of medium Memory), or Ray less "
              "(--object-store-memory): an object store that does not fit is a file on a disk"),
        _room("disk for spilling", facts["disk_gb"], MIN_DISK_GB, f"GB free at {facts['spill']}",
              "free some, or start Ray with --temp-dir on a larger disk"),
        _room("open files", facts["open_files"], MIN_OPEN_FILES, "",
              "raise it (ulimit -n, LimitNOFILE, --ulimit nofile): Ray opens thousands of sockets"),
        _spill(facts["spill"], facts["spill_device"]),
    ]  # fmt: skip
    if facts["clock_s"] is not None and abs(facts["clock_s"]) > MAX_SKEW_S:
        found.append(_bad("clock", f"{facts['clock_s']:+.0f} s off", "let it follow NTP: S3 refuses such clocks"))
    found += [_gpu(gpu) for gpu in facts["gpus"]]
    if facts["gpus"]:
        found.append(_kernels(facts["versions"]))
    if facts["weights"] is False:
        found.append(
            _bad("weights", "the checkpoint folder is not there",
                 "mount it at the same path on each node, or copy it with `meddam fetch-weights`")
        )  # fmt: skip
    if facts["root"]:
        found.append(Finding(about="user", state="warning", said="runs as root", todo="run as another user"))
    return found


def together(nodes: Sequence[dict[str, Any]]) -> list[Finding]:
    """What nodes must have in common: the same versions of everything that rows and pickles pass through.

    A head may have the image for CPUs and workers the one for CUDA: builds (2.13.0+cpu) may differ, and kernels concern
    nodes with GPUs alone.
    """
    found = []
    for name in ("python", *PACKAGES):
        asked = [n for n in nodes if n["gpus"]] if name in OF_GPU_NODES else nodes
        values = {_release(n["python"] if name == "python" else n["versions"][name]) for n in asked}
        if len(values) > 1:
            said = ", ".join(sorted(str(v) for v in values))
            found.append(_bad(f"{name} of the nodes", said, "give all nodes the same image (cluster/Dockerfile)"))
    return found or [Finding(about="versions", state="ok", said=f"the same on {len(nodes)} node(s)")]


def _release(version: str | None) -> str | None:
    """A version without its build."""
    return None if version is None else version.partition("+")[0]


def store_size(memory: int, shm: int) -> float:
    """Bytes that Ray gives an object store which is not told its size (`resolve_object_store_memory` of Ray 2.60).

    A share of the memory, cut to the size of /dev/shm only where that is larger than 10 GB. A store that does not fit
    into /dev/shm comes to lie in Ray's temporary folder.

    Args:
        memory: bytes that the node may use. Ray takes its share of what is free when it starts, which is less.
        shm: bytes of /dev/shm.
    """
    return min(STORE_SHARE * memory, STORE_MOST_BYTES, max(STORE_NEVER_CUT_BYTES, STORE_OF_SHM * shm))


def memory_bytes(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """What this process may use: the machine's memory, or less where a container or a job has a limit.

    Args:
        root: where control groups are mounted, of version 2 or 1.
        own: the file that names this process's groups.
    """
    most = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for line in own.read_text().splitlines() if own.is_file() else []:
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        top, name = (root, "memory.max") if not controllers else (root / "memory", "memory.limit_in_bytes")
        here = top / path.lstrip("/")
        for folder in (here, *here.parents):  # a limit of a group holds for those in it
            text = (folder / name).read_text().strip() if (folder / name).is_file() else "max"
            most = min(most, int(text) if text.isdigit() else most)
            if folder == top:
                break
    return most


def _python(text: str) -> Finding:
    if (3, 11) <= tuple(int(p) for p in text.split(".")[:2]) < (3, 13):
        return Finding(about="python", state="ok", said=text)
    return _bad("python", text, "use 3.11 or 3.12")


def _room(about: str, has: float, wants: float, unit: str, todo: str) -> Finding:
    said = f"{has:g} {unit}".strip()
    if has >= wants:
        return Finding(about=about, state="ok", said=said)
    return Finding(about=about, state="warning", said=f"{said}, {wants:.3g} or more is advised", todo=todo)


def _existing(folder: str) -> str:
    """The folder, or what it will be made in."""
    at = Path(folder).absolute()
    return str(next(path for path in (at, *at.parents) if path.is_dir()))


def _device(folder: str) -> str:
    """What a folder lies on: memory, dm-crypt, or the kernel's name of the file system or device."""
    at = Path(folder).resolve()
    mounts = [line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    held = [m for m in mounts if at.is_relative_to(m[4].replace("\\040", " "))]
    best = max(held, key=lambda m: len(m[4]))
    kind, source = best[best.index("-") + 1 :][:2]
    if kind in ("tmpfs", "ramfs"):
        return "memory"
    uuid = Path(f"/sys/dev/block/{best[2]}/dm/uuid")
    return "dm-crypt" if uuid.exists() and uuid.read_text().startswith("CRYPT-") else source


def _spill(folder: str, device: str) -> Finding:
    """Where Ray's object store is written when it is full: pixels of patients, for a while."""
    if device in ("memory", "dm-crypt"):
        return Finding(about="spilled pixels", state="ok", said=f"stay in {device}")
    said = f"{device}, which holds {folder}, is not encrypted by this machine"
    todo = (
        "give that folder an encrypted volume (docs/security.md); one that the cloud encrypts cannot be told from here"
    )
    return Finding(about="spilled pixels", state="warning", said=said, todo=todo)


def _gpu(gpu: dict[str, Any]) -> Finding:
    major, minor = gpu["capability"]
    said = f"{gpu['name']}, {gpu['memory_gb']:.0f} GB, SM {major}.{minor}"
    if (major, minor) < MIN_CAPABILITY:
        todo = "DeepSpeed's kernels need SM 8.0 or later: captions are made by the torch engine here"
        return Finding(about="GPU", state="warning", said=said, todo=todo)
    if gpu["memory_gb"] < MIN_GPU_GB:
        todo = "DAM-3B in bfloat16 wants 16 GB with room for its cache: fewer --slots"
        return Finding(about="GPU", state="warning", said=said, todo=todo)
    return Finding(about="GPU", state="ok", said=said)


def _kernels(versions: dict[str, str | None]) -> Finding:
    """Whether the fast engine can be had. What its kernels do on this GPU, the run's own start-up check finds out."""
    if versions["deepspeed"] and versions["deepspeed-mii"]:
        compiler = shutil.which("nvcc")
        if compiler or os.environ.get("MEDDAM_OPS_CACHE"):
            said = f"deepspeed {versions['deepspeed']}, mii {versions['deepspeed-mii']}"
            return Finding(about="kernels", state="ok", said=said)
        todo = "take an image with the CUDA toolkit, or a filled MEDDAM_OPS_CACHE: otherwise engine torch is used"
        return Finding(about="kernels", state="warning", said="no nvcc to compile them with", todo=todo)
    todo = "install meddam[mii-kernels] (docs/engines.md): otherwise engine torch is used, which is slower on a GPU"
    return Finding(about="kernels", state="warning", said="DeepSpeed-MII is not installed", todo=todo)


def _bad(about: str, said: str, todo: str) -> Finding:
    return Finding(about=about, state="problem", said=said, todo=todo)


def _gpus() -> list[dict[str, Any]]:
    import torch

    if not torch.cuda.is_available():
        return []
    every = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [
        {"name": p.name, "memory_gb": p.total_memory / 1e9, "capability": (p.major, p.minor)} for p in every
    ]  # fmt: skip


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
