"""The glue to the Triton kernels: layouts, allocation and launches. Arguments are checked already.

Every call launches on the current stream of the tensors' device, allocates before its launches and waits for nothing,
so a step can be captured into a CUDA graph, once its kernels are compiled.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ela_kernels.ops.layer_attention.gpu import (
    Retrieved,
    alike_maps,
    alike_rows,
    compact_strides,
    new_divergence,
    new_gradients,
    new_weights,
)
from ela_kernels.ops.layer_attention.kernels import Gradients, Saved, dense, new_row, resolved
from ela_kernels.ops.layer_attention.layout import (
    empty_map,
    is_interleaved,
    kernel_sizes,
)
from ela_kernels.ops.layer_attention.triton_kernels.backward_kernels import (
    layer_attention_bwd_dots_kernel,
    layer_attention_bwd_tail_kernel,
)
from ela_kernels.ops.layer_attention.triton_kernels.forward_kernels import (
    layer_attention_bwd_gather_kernel,
    layer_attention_fwd_kernel,
    layer_attention_weights_kernel,
)
from ela_kernels.ops.layer_attention.triton_kernels.plan import (
    NUM_WARPS,
    Plan,
    block_d,
    bucket,
    encoded,
    make_plan,
)

# Heads of one program of the weights-only pass; numbers that one step of the tail holds; elements of a key's gradient
# that one program gathers.
_WEIGHTS_HEADS = 4
_TAIL_ELEMENTS = 512
_KEY_ELEMENTS = 512


def _guard(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)


def _padded(items: Sequence[Any], length: int) -> tuple[Any, ...]:
    """As a tuple of the kernel's length; what is beyond the depth is never read."""
    return (*items, *([items[-1]] * (length - len(items))))


def _units(plan: Plan, strides: tuple[int, int]) -> tuple[int, int]:
    """Strides of sample and row, a row being a position, a channel, or a head without gaps, in units of the plan."""
    batch, inner = strides
    row = inner if plan.interleaved or plan.rows == plan.channels else plan.row_length
    return batch // plan.UNIT, row // plan.UNIT


def _launch_weights(
    q: Tensor,
    query_stride: int,
    keys: Sequence[Tensor],
    key_stride: int,
    heads: int,
    scale: float,
    prev_weights: Tensor | None,
    weights_out: Tensor,
    kl: Tensor | None,
) -> None:
    batch, channels = q.shape
    depth = len(keys)
    depth_bucket = bucket(depth)
    head_dim = channels // heads
    layer_attention_weights_kernel[(-(-batch * heads // _WEIGHTS_HEADS),)](
        q,
        _padded(keys, depth_bucket),
        weights_out if prev_weights is None else prev_weights,
        weights_out,
        weights_out if kl is None else kl,
        batch,
        heads,
        head_dim,
        query_stride,
        key_stride,
        depth,
        0 if prev_weights is None else prev_weights.shape[2],
        scale,
        HAS_PREV=prev_weights is not None,
        HEADS=_WEIGHTS_HEADS,
        T=depth_bucket,
        BLOCK_D=block_d(_WEIGHTS_HEADS, depth_bucket, head_dim),
        num_warps=NUM_WARPS,
    )


def weights(
    q: Tensor, keys: Sequence[Tensor], heads: int, scale: float, prev_weights: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """`(weights, kl)` in one launch; no value is read."""
    (q,), query_stride = alike_rows((resolved(q),))
    keys, key_stride = alike_rows([resolved(k) for k in keys])
    weights_out = new_weights(q, heads, len(keys))
    prev_weights = dense(prev_weights)
    kl = new_divergence(q, heads, prev_weights)
    if weights_out.numel():
        with _guard(q.device):
            _launch_weights(
                q, query_stride, keys, key_stride, heads, scale, prev_weights, weights_out, kl
            )
    return weights_out, kl


def forward(
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    heads: int,
    scale: float,
    prev_weights: Tensor | None,
    channels_last: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`(out, weights, kl)` in one launch, or two where heads are so wide that scores are better computed once."""
    last = values[-1]
    interleaved = is_interleaved(last, channels_last)
    if not last.numel():
        return empty_map(last, channels_last, interleaved), *weights(
            q, keys, heads, scale, prev_weights
        )
    sizes = kernel_sizes(last, heads, channels_last, interleaved)
    depth = len(values)
    depth_bucket = bucket(depth)
    (q,), query_stride = alike_rows((q,))
    keys, key_stride = alike_rows(keys)
    values, strides = alike_maps(values, channels_last, interleaved)
    out, out_strides = empty_map(last, channels_last, interleaved), compact_strides(sizes)
    weights_out = new_weights(q, heads, depth)
    prev_weights = dense(prev_weights)
    kl = new_divergence(q, heads, prev_weights)
    plan = make_plan(sizes, (strides, out_strides), q.dtype, depth_bucket)
    with _guard(q.device):
        if plan.scores_apart:
            _launch_weights(
                q, query_stride, keys, key_stride, heads, scale, prev_weights, weights_out, kl
            )
        layer_attention_fwd_kernel[(plan.programs,)](
            q,
            _padded(keys, depth_bucket),
            _padded(values, depth_bucket),
            weights_out if prev_weights is None else prev_weights,
            out,
            weights_out,
            weights_out if kl is None else kl,
            *plan.geometry,
            query_stride,
            key_stride,
            *_units(plan, strides),
            *_units(plan, out_strides),
            depth,
            0 if prev_weights is None else prev_weights.shape[2],
            scale,
            HAS_PREV=prev_weights is not None,
            HAS_WEIGHTS=plan.scores_apart,
            INTERLEAVED=plan.interleaved,
            UNIT=plan.UNIT,
            ROWS=plan.ROWS,
            COLS=plan.COLS,
            HEADS=plan.tile_heads,
            T=depth_bucket,
            BLOCK_D=block_d(plan.tile_heads, depth_bucket, plan.head_dim),
            num_warps=NUM_WARPS,
        )
    return out, weights_out, kl


def backward(
    saved: Saved,
    dout: Tensor | None,
    dweights: Tensor | None,
    dkl: Tensor | None,
    need_q: bool,
    need_prev: bool,
    need_keys: Sequence[bool] = (),
    need_values: Sequence[bool] = (),
) -> Gradients:
    """Gradients of scores, query and previous weights, and in the push form of every key and value."""
    q, keys, values, heads, scale, prev_weights, weights_in, channels_last = saved
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
    dscores, dq, dprev, dkeys, dvalues = new
    dweights, dkl, prev_weights = dense(dweights), dense(dkl), dense(prev_weights)
    if not dscores.numel():
        return new

    has_dots = dout is not None and last.numel() > 0
    partial = dscores
    plan = make_plan(sizes, (compact_strides(sizes),), q.dtype, depth_bucket)
    with _guard(q.device):
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
                _padded(values, depth_bucket),
                _padded([dout if d is None else d for d in dvalues], depth_bucket)
                if push
                else (dout,),
                _flags(dvalues, depth_bucket) if push else (encoded(0),),
                weights_in,
                partial,
                *plan.geometry,
                *_units(plan, dout_strides),
                *_units(plan, strides),
                *_units(plan, dvalue_strides),
                depth,
                PUSH=push,
                INTERLEAVED=plan.interleaved,
                UNIT=plan.UNIT,
                ROWS=plan.ROWS,
                COLS=plan.COLS,
                FOLD=plan.FOLD,
                T=depth_bucket,
                num_warps=NUM_WARPS,
            )
        has_dkl = dkl is not None and prev_weights is not None
        push = any(d is not None for d in dkeys)
        layer_attention_bwd_tail_kernel[(sizes[0] * heads,)](
            q,
            _padded(keys, depth_bucket),
            prev_weights if has_dkl else dscores,
            weights_in,
            partial,
            dscores if dweights is None else dweights,
            dkl if has_dkl else dscores,
            dscores,
            q if dq is None else dq,
            _padded([q if d is None else d for d in dkeys], depth_bucket) if push else (q,),
            _flags(dkeys, depth_bucket) if push else (encoded(0),),
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


def _flags(tensors: Sequence[Tensor | None], length: int) -> tuple[int, ...]:
    return _padded([encoded(int(t is not None)) for t in tensors], length)


def gather(
    retrieved: Sequence[Retrieved],
    index: int,
    heads: int,
    channels_last: bool,
    need_key: bool,
    need_value: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """`(dk, dv)` of the layer at `index` in one launch, each a sum over the layers that retrieved it."""
    douts: Sequence[Tensor] = [r.dout for r in retrieved if r.dout is not None]
    with_dout = [r for r in retrieved if r.dout is not None]
    need_value = need_value and bool(douts)
    if not need_key and not need_value:
        return None, None
    queries, query_stride = alike_rows([r.q for r in retrieved])
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
    dscores = [r.dscores for r in retrieved]
    weights_in = [r.weights for r in with_dout] if tiles else dscores[:1]
    with _guard(q.device):
        layer_attention_bwd_gather_kernel[(programs,)](
            _padded(queries, query_bucket),
            _padded(dscores, query_bucket),
            _padded([encoded(d.shape[2]) for d in dscores], query_bucket),
            q if dkey is None else dkey,
            _padded(douts, source_bucket) if tiles else (q,),
            _padded(weights_in, source_bucket),
            _padded([encoded(w.shape[2]) for w in weights_in], source_bucket),
            q if dvalue is None else dvalue,
            *plan.geometry,
            query_stride,
            *_units(plan, strides),
            *_units(plan, dvalue_strides),
            index,
            tiles,
            len(queries),
            sources,
            INTERLEAVED=plan.interleaved,
            UNIT=plan.UNIT,
            ROWS=plan.ROWS,
            COLS=plan.COLS,
            Q=query_bucket,
            M=source_bucket,
            BLOCK_KEY=_KEY_ELEMENTS,
            num_warps=NUM_WARPS,
        )
    return dkey, dvalue
