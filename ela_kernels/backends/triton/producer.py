"""Launches that make query, key and value from a feature map, and those that take their gradients back to it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ela_kernels.backends.gpu_tables import ProducerGradients, Strides, alike_maps, check_produced
from ela_kernels.backends.layout import dense, empty_map, is_interleaved, new_row
from ela_kernels.backends.triton.attention import guard
from ela_kernels.backends.triton.kernels.producer import (
    layer_producer_bwd_kernel,
    layer_producer_fwd_kernel,
)
from ela_kernels.backends.triton.kernels.rows import layer_filters_bwd_kernel, layer_rows_fwd_kernel
from ela_kernels.backends.triton.plan import NUM_WARPS, PatchPlan, make_patch_plan
from ela_kernels.backends.types import Filters

# What a program of a second launch reads at once: partial sums by channels; and elements of a row's gradient.
_ROW_PARTS = 16
_ROW_CHANNELS = 64
_TAP_PARTS = 64
_TAP_COLUMNS = 32
_FILTER_ELEMENTS = 1024


class Produced(NamedTuple):
    """The pooled mean of `x`, query (None where none is wanted) and key `[B, C]`, and the value."""

    mean: Tensor
    q: Tensor | None
    k: Tensor
    v: Tensor


def _compact_strides(x: Tensor, interleaved: bool) -> Strides:
    _, channels, height, width = x.shape
    return channels * height * width, channels if interleaved else height * width


def _plan(x: Tensor, interleaved: bool, *strides: Strides) -> PatchPlan:
    batch, channels, height, width = x.shape
    return make_patch_plan((batch, channels, height, width, int(interleaved)), strides, x.dtype)


def _units(plan: PatchPlan, strides: Strides) -> Strides:
    return strides[0] // plan.UNIT, strides[1] // plan.UNIT


def produce(x: Tensor, filters: Filters) -> Produced:
    """Query, key and value from `x` in two launches; no query without `filters.wq`."""
    check_produced(x, filters)
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
            **plan.tile,
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
    return Produced(mean, q, k, v)


class Light(NamedTuple):
    """What a light layer has besides.

    The value's gradient is its output's, given in place of it, times `gates` `[B, G]`; without them it is given itself.
    That of the decay, where it is wanted, is the sum of each sample's part of it, `decays` `[B, C]`.
    """

    gates: Tensor | None
    ddecay: Tensor | None
    decays: Tensor | None


def produce_backward(
    x: Tensor,
    filters: Filters,
    mean: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    residual: Tensor | None,
    needs: Sequence[bool],
    light: Light | None = None,
) -> ProducerGradients:
    """What query, key and value send back to `x` and to the filters, in two launches."""
    check_produced(x, filters, mean, dq, dk, dv, residual)
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
    gates = None if light is None else light.gates
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
                mean if gates is None else gates,
                x if dx is None else dx,
                taps,
                filter_sums,
                *plan.geometry,
                *_units(plan, dv_strides),
                *_units(plan, strides),
                *_units(plan, residual_strides),
                *_units(plan, compact),
                size,
                1 if gates is None else mean.numel() // gates.numel(),
                tiles,
                blocks,
                HAS_DV=dv is not None,
                HAS_GATES=gates is not None and dv is not None,
                HAS_QUERY=dq is not None,
                HAS_KEY=dk is not None,
                HAS_RESIDUAL=residual is not None,
                NEED_X=need_x,
                NEED_TAPS=takes_wv,
                **plan.tile,
                BLOCK=_FILTER_ELEMENTS,
            )
        tap_programs = -(-9 * channels // _TAP_COLUMNS) if takes_wv else 0
        ddecay = decays = None
        if light is not None:
            _, ddecay, decays = light
        decay_programs = 0 if ddecay is None else -(-channels // _TAP_COLUMNS)
        programs = tap_programs + decay_programs + (2 * size if filter_programs else 0)
        if programs:
            layer_filters_bwd_kernel[(programs,)](
                taps,
                filter_sums,
                mean if dwv is None else dwv,
                mean if dwq is None else dwq,
                mean if dwk is None else dwk,
                filter_sums if decays is None else decays,
                mean if ddecay is None else ddecay,
                channels,
                parts,
                size,
                blocks,
                batch,
                tap_programs,
                decay_programs,
                HAS_QUERY=takes_wq,
                HAS_KEY=takes_wk,
                BLOCK_S=_TAP_PARTS,
                BLOCK_C=_TAP_COLUMNS,
                num_warps=NUM_WARPS,
            )
    return ProducerGradients(dx, dwq, dwk, dwv)
