"""Telling failures apart: memory ran out, the device is lost, or something else is wrong."""

from __future__ import annotations

import torch

_LOST = ("CUDA error", "CUBLAS_STATUS_", "CUDNN_STATUS_", "cudaErrorIllegal", "device-side assert", "uncorrectable ECC")


def out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out, on a GPU or on the host. Less work at once may succeed."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and "allocate memory" in str(error)
    )


def lost_device(error: BaseException) -> bool:
    """Whether an error means that this process can no longer use its GPU: nothing but a new process helps."""
    if out_of_memory(error):
        return False
    accelerator_error = getattr(torch, "AcceleratorError", None)  # since torch 2.8
    if accelerator_error is not None and isinstance(error, accelerator_error):
        return True
    return isinstance(error, RuntimeError) and any(mark in str(error) for mark in _LOST)
