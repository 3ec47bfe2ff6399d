"""Launches of a whole layer: query, key and value from a feature map, what they retrieve, and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ela_kernels.ops.layer_attention.gpu import Retrieved, Strides, alike_maps
from ela_kernels.ops.layer_attention.kernels import dense, new_row, resolved
from ela_kernels.ops.layer_attention.layer_kernels import (
    Attended,
    Epilogue,
    Filters,
    LayerForward,
    LayerGradients,
)
from ela_kernels.ops.layer_attention.layout import empty_map, in_form, is_interleaved
from ela_kernels.ops.layer_attention.triton_kernels.launch import attend, guard
from ela_kernels.ops.layer_attention.triton_kernels.launch_backward import backward, gather
from ela_kernels.ops.layer_attention.triton_kernels.norm import (
    norm_backward,
    norm_forward,
    statistics_of,
)
from ela_kernels.ops.layer_attention.triton_kernels.plan import (
    NUM_WARPS,
    PatchPlan,
    make_patch_plan,
)
from ela_kernels.ops.layer_attention.triton_kernels.producer_kernels import (
    layer_filters_bwd_kernel,
    layer_producer_bwd_kernel,
    layer_producer_fwd_kernel,
    layer_rows_fwd_kernel,
)

__all__ = ["layer_backward", "layer_forward", "norm_backward", "norm_forward", "readable"]

# What a program of a second launch reads at once: partial sums by channels; and elements of a row's gradient.
_ROW_PARTS = 16
_ROW_CHANNELS = 64
_TAP_PARTS = 64
_TAP_COLUMNS = 32
_FILTER_ELEMENTS = 1024


def readable(x: Tensor) -> Tensor:
    """`x` itself where the kernels can read it, else a compact copy."""
    return in_form(x, False, is_interleaved(x, False))


def _compact_strides(x: Tensor, interleaved: bool) -> Strides:
    _, channels, height, width = x.shape
    return channels * height * width, channels if interleaved else height * width


def _plan(x: Tensor, interleaved: bool, *strides: Strides) -> PatchPlan:
    batch, channels, height, width = x.shape
    return make_patch_plan((batch, channels, height, width, int(interleaved)), strides, x.dtype)


def _units(plan: PatchPlan, strides: Strides) -> Strides:
    return strides[0] // plan.UNIT, strides[1] // plan.UNIT


def layer_forward(
    x: Tensor,
    filters: Filters,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    heads: int,
    scale: float,
    prev_weights: Tensor | None,
    has_residual: bool,
    epilogue: Epilogue | None = None,
    keeps_out: bool = True,
) -> LayerForward:
    """Query, key and value from `x` in two launches, and what the query retrieves in one or two more.

    `keys` and `values` are those of the layers before; without `filters.wq` nothing is retrieved.
    """
    interleaved = is_interleaved(x, False)
    (x,), strides = alike_maps((x,), False, interleaved)
    wq, wk, wv = (dense(w) for w in filters)
    assert wk is not None
    batch, channels, height, width = x.shape
    v, v_strides = empty_map(x, False, interleaved), _compact_strides(x, interleaved)
    mean, k = x.new_empty((batch, channels)), x.new_empty((batch, channels))
    q = None if wq is None else x.new_empty((batch, channels))
    plan = _plan(x, interleaved, strides, v_strides)
    sums = torch.empty((batch, plan.groups, channels), dtype=torch.float32, device=x.device)
    with guard(x.device):
        layer_producer_fwd_kernel[(plan.programs,)](
            x,
            wv,
            v,
            sums,
            *plan.geometry,
            *_units(plan, strides),
            *_units(plan, v_strides),
            INTERLEAVED=plan.interleaved,
            UNIT=plan.UNIT,
            LINES=plan.LINES,
            PH=plan.PH,
            PW=plan.PW,
            num_warps=NUM_WARPS,
        )
        layer_rows_fwd_kernel[(batch * -(-channels // _ROW_CHANNELS),)](
            sums,
            wk if wq is None else wq,
            wk,
            mean,
            k if q is None else q,
            k,
            channels,
            plan.groups,
            height * width,
            wk.numel(),
            HAS_QUERY=q is not None,
            BLOCK_S=_ROW_PARTS,
            BLOCK_C=_ROW_CHANNELS,
            num_warps=NUM_WARPS,
        )
    if q is None:
        return LayerForward(mean, None, k, v, None, None, None, None)
    out, weights, kl, moments = attend(
        q,
        (*keys, k),
        (*values, v),
        heads,
        scale,
        prev_weights,
        False,
        x if has_residual else None,
        epilogue is not None and epilogue.statistics is None,
    )
    statistics = None if moments is None else statistics_of(moments)
    return LayerForward(mean, q, k, v, out, weights, kl, statistics)


def layer_backward(
    x: Tensor,
    filters: Filters,
    mean: Tensor,
    heads: int,
    index: int,
    own: Attended | None,
    retrieved: Sequence[Retrieved],
    dk: Tensor | None,
    dv: Tensor | None,
    residual: Tensor | None,
    needs: Sequence[bool],
    pending: None = None,
) -> LayerGradients:
    """All gradients of the layer at `index`: its attention's, the gathered ones of key and value, and those before.

    Args:
        own: its attention, where a gradient arrived through it.
        retrieved: what the layers that retrieved this one left, this one included if it did.
        dk, dv: gradients of key and value from elsewhere, if there are any.
        residual: what arrives past the retrieval, added to the gradient of `x`.
        needs: of x, wq, wk, wv.
    """
    need_x, need_wq, need_wk, need_wv = needs
    dq = dprev = None
    if own is not None:
        found = backward(
            own.saved,
            own.dout,
            own.dweights,
            own.dkl,
            need_x or need_wq,
            own.need_prev,
            into=own.dscores,
        )
        dq, dprev = found.dq, found.dprev
    need_key, need_value = need_x or need_wk, need_x or need_wv
    if retrieved:
        more_dk, more_dv = gather(retrieved, index, heads, False, need_key, need_value)
        dk, dv = _sum(dk, more_dk), _sum(dv, more_dv)
    dk = dense(dk) if need_key else None
    dv = resolved(dv) if need_value and dv is not None else None
    found_here = _produced(x, filters, mean, dq, dk, dv, residual, needs)
    return LayerGradients(*found_here, dprev)


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a + b


class _Gradients(NamedTuple):
    """Of a layer's input and filters; None where none was asked for."""

    x: Tensor | None
    wq: Tensor | None
    wk: Tensor | None
    wv: Tensor | None


def _produced(
    x: Tensor,
    filters: Filters,
    mean: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    residual: Tensor | None,
    needs: Sequence[bool],
) -> _Gradients:
    """What query, key and value send back to `x` and to the filters, in two launches."""
    need_x, need_wq, need_wk, need_wv = needs
    interleaved = is_interleaved(x, False)
    (x,), strides = alike_maps((x,), False, interleaved)
    wq, wk, wv = (dense(w) for w in filters)
    assert wk is not None
    assert wv is not None
    batch, channels = mean.shape
    compact = _compact_strides(x, interleaved)
    dv_strides = residual_strides = compact
    if dv is not None:
        (dv,), dv_strides = alike_maps((dv,), False, interleaved)
    if residual is not None:
        (residual,), residual_strides = alike_maps((residual,), False, interleaved)
    dx = empty_map(x, False, interleaved) if need_x else None
    dwq = new_row(wq) if need_wq and wq is not None else None
    dwk = new_row(wk) if need_wk else None
    dwv = new_row(wv) if need_wv else None
    # A parameter that no gradient reaches.
    for gradient, source in ((dwq, dq), (dwk, dk), (dwv, dv)):
        if gradient is not None and source is None:
            gradient.zero_()
    takes_wq, takes_wk = dwq is not None and dq is not None, dwk is not None and dk is not None
    takes_wv = dwv is not None and dv is not None

    plan = _plan(x, interleaved, strides, dv_strides, residual_strides, compact)
    size = wk.numel()
    tiles = plan.programs if need_x or takes_wv else 0
    blocks = -(-mean.numel() // _FILTER_ELEMENTS)
    filter_programs = blocks if takes_wq or takes_wk else 0
    taps = filter_sums = mean
    parts = batch * plan.groups
    if takes_wv:
        taps = torch.empty((parts, 9, channels), dtype=torch.float32, device=x.device)
    if filter_programs:
        filter_sums = torch.empty((2, size, blocks), dtype=torch.float32, device=x.device)
    with guard(x.device):
        if tiles + filter_programs:
            layer_producer_bwd_kernel[(tiles + filter_programs,)](
                x if dv is None else dv,
                x,
                x if residual is None else residual,
                wv,
                mean if dq is None else dq,
                mean if dk is None else dk,
                wk if wq is None else wq,
                wk,
                mean,
                x if dx is None else dx,
                taps,
                filter_sums,
                *plan.geometry,
                *_units(plan, dv_strides),
                *_units(plan, strides),
                *_units(plan, residual_strides),
                *_units(plan, compact),
                size,
                tiles,
                blocks,
                HAS_DV=dv is not None,
                HAS_QUERY=dq is not None,
                HAS_KEY=dk is not None,
                HAS_RESIDUAL=residual is not None,
                NEED_X=need_x,
                NEED_TAPS=takes_wv,
                INTERLEAVED=plan.interleaved,
                UNIT=plan.UNIT,
                LINES=plan.LINES,
                PH=plan.PH,
                PW=plan.PW,
                BLOCK=_FILTER_ELEMENTS,
                num_warps=NUM_WARPS,
            )
        tap_programs = -(-9 * channels // _TAP_COLUMNS) if takes_wv else 0
        if tap_programs + filter_programs:
            layer_filters_bwd_kernel[(tap_programs + (2 * size if filter_programs else 0),)](
                taps,
                filter_sums,
                mean if dwv is None else dwv,
                mean if dwq is None else dwq,
                mean if dwk is None else dwk,
                channels,
                parts,
                size,
                blocks,
                tap_programs,
                HAS_QUERY=takes_wq,
                HAS_KEY=takes_wk,
                BLOCK_S=_TAP_PARTS,
                BLOCK_C=_TAP_COLUMNS,
                num_warps=NUM_WARPS,
            )
    return _Gradients(dx, dwq, dwk, dwv)
