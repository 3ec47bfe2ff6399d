"""Sums of values by given weights, and their gradients. Arguments are checked already."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ela_kernels.backends.cuda import attention as cuda
from ela_kernels.backends.gpu_tables import alike_maps, compact_strides, map_view, mix_gradients
from ela_kernels.backends.layout import (
    contiguous,
    empty_map,
    is_interleaved,
    kernel_sizes,
    resolved,
)
from ela_kernels.backends.memory import address, addresses, check_readable
from ela_kernels.backends.types import MixGradients


def mix(weights: Tensor, values: Sequence[Tensor], channels_last: bool) -> Tensor:
    """`sum_t weights[..., t] * values[t]` in one launch."""
    return _mixed(contiguous(weights), 0, [resolved(v) for v in values], channels_last)


def _mixed(weights: Tensor, first: int, values: Sequence[Tensor], channels_last: bool) -> Tensor:
    """The sum by some columns of contiguous weights, from `first` on, one for each value."""
    like, depth = values[-1], len(values)
    check_readable(like.get_device(), ("weights", "values"), (weights, like))
    interleaved = is_interleaved(like, channels_last)
    out = empty_map(like, channels_last, interleaved)
    if not like.numel():
        return out
    sizes = kernel_sizes(like, weights.shape[1], channels_last, interleaved)
    values, strides = alike_maps(values, channels_last, interleaved)
    column = address(weights, "weights")
    # What gathers a value's gradient, a sum of maps by columns of earlier weights, without a key.
    cuda._launched(
        cuda._kernels().cuda_gather(
            cuda._device(like),
            cuda._DTYPE_CODES[like.dtype],
            sizes=sizes,
            queries=[],
            query_stride=0,
            score_columns=[],
            score_strides=[],
            dkey=0,
            douts=addresses(values),
            dout_strides=strides,
            weight_columns=[column + 4 * t for t in range(first, first + depth)],
            weight_strides=[weights.shape[2]] * depth,
            tolerances=[0.0] * depth,
            dvalue=(address(out), *compact_strides(sizes)),
        )
    )
    return out


def mix_backward(
    weights: Tensor,
    values: Sequence[Tensor],
    dout: Tensor,
    channels_last: bool,
    need_weights: bool,
    need_values: Sequence[bool],
) -> MixGradients:
    """Gradients of weights and values: two launches, or without those of the weights one for each value."""
    weights, dout = contiguous(weights), resolved(dout)
    if not need_weights:
        return MixGradients(
            None,
            [
                _mixed(weights, t, (dout,), channels_last) if needed else None
                for t, needed in enumerate(need_values)
            ],
        )
    values = [resolved(v) for v in values]
    like, depth = values[-1], len(values)
    names = "weights", "values", "gradient of the output"
    check_readable(like.get_device(), names, (weights, like, dout))
    interleaved = is_interleaved(like, channels_last)
    sizes = kernel_sizes(like, weights.shape[1], channels_last, interleaved)
    dweights, dvalues = mix_gradients(weights, like, channels_last, need_values)
    assert dweights is not None
    if not like.numel():
        return MixGradients(dweights.zero_(), dvalues)
    dout, dout_view = map_view(dout, channels_last, interleaved)
    values, strides = alike_maps(values, channels_last, interleaved)
    code = cuda._DTYPE_CODES[like.dtype]
    elements = cuda._backward_workspace(code, sizes, depth)
    workspace = torch.empty(elements, dtype=torch.float32, device=like.device)
    cuda._launched(
        cuda._kernels().cuda_mix_backward(
            cuda._device(like),
            code,
            sizes=sizes,
            weights=address(weights, "weights"),
            values=addresses(values),
            value_strides=strides,
            dout=dout_view,
            dweights=address(dweights),
            dvalues=[address(d) for d in dvalues] if any(need_values) else [],
            dvalue_strides=compact_strides(sizes),
            workspace=address(workspace),
        )
    )
    return MixGradients(dweights, dvalues)
