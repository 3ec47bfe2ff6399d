"""Parameters that take no part in a pass, where somebody waits for a gradient of each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ela_kernels.torch_internals import active_ddp


def expects_all_parameters() -> bool:
    """Whether `DistributedDataParallel` runs the pass, and is not told to look for parameters without a gradient."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return False
    wrapper = active_ddp()
    return wrapper is not None and not wrapper.find_unused_parameters


class _Tied(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor, *parameters: Tensor) -> Tensor:
        ctx.count = len(parameters)
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        # None: what the pass itself has a gradient for keeps it, and the rest is told that there is none.
        return (gradients[0], *(None,) * ctx.count)


def tied(out: Tensor, *modules: nn.Module | None) -> Tensor:
    """`out`, through which a backward reaches every parameter of `modules`, and brings nothing.

    `DistributedDataParallel` waits for all parameters, and takes zeros where there is no gradient.
    """
    return tied_to(
        out, *(p for module in modules if module is not None for p in module.parameters())
    )


def tied_to(out: Tensor, *tensors: Tensor) -> Tensor:
    """:func:`tied` for tensors, also such as something was worked out for: their parameters are reached too."""
    with_grad = [t for t in tensors if t.requires_grad]
    found: Tensor = _Tied.apply(out, *with_grad) if with_grad else out
    return found
