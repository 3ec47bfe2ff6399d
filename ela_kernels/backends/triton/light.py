"""Launches of a whole light layer on Triton; what is around the gate is that of the base form."""

from __future__ import annotations

import torch
from torch import Tensor

from ela_kernels.backends.checks import check_light_shape, check_light_sizes
from ela_kernels.backends.gpu_tables import Strides, alike_maps, compact_strides
from ela_kernels.backends.layout import dense, empty_map, is_interleaved, kernel_sizes, new_row
from ela_kernels.backends.memory import check_readable
from ela_kernels.backends.triton.attention import Moments, guard, units
from ela_kernels.backends.triton.kernels.light import (
    light_layer_bwd_kernel,
    light_layer_bwd_rows_kernel,
    light_layer_fwd_kernel,
    light_layer_gates_kernel,
)
from ela_kernels.backends.triton.norm import statistics_of
from ela_kernels.backends.triton.plan import NUM_WARPS, Plan, block_d, make_plan, power_of_two
from ela_kernels.backends.triton.producer import Light, produce, produce_backward
from ela_kernels.backends.types import (
    VALUE_ACT_CODES,
    Filters,
    LightFilters,
    LightForward,
    LightGradients,
    LightNeeds,
    NormAct,
    SavedLightLayer,
    ValueAct,
)

_NAMES = ("x", "Wq", "Wk", "Wv", "lambda_t", "prev_out")
_KEPT_NAMES = (
    "mean of x",
    "q",
    "k",
    "v",
    "gates",
    "gradient of the light output",
    "gradient of the output",
)
_GATE_HEADS = 4  # of one program where gates have a launch of their own
# Of a program that adds up partial sums: channels, and how many of the sums it reads at once.
_ROW_CHANNELS = 64
_ROW_PARTS = 32


def _plan(x: Tensor, heads: int, interleaved: bool, *strides: Strides) -> Plan:
    # Three maps are held at once, as in an attention over as many.
    sizes = kernel_sizes(x, heads, False, interleaved)
    return make_plan(sizes, strides, x.dtype, 4, True)


def _tile_heads(plan: Plan) -> int:
    """Heads of which a tile has a part, a power of two."""
    if plan.interleaved:
        return plan.tile_heads
    segments = plan.head_dim * plan.chunks  # of a head
    if segments % plan.ROWS == 0 or plan.ROWS % segments == 0:
        return power_of_two((plan.ROWS - 1) // segments + 1)
    return power_of_two((plan.ROWS + segments - 2) // segments + 1)


def light_layer(
    x: Tensor,
    filters: LightFilters,
    prev: Tensor,
    heads: int,
    scale: float,
    epilogue: NormAct | None,
    value_act: ValueAct | None = None,
) -> LightForward:
    """Query, key and value in two launches, `gate * act(v) + decay * prev` in a third; the statistics in one more.

    Heads so wide that a tile would read many more queries and keys than elements of maps have their gates made first.
    The factors are the gates `[B, G]`.
    """
    check_readable(x.get_device(), _NAMES, (x, *filters, prev))
    check_light_sizes(x.shape[1], filters)
    mean, q, k, v = produce(x, Filters(filters.wq, filters.wk, filters.wv))
    assert q is not None
    interleaved = is_interleaved(x, False)
    compact = compact_strides(kernel_sizes(x, heads, False, interleaved))
    (prev,), prev_strides = alike_maps((prev,), False, interleaved)
    decay = dense(filters.decay)
    out = empty_map(x, False, interleaved)
    gates = torch.empty((x.shape[0], heads), dtype=torch.float32, device=x.device)
    plan = _plan(x, heads, interleaved, compact, prev_strides)
    tile_heads = _tile_heads(plan)
    gates_apart = 2 * tile_heads * plan.head_dim > plan.ROWS * plan.COLS
    moments = None
    if epilogue is not None and epilogue.statistics is None:
        partial = torch.empty((2, plan.parts, plan.channels), dtype=torch.float32, device=x.device)
        moments = Moments(partial, plan)
    with guard(x.device):
        if gates_apart:
            light_layer_gates_kernel[(-(-gates.numel() // _GATE_HEADS),)](
                q,
                k,
                gates,
                gates.numel(),
                plan.head_dim,
                scale,
                HEADS=_GATE_HEADS,
                BLOCK_D=block_d(_GATE_HEADS, 1, plan.head_dim),
                num_warps=NUM_WARPS,
            )
        light_layer_fwd_kernel[(plan.programs,)](
            q,
            k,
            decay,
            v,
            prev,
            out,
            gates,
            gates if moments is None else moments.partial,
            *plan.geometry,
            *units(plan, compact),
            *units(plan, prev_strides),
            *units(plan, compact),
            plan.parts,
            scale,
            HAS_GATES=gates_apart,
            ACT=VALUE_ACT_CODES[value_act],
            STATISTICS=moments is not None,
            **plan.tile,
            HEADS=tile_heads,
            BLOCK_D=block_d(tile_heads, 1, plan.head_dim),
        )
    statistics = None if moments is None else statistics_of(moments)
    return LightForward(out, mean, q, k, v, gates, statistics)


def light_layer_backward(
    saved: SavedLightLayer, dout: Tensor, residual: Tensor | None, needs: LightNeeds
) -> LightGradients:
    """All gradients of a layer: dot products and the previous output's gradient in one launch, the rows' in a second.

    Then the producers' two. The value's gradient is not stored, unless the value passes an activation: then the first
    launch writes it.

    Args:
        dout: the gradient of the light output.
        residual: what arrives at `x` past the layer, added to its gradient.
    """
    x, filters, prev, heads, scale, value_act, _, mean, q, k, v, gates, _, _ = saved
    check_readable(x.get_device(), _NAMES, (x, *filters, prev))
    check_readable(x.get_device(), _KEPT_NAMES, (mean, q, k, v, gates, dout, residual))
    check_light_shape(x, v)
    check_light_sizes(x.shape[1], filters)
    need_x, need_wq, need_wk, need_wv, need_decay, need_prev = needs
    wants_dq, wants_dk = need_x or need_wq, need_x or need_wk
    need_gate = wants_dq or wants_dk
    need_dv = need_x or need_wv
    need_value = need_dv and value_act is not None
    interleaved = is_interleaved(x, False)
    compact = compact_strides(kernel_sizes(x, heads, False, interleaved))
    (dout,), dout_strides = alike_maps((dout,), False, interleaved)
    (prev,), prev_strides = alike_maps((prev,), False, interleaved)
    decay = dense(filters.decay)
    assert decay is not None
    dq = new_row(q) if wants_dq else None
    dk = new_row(k) if wants_dk else None
    ddecay = new_row(decay) if need_decay else None
    dprev = empty_map(x, False, interleaved) if need_prev else None
    dv = empty_map(x, False, interleaved) if need_value else dout
    plan = _plan(x, heads, interleaved, dout_strides, compact, prev_strides)
    partial = decays = gates
    if need_gate or need_decay:
        partial = torch.empty((2, plan.parts, plan.channels), dtype=torch.float32, device=x.device)
    if need_decay:
        decays = torch.empty(mean.shape, dtype=torch.float32, device=x.device)
    block = min(power_of_two(plan.head_dim), _ROW_CHANNELS)
    row_heads = _ROW_CHANNELS // block
    with guard(x.device):
        if need_gate or need_decay or need_prev or need_value:
            light_layer_bwd_kernel[(plan.programs,)](
                dout,
                v,
                prev,
                decay,
                gates,
                dout if dprev is None else dprev,
                dv,
                partial,
                *plan.geometry,
                *units(plan, dout_strides),
                *units(plan, compact),
                *units(plan, prev_strides),
                *units(plan, compact),
                *units(plan, compact),
                plan.parts,
                ACT=VALUE_ACT_CODES[value_act],
                NEED_GATE=need_gate,
                NEED_DECAY=need_decay,
                NEED_PREV=need_prev,
                NEED_VALUE=need_value,
                **plan.tile,
            )
        if need_gate or need_decay:
            light_layer_bwd_rows_kernel[(-(-gates.numel() // row_heads),)](
                q,
                k,
                gates,
                partial,
                q if dq is None else dq,
                k if dk is None else dk,
                decays,
                gates.numel(),
                heads,
                plan.head_dim,
                plan.chunks,
                plan.parts,
                scale,
                HAS_QUERY=dq is not None,
                HAS_KEY=dk is not None,
                HAS_DECAY=need_decay,
                HEADS=row_heads,
                BLOCK_S=min(power_of_two(plan.chunks), _ROW_PARTS),
                BLOCK_D=block,
                num_warps=NUM_WARPS,
            )
    found = produce_backward(
        x,
        Filters(filters.wq, filters.wk, filters.wv),
        mean,
        dq,
        dk,
        dv if need_dv else None,
        residual,
        needs[:4],
        Light(None if need_value else gates, ddecay, decays),
    )
    return LightGradients(*found, ddecay, dprev)
