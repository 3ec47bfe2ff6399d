"""The two backends of GPUs, and what they ask of a device, a driver and a build."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence

import torch

from ela_kernels.backends.base import FORWARD_ONLY_OPS, HALF_DTYPES, KERNEL_OPS, Backend, Request


class _GpuBackend(Backend):
    device_types = frozenset({"cuda"})
    dtypes = frozenset({torch.float32}) | HALF_DTYPES
    ops = KERNEL_OPS
    forward_only_ops = FORWARD_ONLY_OPS


def _no_device_reason() -> str | None:
    """Why PyTorch itself has no GPU here. Does not initialise CUDA."""
    if torch.cuda.is_available():
        return None
    if torch.version.cuda is None and torch.version.hip is None:
        return (
            "this PyTorch was built for the CPU alone; install one built for your GPU (pytorch.org)"
        )
    return "PyTorch finds no GPU here (torch.cuda.is_available() is False): no device, or a driver too old for it"


class CudaBackend(_GpuBackend):
    """The compiled CUDA kernels in `csrc/cuda`."""

    name = "cuda"
    max_depth = 256  # that many pointers go by value

    def unavailable_reason(self) -> str | None:
        from ela_kernels.backends.extension import build_info, extension, extension_problem

        module = extension()
        if module is None:
            return extension_problem()
        if not module.has_cuda:
            left_out = build_info().get("cuda_problem") or "the build had no nvcc"
            return (
                f"the compiled extension was built without CUDA: {left_out}; reinstall ela_kernels where nvcc is, with "
                "ELA_KERNELS_BUILD=cuda to see what is missing"
            )
        if torch.version.hip is not None:
            return "this PyTorch is built for AMD GPUs, and these kernels are CUDA C++; the triton backend serves those"
        return _no_device_reason() or _driver_reason()

    def device_reason(self, device: torch.device) -> str | None:
        from ela_kernels.backends.extension import build_info

        capability = torch.cuda.get_device_capability(device)
        return architecture_reason(
            build_info().get("cuda_architectures", ()),
            capability,
            torch.cuda.get_device_name(device),
        )


@functools.cache
def _driver_reason() -> str | None:
    """What the CUDA runtime linked into the extension says of the driver: it may be newer than PyTorch's."""
    from ela_kernels.backends.extension import extension

    module = extension()
    assert module is not None
    problem = module.cuda_devices()["problem"]
    if problem is None:
        return None
    version = module.cuda_runtime_version()
    built_with = f"{version // 1000}.{version % 1000 // 10}"
    return (
        f"the CUDA {built_with} runtime that the extension was built with finds no device: {problem}; update the "
        "driver, or reinstall ela_kernels with an older nvcc"
    )


def architecture_reason(
    built: Sequence[str], capability: tuple[int, int], device_name: str
) -> str | None:
    """Why a build for the architectures `built` (`"9.0"`, `"9.0a"`, `"12.0+PTX"`) has no code for a device."""
    major, minor = capability
    for entry in built:
        name, _, ptx = entry.partition("+")
        number = name.rstrip("af")
        entry_major, entry_minor = (int(part) for part in number.split("."))
        if name.endswith("a"):
            serves = (entry_major, entry_minor) == capability
        else:
            serves = entry_major == major and entry_minor <= minor
        if serves or (ptx and not name.endswith("a") and (entry_major, entry_minor) <= capability):
            return None
    return (
        f"the compiled extension holds code for {', '.join(built) or 'no architecture'}, and {device_name} has compute "
        f"capability {major}.{minor}; reinstall ela_kernels with TORCH_CUDA_ARCH_LIST={major}.{minor}"
    )


class TritonBackend(_GpuBackend):
    """The Triton kernels in `ela_kernels/ops/layer_attention/triton_kernels`."""

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
        return _no_device_reason()

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
    import importlib.util

    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; run `pip install ela-kernels[triton]` (on Linux)"
    return None
