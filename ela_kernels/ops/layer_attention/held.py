"""Values that a history holds in half precision, under layers of a wider dtype.

A layer reads `round(v) = v.to(dtype).to(v.dtype)`, whoever computes it, and the gradient of the rounding is taken to be
the identity. PyTorch would have it pass a tensor of the narrow dtype, and be rounded there once for each layer that
sends one. So what is held has no gradient of its own; beside it stands a tensor of the value's shape and dtype, without
content, that leads gradients to where the value was made.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ela_kernels.backends.memory import check_not_freed

HELD_DTYPES = (torch.bfloat16, torch.float16)


def check_history_dtype(dtype: object, name: str = "dtype") -> torch.dtype | None:
    """What a history can be told to hold values in; None: as they are."""
    if dtype is None:
        return None
    if not isinstance(dtype, torch.dtype):
        raise TypeError(
            f"{name}: got {type(dtype).__name__}; allowed is torch.bfloat16, torch.float16 or None"
        )
    if dtype not in HELD_DTYPES:
        raise ValueError(
            f"{name}: got {dtype}; allowed is torch.bfloat16 or torch.float16, for values of a wider dtype, or None, "
            "which holds them as they are"
        )
    return dtype


class _Rounded(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(v: Tensor, dtype: torch.dtype) -> Tensor:
        return v.to(dtype).to(v.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _RoundedForward(_Rounded):
    """With a forward derivative, which no graph can be compiled with."""

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        return tangent.view_as(tangent)


class _StandIn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, v: Tensor) -> Tensor:
        return stand_in_like(v)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class _Widened(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, stand_in: Tensor, held: Tensor) -> Tensor:
        return held.to(stand_in.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def rounded(v: Tensor, dtype: torch.dtype) -> Tensor:
    """`v.to(dtype).to(v.dtype)`, with the identity for a gradient: what a layer reads of a value, in its own dtype."""
    check_not_freed("v", v)
    function = _Rounded if torch.compiler.is_compiling() else _RoundedForward
    found: Tensor = function.apply(v, dtype)
    return found


def stand_in_like(v: Tensor) -> Tensor:
    """A tensor of the shape and dtype of `v` in the memory of one element, which nobody reads."""
    return torch.empty_strided(v.shape, (0,) * v.dim(), dtype=v.dtype, device=v.device)


def narrowed(v: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """`v` as it is held, without a gradient, and what leads gradients to `v`; None where none has to be led."""
    check_not_freed("v", v)
    stand_in = _StandIn.apply(v) if v.requires_grad and torch.is_grad_enabled() else None
    return v.detach().to(dtype), stand_in


def widened(held: Tensor, stand_in: Tensor | None, dtype: torch.dtype) -> Tensor:
    """A value that is held as layers of `dtype` read it, with its gradient."""
    check_not_freed("values", held)
    if stand_in is None:
        return held.to(dtype)
    # The history goes on with what is made here, also after a layer without gradients.
    with torch.enable_grad():
        found: Tensor = _Widened.apply(stand_in, held)
    return found
