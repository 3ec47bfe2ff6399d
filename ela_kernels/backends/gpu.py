"""What the two backends of GPUs ask of a device and of PyTorch."""

from __future__ import annotations

import torch

from ela_kernels.backends.contract import FORWARD_ONLY_OPS, HALF_DTYPES, KERNEL_OPS, Backend


class GpuBackend(Backend):
    device_types = frozenset({"cuda"})
    dtypes = frozenset({torch.float32}) | HALF_DTYPES
    ops = KERNEL_OPS
    forward_only_ops = FORWARD_ONLY_OPS


def no_device_reason() -> str | None:
    """Why PyTorch itself has no GPU here. Does not initialise CUDA."""
    if torch.cuda.is_available():
        return None
    if torch.version.cuda is None and torch.version.hip is None:
        return (
            "this PyTorch was built for the CPU alone; install one built for your GPU (pytorch.org)"
        )
    return "PyTorch finds no GPU here (torch.cuda.is_available() is False): no device, or a driver too old for it"
