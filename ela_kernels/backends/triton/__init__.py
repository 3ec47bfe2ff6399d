"""Kernels in Triton: no build step, NVIDIA and AMD, and NumPy's interpreter for tests."""

from __future__ import annotations

import functools
import importlib.util
import os

import torch

from ela_kernels.backends.contract import KERNEL_OPS, Request
from ela_kernels.backends.gpu import GpuBackend, no_device_reason


class TritonBackend(GpuBackend):
    """The Triton kernels in `kernels/`."""

    name = "triton"
    # The loop over the maps is unrolled when Triton compiles: 20 seconds at 128 layers, minutes at 256.
    max_depth = 128
    ops = KERNEL_OPS | {"light_layer"}
    min_capability = (8, 0)

    @property
    def interprets(self) -> bool:
        """True under TRITON_INTERPRET=1: kernels run step by step in NumPy, to be tested and debugged."""
        return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")

    def unavailable_reason(self) -> str | None:
        problem = triton_problem()
        if problem is not None or self.interprets:
            return problem
        return no_device_reason()

    def call_reasons(self, request: Request) -> list[str]:
        if self.interprets and request.device.type == "cpu":
            request = request._replace(device=torch.device("cuda"))
        return super().call_reasons(request)

    def automatic_reasons(self, request: Request) -> list[str]:
        if request.device.type == "cpu":
            return ["on cpu it only interprets, for tests and when forced"]
        return super().automatic_reasons(request)

    def device_reason(self, device: torch.device) -> str | None:
        if self.interprets or torch.version.hip is not None:
            return None
        major, minor = torch.cuda.get_device_capability(device)
        if (major, minor) >= self.min_capability:
            return None
        return (
            f"Triton compiles for compute capability 8.0 and later, and {torch.cuda.get_device_name(device)} has "
            f"{major}.{minor}"
        )


@functools.cache
def triton_problem() -> str | None:
    """Why Triton cannot be imported, in one sentence; None where it can. It is looked for, not imported."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; run `pip install ela-kernels[triton]` (on Linux)"
    return None
