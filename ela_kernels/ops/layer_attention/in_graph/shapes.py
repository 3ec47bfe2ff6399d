"""Shapes and memory formats of what the operators give: what the compiler is told, and what the kernels are held to."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ela_kernels.backends.layout import accumulate_dtype, made_like
from ela_kernels.ops.layer_attention.in_graph.call import Call, Left


def none_like(like: Tensor) -> Tensor:
    """What stands for None among an operator's results, and in lists of its arguments."""
    return like.new_empty(0)


Promise = Callable[[], Tensor]
"""Makes an unwritten tensor of the shape, dtype and memory format that the compiler was told of."""


def as_promised(found: Tensor | None, promise: Promise, x: Tensor) -> Tensor:
    """A result in the memory format that the compiler was told of; zeros for what nothing flowed into.

    A map that kernels made with the strides of `x` is in it: to make another and look takes longer.
    """
    if found is not None and found.dtype == x.dtype and found.stride() == x.stride():
        return found
    promised = promise()
    if found is None or not promised.numel():
        return promised.zero_()
    if found.stride() == promised.stride() and found.dtype == promised.dtype:
        return found
    return promised.copy_(found)


def forward_promises(call: Call, keeps: bool) -> tuple[Promise, ...]:
    """Of the results of the forward, in their order."""
    x, batch = call.x, call.x.shape[0]
    dtype, depth = accumulate_dtype(x.dtype), len(call.keys) + 1
    normed = call.epilogue == "norm"

    def row() -> Tensor:
        return x.new_empty(x.shape[:2])

    def a_map() -> Tensor:
        return made_like(x)

    of_kl = (0,) if call.prev_weights is None else (batch, call.heads)
    return (
        a_map,
        lambda: x.new_empty((batch, call.heads, depth), dtype=dtype),
        lambda: x.new_empty(of_kl, dtype=dtype),
        row,
        a_map,
        row,
        row,
        a_map if normed and keeps else lambda: none_like(x),
        lambda: x.new_empty((2, x.shape[1]) if normed else (0,), dtype=dtype),
        lambda: x.new_empty(1),
    )


def forward_shapes(*args: Any) -> tuple[Tensor, ...]:
    return tuple(promise() for promise in forward_promises(Call(*args[:-1]), args[-1]))


class BackwardPromises(NamedTuple):
    """Of the results of the backward: the single ones in their order, and those of the pairs."""

    single: list[Promise]
    keys: list[Promise]
    values: list[Promise]


def backward_promises(call: Call, left: Left) -> BackwardPromises:
    x = call.x
    need_x, need_wq, need_wk, need_wv, need_prev, need_kept = left.needs
    normed = call.epilogue == "norm"

    def nothing() -> Tensor:
        return none_like(x)

    def a_map(wanted: bool) -> Promise:
        return (lambda: made_like(x)) if wanted else nothing

    def maybe(like: Tensor | None, wanted: bool) -> Promise:
        if like is None or not wanted:
            return nothing
        return partial(torch.empty_like, like, memory_format=torch.contiguous_format)

    return BackwardPromises(
        [
            a_map(need_x),
            maybe(call.wq, need_wq),
            maybe(call.wk, need_wk),
            maybe(call.wv, need_wv),
            maybe(call.prev_weights, need_prev),
            maybe(call.gamma, normed),
            maybe(call.beta, normed),
            maybe(left.weights, left.is_reached()),
            a_map(normed and left.dout is not None),
            a_map(call.kept is not None and need_kept),
        ],
        [maybe(left.query, need) for need in left.need_keys],
        [a_map(need) for need in left.need_values],
    )


def backward_shapes(*args: Any) -> tuple[Any, ...]:
    call, left = Call(*args[: len(Call._fields)]), Left(*args[len(Call._fields) :])
    single, keys, values = backward_promises(call, left)
    made = ([promise() for promise in some] for some in (keys, values))
    return (*(promise() for promise in single), *made)
