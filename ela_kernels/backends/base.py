"""What a backend is: a name, a reason why it cannot run here, and reasons why it cannot serve one call."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.autograd import forward_ad


class Request(NamedTuple):
    """The facts about one call that decide which backend can serve it.

    Hashable on purpose: the choice is cached, so that a training step does not pay for it.
    """

    op: str
    device: torch.device
    dtype: torch.dtype
    depth: int
    needs_grad: bool
    transformed: bool = False


def is_transformed() -> bool:
    """Whether PyTorch has to see every operation: `torch.func`, forward-mode derivatives, `torch.jit.trace`.

    A kernel reads the memory of its tensors, and would leave out what belongs to them beside it.
    """
    return (
        torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
    )


class Backend:
    """Base of the backends; the limits are class constants, so that they can be listed."""

    name: str
    device_types: frozenset[str] | None = None
    dtypes: frozenset[torch.dtype] | None = None
    ops: frozenset[str] | None = None
    forward_only_ops: frozenset[str] = frozenset()
    max_depth: int | None = None
    reads_memory = True

    def unavailable_reason(self) -> str | None:
        """Why this backend cannot run on this machine, or None when it can."""
        return None

    def device_reason(self, device: torch.device) -> str | None:
        """Why this backend cannot run on one of the devices of a type that it serves, or None when it can."""
        return None

    def call_reasons(self, request: Request) -> list[str]:
        """One sentence for each thing about `request` itself that this backend cannot serve; asks no device."""
        reasons = []
        if self.ops is not None and request.op not in self.ops:
            reasons.append(f"it has no kernel for {request.op}")
        if self.device_types is not None and request.device.type not in self.device_types:
            served = ", ".join(sorted(self.device_types))
            reasons.append(f"it serves tensors on {served}, and these are on {request.device.type}")
        if self.dtypes is not None and request.dtype not in self.dtypes:
            served = ", ".join(sorted(str(d).removeprefix("torch.") for d in self.dtypes))
            reasons.append(f"it serves {served}, and the values are {request.dtype}")
        if self.max_depth is not None and request.depth > self.max_depth:
            reasons.append(
                f"it serves up to {self.max_depth} layers in one history, and these are {request.depth}"
            )
        if request.transformed and self.reads_memory:
            reasons.append(
                "it has no rules for torch.func, for forward-mode derivatives and for torch.jit.trace: "
                "call it outside of them"
            )
        if request.needs_grad and request.op in self.forward_only_ops:
            reasons.append(
                f"its {request.op} has no backward, and an input requires grad: "
                "call it under torch.no_grad() or detach the inputs"
            )
        return reasons

    def not_supported_reasons(self, request: Request) -> list[str]:
        """One sentence for each reason why this backend cannot serve `request`; empty when it can."""
        reasons = self.call_reasons(request)
        unavailable = self.unavailable_reason()
        if unavailable is None and not reasons:
            unavailable = self.device_reason(request.device)
        return reasons if unavailable is None else [unavailable, *reasons]

    def automatic_reasons(self, request: Request) -> list[str]:
        """Why `auto` does not take this backend for `request`; empty when it does.

        Devices are asked only for calls that are theirs: a process that computes on the CPU must not wake a driver,
        which would keep the processes that it forks from using the GPU.
        """
        return self.call_reasons(request) or self.not_supported_reasons(request)


class EagerBackend(Backend):
    """Plain PyTorch: the reference and the fallback. Serves every call, on any device."""

    name = "eager"
    reads_memory = False


HALF_DTYPES = frozenset({torch.bfloat16, torch.float16})
KERNEL_OPS = frozenset({"layer_attention", "layer_attention_weights"})
FORWARD_ONLY_OPS = frozenset({"layer_attention_weights"})


class CppBackend(Backend):
    """The compiled CPU kernels in `csrc/cpu`."""

    name = "cpp"
    device_types = frozenset({"cpu"})
    dtypes = frozenset({torch.float64, torch.float32}) | HALF_DTYPES
    ops = KERNEL_OPS | {"light_layer"}
    forward_only_ops = FORWARD_ONLY_OPS

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
