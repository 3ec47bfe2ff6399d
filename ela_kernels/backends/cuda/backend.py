"""The backend of NVIDIA's GPUs: its limits, and which function does what the contract asks for."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from ela_kernels.backends import extension as built
from ela_kernels.backends.contract import ATTENTION_OPS, MIX_OPS, POSITION_OPS
from ela_kernels.backends.cuda import attention, layer, norm, position, producer
from ela_kernels.backends.cuda import mix as mixes
from ela_kernels.backends.gpu import GpuBackend, no_device_reason


class CudaBackend(GpuBackend):
    """The compiled CUDA kernels in `csrc/cuda`."""

    name = "cuda"
    max_depth = 256  # that many pointers go by value
    ops = ATTENTION_OPS | MIX_OPS | POSITION_OPS

    def unavailable_reason(self) -> str | None:
        module = built.extension()
        if module is None:
            return built.extension_problem()
        if not module.has_cuda:
            left_out = built.build_info().get("cuda_problem") or "the build had no nvcc"
            return (
                f"the compiled extension was built without CUDA: {left_out}; reinstall ela_kernels where nvcc is, with "
                "ELA_KERNELS_BUILD=cuda to see what is missing"
            )
        if torch.version.hip is not None:
            return "this PyTorch is built for AMD GPUs, and these kernels are CUDA C++; the triton backend serves those"
        return no_device_reason() or _driver_reason()

    def device_reason(self, device: torch.device) -> str | None:
        capability = torch.cuda.get_device_capability(device)
        return architecture_reason(
            built.build_info().get("cuda_architectures", ()),
            capability,
            torch.cuda.get_device_name(device),
        )

    attend = staticmethod(attention.attend)
    weights = staticmethod(attention.weights)
    attend_backward = staticmethod(attention.attend_backward)
    gather = staticmethod(attention.gather)
    retrieve = staticmethod(layer.retrieve)
    produce_backward = staticmethod(producer.produce_backward)
    norm_forward = staticmethod(norm.norm_forward)
    norm_backward = staticmethod(norm.norm_backward)
    mix = staticmethod(mixes.mix)
    mix_backward = staticmethod(mixes.mix_backward)
    position_attend = staticmethod(position.position_attend)
    position_attend_backward = staticmethod(position.position_attend_backward)
    position_gather = staticmethod(position.position_gather)


@functools.cache
def _driver_reason() -> str | None:
    """What the CUDA runtime linked into the extension says of the driver: it may be newer than PyTorch's."""
    module = built.extension()
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
