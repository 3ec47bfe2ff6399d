"""The glue to the Triton kernels: layouts, allocation and launches. Arguments are checked already.

Here what all launches share, and the forward; the others are in `attention_backward.py`, `producer.py` and `norm.py`.

Every call launches on the current stream of the tensors' device, allocates before its launches and waits for nothing,
so a step can be captured into a CUDA graph, once its kernels are compiled.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ela_kernels.backends.gpu_tables import (
    alike_maps,
    alike_rows,
    check_inputs,
    compact_strides,
    new_divergence,
    new_weights,
)
from ela_kernels.backends.layout import dense, empty_map, is_interleaved, kernel_sizes, resolved
from ela_kernels.backends.triton.kernels.forward import (
    layer_attention_fwd_kernel,
    layer_attention_weights_kernel,
)
from ela_kernels.backends.triton.plan import (
    NUM_WARPS,
    Plan,
    block_d,
    bucket,
    comparable,
    encoded,
    make_plan,
)

_WEIGHTS_HEADS = 4  # of one program of the weights-only pass


class Moments(NamedTuple):
    """Partial means of a map's channels and sums of squared distances from them, `[2, parts, C]`, as a plan cut it."""

    partial: Tensor
    plan: Plan


# Triton's interpreter exchanges functions of its modules while it runs a kernel, and keeps there which program runs.
_interpreter = threading.RLock()


def guard(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """For launches on a device: makes it the current one. Where kernels are interpreted, one thread at a time does."""
    if device.type == "cpu":
        return _interpreter
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)


def padded(items: Sequence[Any], length: int) -> tuple[Any, ...]:
    """As a tuple of the kernel's length; what is beyond the depth is never read."""
    return (*items, *([items[-1]] * (length - len(items))))


def flags(tensors: Sequence[Tensor | None], length: int) -> tuple[int, ...]:
    """Which of some tensors are there, as a tuple of the kernel's length."""
    return padded([encoded(int(t is not None)) for t in tensors], length)


def units(plan: Plan, strides: tuple[int, int]) -> tuple[int, int]:
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
        padded(keys, depth_bucket),
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
    check_inputs(q, keys, (), prev_weights)
    (q,), query_stride = alike_rows((resolved(q),))
    keys, key_stride = alike_rows([resolved(k) for k in keys])
    weights_out = new_weights(q, heads, len(keys))
    prev_weights = dense(prev_weights)
    kl = new_divergence(q, heads, prev_weights)
    if weights_out.numel():
        with guard(q.device):
            _launch_weights(
                q, query_stride, keys, key_stride, heads, scale, prev_weights, weights_out, kl
            )
    return weights_out, kl


def attend(
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    heads: int,
    scale: float,
    prev_weights: Tensor | None,
    channels_last: bool,
    tolerance: float,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`(out, weights, kl)` in one launch, or two where heads are so wide that scores are better computed once."""
    last = values[-1]
    if not last.numel():
        interleaved = is_interleaved(last, channels_last)
        return empty_map(last, channels_last, interleaved), *weights(
            q, keys, heads, scale, prev_weights
        )
    return attend_with(
        q, keys, values, heads, scale, prev_weights, channels_last, tolerance=tolerance
    )[:3]


def attend_with(
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    heads: int,
    scale: float,
    prev_weights: Tensor | None,
    channels_last: bool,
    residual: Tensor | None = None,
    wants_moments: bool = False,
    tolerance: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor | None, Moments | None]:
    """As :func:`attend` of maps that are not empty, with a map to be added to the output, and the output's moments."""
    check_inputs(q, keys, values, prev_weights)
    last = values[-1]
    interleaved = is_interleaved(last, channels_last)
    sizes = kernel_sizes(last, heads, channels_last, interleaved)
    depth = len(values)
    depth_bucket = bucket(depth)
    (q,), query_stride = alike_rows((q,))
    keys, key_stride = alike_rows(keys)
    values, strides = alike_maps(values, channels_last, interleaved)
    out, out_strides = empty_map(last, channels_last, interleaved), compact_strides(sizes)
    residual_strides = out_strides
    if residual is not None:
        (residual,), residual_strides = alike_maps((residual,), channels_last, interleaved)
    weights_out = new_weights(q, heads, depth)
    prev_weights = dense(prev_weights)
    kl = new_divergence(q, heads, prev_weights)
    plan = make_plan(
        sizes, (strides, residual_strides, out_strides), q.dtype, depth_bucket, wants_moments
    )
    moments = None
    if wants_moments:
        partial = torch.empty((2, plan.parts, plan.channels), dtype=torch.float32, device=q.device)
        moments = Moments(partial, plan)
    with guard(q.device):
        if plan.scores_apart:
            _launch_weights(
                q, query_stride, keys, key_stride, heads, scale, prev_weights, weights_out, kl
            )
        layer_attention_fwd_kernel[(plan.programs,)](
            q,
            padded(keys, depth_bucket),
            padded(values, depth_bucket),
            weights_out if prev_weights is None else prev_weights,
            out if residual is None else residual,
            out,
            weights_out,
            weights_out if kl is None else kl,
            weights_out if moments is None else moments.partial,
            *plan.geometry,
            query_stride,
            key_stride,
            *units(plan, strides),
            *units(plan, residual_strides),
            *units(plan, out_strides),
            depth,
            0 if prev_weights is None else prev_weights.shape[2],
            plan.parts,
            scale,
            comparable(tolerance),
            HAS_PREV=prev_weights is not None,
            HAS_WEIGHTS=plan.scores_apart,
            LEAVES_OUT=tolerance > 0,
            HAS_RESIDUAL=residual is not None,
            STATISTICS=moments is not None,
            **plan.tile,
            FOLD=plan.FOLD if tolerance > 0 else 1,
            HEADS=plan.tile_heads,
            T=depth_bucket,
            BLOCK_D=block_d(plan.tile_heads, depth_bucket, plan.head_dim),
        )
    return out, weights_out, kl, moments
