"""Shapes and memory formats of what the operators give: what the compiler is told, and what the kernels are held to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ela_kernels.backends.layout import accumulate_dtype, made_like
from ela_kernels.ops.layer_attention.in_graph.call import Call, Left


def none_like(like: Tensor) -> Tensor:
    """What stands for None among an operator's results, and in lists of its arguments."""
    return like.new_empty(0)


def described(x: Tensor) -> Tensor:
    """`x` without memory, so that what is promised beside it takes none either while a graph runs."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


def as_promised(found: Tensor | None, promised: Tensor, device: torch.device) -> Tensor:
    """A result in the memory format that the compiler was told of; zeros for what nothing flowed into."""
    sizes, strides, dtype = promised.shape, promised.stride(), promised.dtype
    if found is None or not promised.numel():
        return torch.empty_strided(sizes, strides, dtype=dtype, device=device).zero_()
    if found.stride() == strides and found.dtype == dtype:
        return found
    return torch.empty_strided(sizes, strides, dtype=dtype, device=device).copy_(found)


def forward_shapes(*args: Any) -> tuple[Tensor, ...]:
    call, keeps = Call(*args[:-1]), args[-1]
    x, batch = call.x, call.x.shape[0]
    dtype, depth = accumulate_dtype(x.dtype), len(call.keys) + 1
    row = x.new_empty(x.shape[:2])
    normed = call.epilogue == "norm"
    return (
        made_like(x),
        x.new_empty((batch, call.heads, depth), dtype=dtype),
        x.new_empty((0,) if call.prev_weights is None else (batch, call.heads), dtype=dtype),
        row,
        made_like(x),
        torch.empty_like(row),
        torch.empty_like(row),
        made_like(x) if normed and keeps else none_like(x),
        x.new_empty((2, x.shape[1]) if normed else (0,), dtype=dtype),
        x.new_empty(1),
    )


def backward_shapes(*args: Any) -> tuple[Any, ...]:
    call, left = Call(*args[: len(Call._fields)]), Left(*args[len(Call._fields) :])
    x = call.x
    need_x, need_wq, need_wk, need_wv, need_prev, need_kept = left.needs
    normed = call.epilogue == "norm"

    def maybe(like: Tensor | None, wanted: bool) -> Tensor:
        if like is None or not wanted:
            return none_like(x)
        return torch.empty_like(like, memory_format=torch.contiguous_format)

    def maybe_map(wanted: bool) -> Tensor:
        return made_like(x) if wanted else none_like(x)

    return (
        maybe_map(need_x),
        maybe(call.wq, need_wq),
        maybe(call.wk, need_wk),
        maybe(call.wv, need_wv),
        maybe(call.prev_weights, need_prev),
        maybe(call.gamma, normed),
        maybe(call.beta, normed),
        maybe(left.weights, left.is_reached()),
        maybe_map(normed and left.dout is not None),
        maybe_map(call.kept is not None and need_kept),
        [maybe(left.query, need) for need in left.need_keys],
        [maybe_map(need) for need in left.need_values],
    )
