"""Launches of a sum of values by given weights, and of its backward. Arguments are checked already."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ela_kernels.backends.gpu_tables import alike_maps, compact_strides, mix_gradients
from ela_kernels.backends.layout import (
    contiguous,
    empty_map,
    is_interleaved,
    kernel_sizes,
    resolved,
)
from ela_kernels.backends.memory import check_readable
from ela_kernels.backends.triton.attention import flags, guard, padded, units
from ela_kernels.backends.triton.kernels.backward import (
    depth_mix_bwd_tail_kernel,
    layer_attention_bwd_dots_kernel,
)
from ela_kernels.backends.triton.kernels.forward import layer_attention_fwd_kernel
from ela_kernels.backends.triton.plan import bucket, encoded, make_plan
from ela_kernels.backends.types import MixGradients

# Numbers that one step of the tail holds.
_TAIL_ELEMENTS = 512


def mix(weights: Tensor, values: Sequence[Tensor], channels_last: bool) -> Tensor:
    """`sum_t weights[..., t] * values[t]` in one launch."""
    return _mixed(weights, [resolved(v) for v in values], channels_last)


def _mixed(weights: Tensor, values: Sequence[Tensor], channels_last: bool) -> Tensor:
    """Of weights `[B, G, T]` for these values, which may be columns of others."""
    like, depth, heads = values[-1], len(values), weights.shape[1]
    check_readable(like.get_device(), ("weights", "values"), (weights, like))
    interleaved = is_interleaved(like, channels_last)
    out = empty_map(like, channels_last, interleaved)
    if not like.numel():
        return out
    weights = contiguous(weights)
    sizes = kernel_sizes(like, heads, channels_last, interleaved)
    values, strides = alike_maps(values, channels_last, interleaved)
    out_strides, depth_bucket = compact_strides(sizes), bucket(depth)
    plan = make_plan(sizes, (strides, out_strides), like.dtype, depth_bucket)
    with guard(like.device):
        # The forward of an attention whose weights are written already.
        layer_attention_fwd_kernel[(plan.programs,)](
            weights,
            (weights,),
            padded(values, depth_bucket),
            weights,
            out,
            out,
            weights,
            weights,
            weights,
            *plan.geometry,
            0,
            0,
            *units(plan, strides),
            *units(plan, out_strides),
            *units(plan, out_strides),
            depth,
            0,
            0,
            0.0,
            0.0,
            HAS_PREV=False,
            HAS_WEIGHTS=True,
            LEAVES_OUT=False,
            HAS_RESIDUAL=False,
            STATISTICS=False,
            **plan.tile,
            FOLD=1,
            HEADS=1,
            T=depth_bucket,
            BLOCK_D=1,
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
    dout = resolved(dout)
    check_readable(dout.get_device(), ("gradient of the output", "weights"), (dout, weights))
    if not need_weights:
        columns = weights.split(1, dim=2)
        return MixGradients(
            None,
            [
                _mixed(column, (dout,), channels_last) if needed else None
                for column, needed in zip(columns, need_values, strict=True)
            ],
        )
    weights = contiguous(weights)
    values = [resolved(v) for v in values]
    like, depth, heads = values[-1], len(values), weights.shape[1]
    interleaved = is_interleaved(like, channels_last)
    sizes = kernel_sizes(like, heads, channels_last, interleaved)
    dweights, dvalues = mix_gradients(weights, like, channels_last, need_values)
    assert dweights is not None
    if not like.numel():
        return MixGradients(dweights.zero_(), dvalues)
    (dout,), dout_strides = alike_maps((dout,), channels_last, interleaved)
    values, strides = alike_maps(values, channels_last, interleaved)
    dvalue_strides, depth_bucket = compact_strides(sizes), bucket(depth)
    plan = make_plan(sizes, (dout_strides, strides, dvalue_strides), like.dtype, depth_bucket)
    partial = torch.empty(plan.partial_elements(depth), dtype=torch.float32, device=like.device)
    push = any(need_values)
    with guard(like.device):
        layer_attention_bwd_dots_kernel[(plan.programs,)](
            dout,
            padded(values, depth_bucket),
            padded([dout if d is None else d for d in dvalues], depth_bucket) if push else (dout,),
            flags(dvalues, depth_bucket) if push else (encoded(0),),
            weights,
            partial,
            *plan.geometry,
            *units(plan, dout_strides),
            *units(plan, strides),
            *units(plan, dvalue_strides),
            depth,
            0.0,
            PUSH=push,
            LEAVES_OUT=False,
            **plan.tile,
            FOLD=plan.FOLD,
            T=depth_bucket,
        )
        depth_mix_bwd_tail_kernel[(sizes[0] * heads,)](
            partial,
            dweights,
            sizes[1],
            heads,
            plan.rows,
            plan.chunks,
            depth,
            INTERLEAVED=plan.interleaved,
            FOLD=plan.FOLD,
            T=depth_bucket,
            BLOCK_S=max(_TAIL_ELEMENTS // depth_bucket, 1),
            num_warps=1,  # one head's numbers: few
        )
    return MixGradients(dweights, dvalues)
