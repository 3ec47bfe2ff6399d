"""Sums of values by given weights. Arguments are checked already."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ela_kernels.backends.cpp.addresses import maps, one_map
from ela_kernels.backends.cpp.attention import (
    DTYPE_CODES,
    aggregate_workspace,
    backward_workspace,
    kernels,
    new_map,
    new_workspace,
    thread_count,
)
from ela_kernels.backends.layout import contiguous, is_interleaved, kernel_sizes, resolved
from ela_kernels.backends.memory import address
from ela_kernels.backends.types import MixGradients


def mix(weights: Tensor, values: Sequence[Tensor], channels_last: bool) -> Tensor:
    """`sum_t weights[..., t] * values[t]`."""
    return _mixed(contiguous(weights), 0, values, channels_last)


def _mixed(weights: Tensor, first: int, values: Sequence[Tensor], channels_last: bool) -> Tensor:
    """The sum by some columns of contiguous weights, from `first` on, one for each value."""
    like, depth = values[-1], len(values)
    interleaved = is_interleaved(like, channels_last)
    sizes = kernel_sizes(like, weights.shape[1], channels_last, interleaved)
    where, strides, copies = maps([resolved(v) for v in values], channels_last, interleaved)
    out, out_view = new_map(like, sizes, channels_last, like.dtype)
    workspace = new_workspace(aggregate_workspace(sizes, depth), weights.dtype)
    kernels().mix(
        DTYPE_CODES[like.dtype],
        sizes=sizes,
        weights=address(weights, "weights") + first * weights.element_size(),
        weight_stride=weights.shape[2],
        values=where,
        value_strides=strides,
        out=out_view,
        workspace=address(workspace),
        threads=thread_count(like.numel() * depth),
    )
    del copies
    return out


def mix_backward(
    weights: Tensor,
    values: Sequence[Tensor],
    dout: Tensor,
    channels_last: bool,
    need_weights: bool,
    need_values: Sequence[bool],
) -> MixGradients:
    """Gradients of weights and values, in one read of all where those of the weights are wanted."""
    weights, dout = contiguous(weights), resolved(dout)
    dvalues: list[Tensor | None] = [None] * len(need_values)
    if not need_weights:
        # By one source at a time: the gradient that arrives is read for each, and no value at all.
        for j, needed in enumerate(need_values):
            if needed:
                dvalues[j] = _mixed(weights, j, (dout,), channels_last)
        return MixGradients(None, dvalues)
    like, depth = values[-1], len(values)
    interleaved = is_interleaved(like, channels_last)
    sizes = kernel_sizes(like, weights.shape[1], channels_last, interleaved)
    where, strides, copies = maps([resolved(v) for v in values], channels_last, interleaved)
    dout_view, dout = one_map(dout, channels_last, interleaved, "gradient of the output")
    dvalue_addresses: list[int] = []
    dvalue_strides: list[int] = []
    if any(need_values):
        made = [new_map(like, sizes, channels_last) if n else None for n in need_values]
        dvalues = [None if m is None else m[0] for m in made]
        if like.numel():  # an empty map has no address, and needs no kernel
            dvalue_addresses = [0 if m is None else m[1][0] for m in made]
            dvalue_strides = [*next(m[1][1:] for m in made if m is not None)]
    dweights = torch.empty_like(weights)
    workspace = new_workspace(backward_workspace(sizes, depth), weights.dtype)
    kernels().mix_backward(
        DTYPE_CODES[like.dtype],
        sizes=sizes,
        weights=address(weights, "weights"),
        values=where,
        value_strides=strides,
        dout=dout_view,
        dweights=address(dweights),
        dvalues=dvalue_addresses,
        dvalue_strides=dvalue_strides,
        workspace=address(workspace),
        threads=thread_count(like.numel() * depth),
    )
    del copies
    return MixGradients(dweights, dvalues)
