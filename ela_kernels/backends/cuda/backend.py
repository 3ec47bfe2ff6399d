"""The backend of NVIDIA's GPUs."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from ela_kernels.backends import extension as built
from ela_kernels.backends.contract import ATTENTION_OPS, MIX_OPS, POSITION_OPS
from ela_kernels.backends.cuda import attention, layer, mix, position, producer
from ela_kernels.backends.cuda import norm as norms
from ela_kernels.backends.gpu import GpuBackend, no_device_reason
from ela_kernels.backends.gpu_tables import GpuContribution, ProducerGradients
from ela_kernels.backends.position import (
    PositionCall,
    PositionGradients,
    PositionLeft,
    PositionNeeds,
)
from ela_kernels.backends.types import (
    Filters,
    Gradients,
    LayerForward,
    MixGradients,
    NormAct,
    NormGradients,
    Saved,
)


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

    def attend(
        self,
        q: Tensor,
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        heads: int,
        scale: float,
        prev_weights: Tensor | None,
        channels_last: bool,
        tolerance: float = 0.0,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        return attention.attend(
            q, keys, values, heads, scale, prev_weights, channels_last, tolerance
        )

    def weights(
        self,
        q: Tensor,
        keys: Sequence[Tensor],
        heads: int,
        scale: float,
        prev_weights: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        return attention.weights(q, keys, heads, scale, prev_weights)

    def attend_backward(
        self,
        saved: Saved,
        dout: Tensor | None,
        dweights: Tensor | None,
        dkl: Tensor | None,
        need_q: bool,
        need_prev: bool,
        need_keys: Sequence[bool] = (),
        need_values: Sequence[bool] = (),
        into: Tensor | None = None,
    ) -> Gradients:
        return attention.attend_backward(
            saved, dout, dweights, dkl, need_q, need_prev, need_keys, need_values, into
        )

    def gather(
        self,
        contributions: Sequence[GpuContribution],
        index: int,
        heads: int,
        channels_last: bool,
        need_key: bool,
        need_value: bool,
    ) -> tuple[Tensor | None, Tensor | None]:
        return attention.gather(contributions, index, heads, channels_last, need_key, need_value)

    def retrieve(
        self,
        x: Tensor,
        filters: Filters,
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        heads: int,
        scale: float,
        prev_weights: Tensor | None,
        has_residual: bool,
        wants_statistics: bool,
        tolerance: float,
    ) -> LayerForward:
        return layer.retrieve(
            x,
            filters,
            keys,
            values,
            heads,
            scale,
            prev_weights,
            has_residual,
            wants_statistics,
            tolerance,
        )

    def produce_backward(
        self,
        x: Tensor,
        filters: Filters,
        mean: Tensor,
        dq: Tensor | None,
        dk: Tensor | None,
        dv: Tensor | None,
        residual: Tensor | None,
        needs: Sequence[bool],
    ) -> ProducerGradients:
        return producer.produce_backward(x, filters, mean, dq, dk, dv, residual, needs)

    def norm_forward(self, o: Tensor, x: Tensor, statistics: Tensor, norm: NormAct) -> Tensor:
        return norms.norm_forward(o, x, statistics, norm)

    def norm_backward(
        self,
        o: Tensor,
        dout: Tensor,
        statistics: Tensor,
        norm: NormAct,
        also: Tensor | None = None,
    ) -> NormGradients:
        return norms.norm_backward(o, dout, statistics, norm, also)

    def mix(self, weights: Tensor, values: Sequence[Tensor], channels_last: bool) -> Tensor:
        return mix.mix(weights, values, channels_last)

    def mix_backward(
        self,
        weights: Tensor,
        values: Sequence[Tensor],
        dout: Tensor,
        channels_last: bool,
        need_weights: bool,
        need_values: Sequence[bool],
    ) -> MixGradients:
        return mix.mix_backward(weights, values, dout, channels_last, need_weights, need_values)

    def position_attend(self, call: PositionCall) -> tuple[Tensor, Tensor, Tensor | None]:
        return position.position_attend(call)

    def position_attend_backward(
        self,
        call: PositionCall,
        weights: Tensor,
        dout: Tensor | None,
        dweights: Tensor | None,
        dkl: Tensor | None,
        needs: PositionNeeds,
    ) -> PositionGradients:
        return position.position_attend_backward(call, weights, dout, dweights, dkl, needs)

    def position_gather(
        self, value: Tensor, left: Sequence[PositionLeft], index: int, channels_last: bool
    ) -> Tensor:
        return position.position_gather(value, left, index, channels_last)


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
