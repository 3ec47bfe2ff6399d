"""What a backend is: a name, a reason why it cannot run here, and reasons why it cannot serve one call."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Request(NamedTuple):
    """The facts about one call that decide which backend can serve it.

    Hashable on purpose: the choice is cached, so that a training step does not pay for it.
    """

    op: str
    device_type: str
    dtype: torch.dtype
    depth: int
    needs_grad: bool


class Backend:
    """Base of the backends; the limits are class constants, so that they can be listed."""

    name: str
    device_types: frozenset[str] | None = None
    dtypes: frozenset[torch.dtype] | None = None
    ops: frozenset[str] | None = None
    forward_only_ops: frozenset[str] = frozenset()

    def unavailable_reason(self) -> str | None:
        """Why this backend cannot run on this machine, or None when it can."""
        return None

    def not_supported_reasons(self, request: Request) -> list[str]:
        """One sentence for each thing about `request` that this backend cannot serve."""
        reasons = []
        unavailable = self.unavailable_reason()
        if unavailable is not None:
            reasons.append(unavailable)
        if self.ops is not None and request.op not in self.ops:
            reasons.append(f"it has no kernel for {request.op}")
        if self.device_types is not None and request.device_type not in self.device_types:
            served = ", ".join(sorted(self.device_types))
            reasons.append(f"it serves tensors on {served}, and these are on {request.device_type}")
        if self.dtypes is not None and request.dtype not in self.dtypes:
            served = ", ".join(sorted(str(d).removeprefix("torch.") for d in self.dtypes))
            reasons.append(f"it serves {served}, and the values are {request.dtype}")
        if request.needs_grad and request.op in self.forward_only_ops:
            reasons.append(
                f"its {request.op} has no backward, and an input requires grad: "
                "call it under torch.no_grad() or detach the inputs"
            )
        return reasons


class EagerBackend(Backend):
    """Plain PyTorch: the reference and the fallback. Serves every call, on any device."""

    name = "eager"


FLOAT_DTYPES = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})


class CppBackend(Backend):
    """The compiled CPU kernels in `csrc/cpu`."""

    name = "cpp"
    device_types = frozenset({"cpu"})
    dtypes = FLOAT_DTYPES
    ops = frozenset({"layer_attention", "layer_attention_weights"})
    forward_only_ops = frozenset({"layer_attention_weights"})

    def unavailable_reason(self) -> str | None:
        from ela_kernels.backends.extension import extension, extension_problem

        module = extension()
        if module is None:
            return extension_problem()
        try:
            module.simd_level()
        except ValueError as error:  # ELA_KERNELS_SIMD names what this processor or build has not
            return str(error)
        return None


class TritonBackend(Backend):
    """Reserved name: the GPU kernels in Triton are not part of this release."""

    name = "triton"
    device_types = frozenset({"cuda"})

    def unavailable_reason(self) -> str | None:
        return "this release of ela_kernels has no Triton kernels yet"


class CudaBackend(Backend):
    """Reserved name: the GPU kernels in CUDA C++ are not part of this release."""

    name = "cuda"
    device_types = frozenset({"cuda"})

    def unavailable_reason(self) -> str | None:
        return "this release of ela_kernels has no CUDA kernels yet"
