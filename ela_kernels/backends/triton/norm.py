"""Launches of a residual block's end: `x + mask * act(norm(o))`, and back."""

from __future__ import annotations

import torch
from torch import Tensor

from ela_kernels.backends.gpu_tables import (
    Sizes,
    Strides,
    alike_maps,
    check_norm,
    compact_strides,
)
from ela_kernels.backends.layout import dense, empty_map, is_interleaved, kernel_sizes
from ela_kernels.backends.triton.attention import Moments, guard, units
from ela_kernels.backends.triton.kernels.norm import (
    layer_norm_bwd_kernel,
    layer_norm_fwd_kernel,
    layer_norm_statistics_kernel,
    layer_norm_sums_kernel,
)
from ela_kernels.backends.triton.plan import NUM_WARPS, Plan, make_plan
from ela_kernels.backends.types import NormAct, NormGradients

# What a program of a second launch reads at once of partial sums: parts by channels.
_BLOCK_P = 128
_BLOCK_C = 16


def statistics_of(moments: Moments) -> Tensor:
    """Mean and biased variance of each channel `[2, C]` from the partial ones."""
    partial, plan = moments
    _, parts, channels = partial.shape
    statistics = torch.empty((2, channels), dtype=torch.float32, device=partial.device)
    with guard(partial.device):
        layer_norm_statistics_kernel[(-(-channels // _BLOCK_C),)](
            partial,
            statistics,
            channels,
            parts,
            plan.chunks,
            plan.positions,
            SPAN=plan.span,
            BLOCK_P=_BLOCK_P,
            BLOCK_C=_BLOCK_C,
            num_warps=NUM_WARPS,
        )
    return statistics


def _plan(sizes: Sizes, strides: tuple[Strides, ...], dtype: torch.dtype) -> Plan:
    # Three maps are held at once, as in an attention over as many.
    return make_plan(sizes, strides, dtype, 4, True)


def _sizes(o: Tensor) -> Sizes:
    """As if each channel were a head: then a tile's lines are channels."""
    return kernel_sizes(o, o.shape[1], False, is_interleaved(o, False))


def norm_forward(o: Tensor, x: Tensor, statistics: Tensor, norm: NormAct) -> Tensor:
    """`x + mask * act(norm(o))` in one launch."""
    check_norm(o, x, statistics, norm)
    interleaved = is_interleaved(o, False)
    sizes = _sizes(o)
    (o,), o_strides = alike_maps((o,), False, interleaved)
    (x,), x_strides = alike_maps((x,), False, interleaved)
    out, out_strides = empty_map(o, False, interleaved), compact_strides(sizes)
    gamma, beta, mask = dense(norm.gamma), dense(norm.beta), dense(norm.mask)
    statistics = statistics.contiguous()
    plan = _plan(sizes, (o_strides, x_strides, out_strides), o.dtype)
    with guard(o.device):
        layer_norm_fwd_kernel[(plan.programs,)](
            o,
            x,
            out,
            statistics,
            statistics if gamma is None else gamma,
            statistics if beta is None else beta,
            statistics if mask is None else mask,
            *plan.geometry,
            *units(plan, o_strides),
            *units(plan, x_strides),
            *units(plan, out_strides),
            norm.eps,
            HAS_GAMMA=gamma is not None,
            HAS_BETA=beta is not None,
            HAS_MASK=mask is not None,
            RELU=norm.relu,
            **plan.tile,
        )
    return out


def norm_backward(
    o: Tensor, dout: Tensor, statistics: Tensor, norm: NormAct, also: Tensor | None = None
) -> NormGradients:
    """The gradients of what :func:`norm_forward` does. `also` is added to the gradient of `o`.

    Three launches with the batch's statistics, the sums first; two with given ones, or one without parameters.
    """
    check_norm(o, dout, statistics, norm, also)
    interleaved = is_interleaved(o, False)
    sizes = _sizes(o)
    (o,), o_strides = alike_maps((o,), False, interleaved)
    (dout,), dout_strides = alike_maps((dout,), False, interleaved)
    do, do_strides = empty_map(o, False, interleaved), compact_strides(sizes)
    also_strides = do_strides
    if also is not None:
        (also,), also_strides = alike_maps((also,), False, interleaved)
    gamma, beta, mask = dense(norm.gamma), dense(norm.beta), dense(norm.mask)
    statistics = statistics.contiguous()
    dgamma = None if gamma is None else torch.empty_like(gamma)
    dbeta = None if beta is None else torch.empty_like(beta)
    plan = _plan(sizes, (o_strides, dout_strides, do_strides, also_strides), o.dtype)
    is_moved = norm.statistics is None
    has_sums = is_moved or gamma is not None or beta is not None
    channels = plan.channels
    partial = moved = statistics
    if has_sums:
        partial = torch.empty((2, plan.parts, channels), dtype=torch.float32, device=o.device)
    if is_moved:
        moved = torch.empty_like(statistics)

    def launch(takes_sums: bool, writes: bool) -> None:
        layer_norm_bwd_kernel[(plan.programs,)](
            o,
            dout,
            do,
            dout if also is None else also,
            statistics,
            statistics if gamma is None else gamma,
            statistics if beta is None else beta,
            statistics if mask is None else mask,
            moved,
            partial,
            *plan.geometry,
            *units(plan, o_strides),
            *units(plan, dout_strides),
            *units(plan, do_strides),
            *units(plan, also_strides),
            norm.eps,
            plan.parts,
            HAS_GAMMA=gamma is not None,
            HAS_BETA=beta is not None,
            HAS_MASK=mask is not None,
            RELU=norm.relu,
            SUMS=takes_sums,
            WRITES=writes,
            MOVED=is_moved,
            HAS_ALSO=also is not None,
            **plan.tile,
        )

    with guard(o.device):
        launch(has_sums, not is_moved)
        if has_sums:
            layer_norm_sums_kernel[(-(-channels // _BLOCK_C),)](
                partial,
                statistics,
                moved,
                statistics if dgamma is None else dgamma,
                statistics if dbeta is None else dbeta,
                channels,
                plan.parts,
                plan.batch * plan.positions,
                norm.eps,
                HAS_GAMMA=dgamma is not None,
                HAS_BETA=dbeta is not None,
                MOVED=is_moved,
                BLOCK_P=_BLOCK_P,
                BLOCK_C=_BLOCK_C,
                num_warps=NUM_WARPS,
            )
        if is_moved:
            launch(False, True)
    return NormGradients(do, dgamma, dbeta)
