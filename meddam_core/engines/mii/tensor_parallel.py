"""One language model over several processes, each with a part of every layer (for models larger than one GPU).

    # torchrun --nproc-per-node 2 serve.py
    dam = load_dam(folder, device=f"cuda:{rank}", dtype=torch.bfloat16)
    if rank == 0:
        engine = MiiEngine(dam, tp_size=2)       # an engine like any other; close() lets the others go
    else:
        follow(dam, tp_size=2)                   # of mii.follower; returns when rank 0 closes its engine

Rank 0 schedules, chooses tokens and runs the vision tower; every forward and every release is announced to the others,
which do the same. Announcements go over gloo, the layers' sums over the device's own backend. The weights are cut by
DeepSpeed. Running out of memory is not survived here: the ranks would part.

Tested: two processes on a CPU, torch kernels, gloo. Not tested: NCCL, compiled kernels on several GPUs.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed


@dataclass(frozen=True, slots=True)
class TensorGroup:
    """The processes that share a model."""

    rank: int
    size: int
    control: Any
    """A gloo process group for announcements."""
    owned: bool
    """Whether `join` made the default process group, and `leave` ends it."""

    def send(self, message: object) -> None:
        """From rank 0 to all others."""
        torch.distributed.broadcast_object_list([message], src=0, group=self.control)

    def receive(self) -> Any:
        """What rank 0 sent."""
        box: list[Any] = [None]
        torch.distributed.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def smallest(self, value: int) -> int:
        """The smallest of all ranks' values."""
        box = torch.tensor(value)
        torch.distributed.all_reduce(box, torch.distributed.ReduceOp.MIN, group=self.control)
        return int(box)

    def leave(self) -> None:
        """Ends what `join` began."""
        from deepspeed.comm import comm

        if self.owned:
            torch.distributed.destroy_process_group()
            comm.cdb = None  # DeepSpeed would take the group for a living one


def join(size: int, device: torch.device) -> TensorGroup:
    """Meets the other processes, through RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT if no process group exists yet.

    Raises ValueError unless exactly `size` processes take part.
    """
    owned = not torch.distributed.is_initialized()
    if owned:
        missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if missing:
            raise ValueError(f"tp_size is {size}, and {', '.join(missing)} are not set: start with torchrun")
        torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    world = torch.distributed.get_world_size()
    if world != size:
        raise ValueError(f"tp_size is {size} and {world} processes take part; an engine uses all of its processes")
    control = torch.distributed.new_group(backend="gloo")
    return TensorGroup(torch.distributed.get_rank(), size, control, owned)
