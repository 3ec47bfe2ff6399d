"""Launches of one layer's backward, and of the gather of the pull form."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ela_kernels.backends.gpu_tables import (
    GpuContribution,
    alike_maps,
    alike_rows,
    check_saved,
    compact_strides,
    new_gradients,
)
from ela_kernels.backends.layout import (
    dense,
    empty_map,
    is_interleaved,
    kernel_sizes,
    new_row,
    resolved,
)
from ela_kernels.backends.memory import check_list_readable
from ela_kernels.backends.triton.attention import flags, guard, padded, units
from ela_kernels.backends.triton.kernels.backward import (
    layer_attention_bwd_dots_kernel,
    layer_attention_bwd_tail_kernel,
)
from ela_kernels.backends.triton.kernels.gather import layer_attention_bwd_gather_kernel
from ela_kernels.backends.triton.plan import (
    block_d,
    bucket,
    comparable,
    encoded,
    make_plan,
)
from ela_kernels.backends.types import Gradients, Saved

# Numbers that one step of the tail holds; elements of a key's gradient that one program gathers.
_TAIL_ELEMENTS = 512
_KEY_ELEMENTS = 512


def attend_backward(
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
    """Gradients of scores, query and previous weights, and in the push form of every key and value.

    `into`: where the gradient of the scores is to be written, `[B, G, depth]`.
    """
    check_saved(saved, dout, dweights, dkl)
    q, keys, values, heads, scale, prev_weights, weights_in, channels_last, tolerance = saved
    last = values[-1]
    depth = len(values)
    depth_bucket = bucket(depth)
    interleaved = is_interleaved(last, channels_last)
    sizes = kernel_sizes(last, heads, channels_last, interleaved)
    (q,), query_stride = alike_rows((q,))
    keys, key_stride = alike_rows(keys)
    new = new_gradients(
        saved, dout is not None, dkl is not None, need_q, need_prev, need_keys, need_values
    )
    if into is not None:
        new = new._replace(dscores=into)
    dscores, dq, dprev, dkeys, dvalues = new
    dweights, dkl, prev_weights = dense(dweights), dense(dkl), dense(prev_weights)
    if not dscores.numel():
        return new

    has_dots = dout is not None and last.numel() > 0
    partial = dscores
    plan = make_plan(sizes, (compact_strides(sizes),), q.dtype, depth_bucket)
    with guard(q.device):
        if has_dots:
            assert dout is not None
            (dout,), dout_strides = alike_maps((resolved(dout),), channels_last, interleaved)
            values, strides = alike_maps(values, channels_last, interleaved)
            dvalue_strides = compact_strides(sizes)
            plan = make_plan(sizes, (dout_strides, strides, dvalue_strides), q.dtype, depth_bucket)
            partial = torch.empty(
                plan.partial_elements(depth), dtype=torch.float32, device=q.device
            )
            push = any(d is not None for d in dvalues)
            layer_attention_bwd_dots_kernel[(plan.programs,)](
                dout,
                padded(values, depth_bucket),
                padded([dout if d is None else d for d in dvalues], depth_bucket)
                if push
                else (dout,),
                flags(dvalues, depth_bucket) if push else (encoded(0),),
                weights_in,
                partial,
                *plan.geometry,
                *units(plan, dout_strides),
                *units(plan, strides),
                *units(plan, dvalue_strides),
                depth,
                comparable(tolerance),
                PUSH=push,
                LEAVES_OUT=tolerance > 0,
                **plan.tile,
                FOLD=plan.FOLD,
                T=depth_bucket,
            )
        has_dkl = dkl is not None and prev_weights is not None
        push = any(d is not None for d in dkeys)
        layer_attention_bwd_tail_kernel[(sizes[0] * heads,)](
            q,
            padded(keys, depth_bucket),
            prev_weights if has_dkl else dscores,
            weights_in,
            partial,
            dscores if dweights is None else dweights,
            dkl if has_dkl else dscores,
            dscores,
            q if dq is None else dq,
            padded([q if d is None else d for d in dkeys], depth_bucket) if push else (q,),
            flags(dkeys, depth_bucket) if push else (encoded(0),),
            dscores if dprev is None else dprev,
            sizes[1],
            heads,
            plan.rows,
            plan.chunks,
            query_stride,
            key_stride,
            depth,
            prev_weights.shape[2] if prev_weights is not None and has_dkl else 0,
            scale,
            HAS_DOTS=has_dots,
            HAS_DWEIGHTS=dweights is not None,
            HAS_DKL=has_dkl,
            HAS_DQ=dq is not None,
            PUSH=push,
            HAS_DPREV=dprev is not None,
            INTERLEAVED=plan.interleaved,
            FOLD=plan.FOLD,
            T=depth_bucket,
            BLOCK_S=max(_TAIL_ELEMENTS // depth_bucket, 1),
            BLOCK_D=min(
                block_d(1, depth_bucket, sizes[1] // heads), max(_TAIL_ELEMENTS // depth_bucket, 1)
            ),
            num_warps=1,  # one head's numbers: few
        )
    return new


def gather(
    contributions: Sequence[GpuContribution],
    index: int,
    heads: int,
    channels_last: bool,
    need_key: bool,
    need_value: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """`(dk, dv)` of the layer at `index` in one launch, each a sum over the layers that retrieved it."""
    douts: Sequence[Tensor] = [r.dout for r in contributions if r.dout is not None]
    with_dout = [r for r in contributions if r.dout is not None]
    need_value = need_value and bool(douts)
    if not need_key and not need_value:
        return None, None
    check_list_readable(
        contributions[0].q.get_device(),
        "what a layer's backward left",
        [t for r in contributions for t in (r.dscores, r.weights)],
    )
    queries, query_stride = alike_rows([r.q for r in contributions])
    q = queries[0]
    batch, channels = q.shape
    dkey = new_row(q) if need_key else None
    dvalue = None
    strides = dvalue_strides = (0, 0)
    sources, tiles = 1, 0
    sizes = (batch, channels, heads, 1, 0)
    plan = make_plan(sizes, (compact_strides(sizes),), q.dtype, 1) if batch else None
    if need_value:
        interleaved = is_interleaved(douts[0], channels_last)
        dvalue = empty_map(douts[0], channels_last, interleaved)
        if dvalue.numel():
            sizes = kernel_sizes(douts[0], heads, channels_last, interleaved)
            douts, strides = alike_maps(douts, channels_last, interleaved)
            dvalue_strides = compact_strides(sizes)
            sources = len(douts)
            plan = make_plan(sizes, (strides, dvalue_strides), q.dtype, bucket(sources))
            tiles = plan.programs
    programs = tiles + (-(-q.numel() // _KEY_ELEMENTS) if need_key else 0)
    if not programs or plan is None:
        return dkey, dvalue
    query_bucket, source_bucket = bucket(len(queries)), bucket(sources)
    dscores = [r.dscores for r in contributions]
    weights_in = [r.weights for r in with_dout] if tiles else dscores[:1]
    tolerances = [comparable(r.tolerance) for r in with_dout] if tiles else [0.0]
    leaves_out = any(tolerance > 0 for tolerance in tolerances)
    with guard(q.device):
        layer_attention_bwd_gather_kernel[(programs,)](
            padded(queries, query_bucket),
            padded(dscores, query_bucket),
            padded([encoded(d.shape[2]) for d in dscores], query_bucket),
            q if dkey is None else dkey,
            padded(douts, source_bucket) if tiles else (q,),
            padded(weights_in, source_bucket),
            padded([encoded(w.shape[2]) for w in weights_in], source_bucket),
            q if dvalue is None else dvalue,
            *plan.geometry,
            query_stride,
            *units(plan, strides),
            *units(plan, dvalue_strides),
            index,
            tiles,
            len(queries),
            sources,
            padded(tolerances, source_bucket) if leaves_out else (0.0,),
            LEAVES_OUT=leaves_out,
            **plan.tile,
            FOLD=plan.FOLD if leaves_out else 1,
            Q=query_bucket,
            M=source_bucket,
            BLOCK_KEY=_KEY_ELEMENTS,
        )
    return dkey, dvalue
