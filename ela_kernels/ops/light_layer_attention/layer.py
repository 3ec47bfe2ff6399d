"""A whole light layer in one autograd node, alone or with the residual block around it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ela_kernels.backends.contract import LightKernels
from ela_kernels.backends.layout import as_read_beside, readable, resolved
from ela_kernels.backends.memory import cast as to_dtype
from ela_kernels.backends.types import (
    Epilogue,
    Filters,
    LightFilters,
    LightForward,
)
from ela_kernels.ops.autocast import as_autocast
from ela_kernels.ops.layer_attention.block import NO_NORM_GRADIENTS, of_parameters
from ela_kernels.ops.layer_attention.opaque import opaque
from ela_kernels.ops.layer_attention.record import in_form_of
from ela_kernels.ops.layer_attention.saved_tensors import (
    save,
    unpacked,
)


def _refuse_second_derivative() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "LightLayerAttention: a second derivative was asked for (create_graph=True), and the kernels have none; "
            "use ela_kernels.use_backend('eager'), or the functional light_layer_attention"
        )


def _kept(tensors: tuple[Tensor, ...]) -> tuple[Tensor, LightFilters, Tensor, LightForward]:
    """What `_save` saved: x, the filters, the previous output, and what the forward left for the backward."""
    x, wq, wk, wv, decay, prev, out, mean, q, k, v, factors = tensors
    return x, LightFilters(wq, wk, wv, decay), prev, LightForward(out, mean, q, k, v, factors, None)


@opaque
class _LightLayer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        wq: Tensor,
        wk: Tensor,
        wv: Tensor,
        decay: Tensor,
        prev: Tensor,
        heads: int,
        scale: float,
        kernels: LightKernels,
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.heads, ctx.scale, ctx.kernels = heads, scale, kernels
        filters = LightFilters(wq, wk, wv, decay)
        r = kernels.light_layer_forward(x, filters, prev, heads, scale)
        # Not its own output, which the backward has no use for.
        save(ctx, x, *filters, prev, None, *r[1:6])
        return r.out

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None) -> tuple[Tensor | None, ...]:
        _refuse_second_derivative()
        if dout is None:
            return (None,) * 9
        x, filters, prev, kept = _kept(unpacked(ctx))
        dout = in_form_of(kept.v, dout, False)
        needs = ctx.needs_input_grad[:6]
        found = ctx.kernels.light_layer_backward(
            x, filters, prev, ctx.heads, ctx.scale, kept, dout, None, needs
        )
        return *found, None, None, None


@opaque
class _LightBlock(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        wq: Tensor,
        wk: Tensor,
        wv: Tensor,
        decay: Tensor,
        prev: Tensor,
        gamma: Tensor | None,
        beta: Tensor | None,
        epilogue: Epilogue,
        heads: int,
        scale: float,
        kernels: LightKernels,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.heads, ctx.scale, ctx.kernels = heads, scale, kernels
        ctx.epilogue = epilogue._replace(gamma=None, beta=None, track=None)
        filters = LightFilters(wq, wk, wv, decay)
        r, statistics, out = _end(kernels, x, filters, prev, epilogue, heads, scale)
        save(ctx, x, *filters, prev, r.out, *r[1:6], gamma, beta, statistics)
        ctx.mark_non_differentiable(statistics)
        return out, r.out, statistics

    @staticmethod
    def backward(
        ctx: Any, dout: Tensor | None, dnext: Tensor | None, _: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        _refuse_second_derivative()
        *tensors, gamma, beta, statistics = unpacked(ctx)
        x, filters, prev, kept = _kept(tuple(tensors))
        # The gradient of the light output: from the next layer, and from the norm.
        norm = NO_NORM_GRADIENTS
        do = None if dnext is None else in_form_of(kept.v, dnext, False)
        if dout is not None:
            dout = in_form_of(kept.v, dout, False)
            epilogue = ctx.epilogue._replace(gamma=gamma, beta=beta)
            norm = ctx.kernels.norm_backward(kept.out, dout, statistics, epilogue, do)
            do = norm.o
        if do is None:
            return (None,) * 12
        needs = ctx.needs_input_grad[:6]
        found = ctx.kernels.light_layer_backward(
            x, filters, prev, ctx.heads, ctx.scale, kept, do, dout, needs, norm.pending
        )
        return *found, *of_parameters(norm, gamma, beta), None, None, None, None


def _end(
    kernels: LightKernels,
    x: Tensor,
    filters: LightFilters,
    prev: Tensor,
    epilogue: Epilogue,
    heads: int,
    scale: float,
) -> tuple[LightForward, Tensor, Tensor]:
    """The layer, the statistics that it is normed with, and the block's output."""
    r = kernels.light_layer_forward(x, filters, prev, heads, scale, epilogue)
    statistics = r.statistics if epilogue.statistics is None else epilogue.statistics
    assert statistics is not None
    if epilogue.track is not None:
        epilogue.track(statistics)
    if r.block is not None:
        return r, statistics, r.block
    return r, statistics, kernels.norm_forward(r.out, x, statistics, epilogue)


def _as_read(x: Tensor, filters: LightFilters, prev: Tensor) -> tuple[Tensor, LightFilters, Tensor]:
    """Maps in one dtype and form, as the kernels read them, and the filters in that dtype.

    The decay keeps its own: no operation of autocast's takes it.
    """
    wq, wk, wv, decay = filters
    x, cast = as_autocast(x, Filters(wq, wk, wv))
    assert cast.wq is not None
    x = readable(resolved(x))
    return (
        x,
        LightFilters(cast.wq, cast.wk, cast.wv, decay),
        as_read_beside(x, to_dtype(prev, x.dtype, "prev_out")),
    )


def light_layer(
    kernels: LightKernels,
    x: Tensor,
    filters: LightFilters,
    prev: Tensor,
    heads: int,
    scale: float,
) -> Tensor:
    """What a light layer makes of `x` and the previous output, each `[B, C, H, W]`; see :func:`choose_light_kernels`.

    Equivalent PyTorch::

        y = x.mean((2, 3)).unsqueeze(1)                                           # [B, 1, C]
        q, k = (F.conv1d(y, w, padding=w.shape[-1] // 2).squeeze(1) for w in (wq, wk))
        v = F.conv2d(x, wv, padding=1, groups=C)
        out = ek.light_layer_attention(q, k, v, prev, decay, heads, scale)

    Under autocast the maps and filters are cast to its dtype, as a convolution casts them.
    """
    x, filters, prev = _as_read(x, filters, prev)
    if not torch.is_grad_enabled():
        return kernels.light_layer_forward(x, filters, prev, heads, scale).out
    out: Tensor = _LightLayer.apply(x, *filters, prev, heads, scale, kernels)
    return out


def light_block(
    kernels: LightKernels,
    x: Tensor,
    filters: LightFilters,
    prev: Tensor,
    epilogue: Epilogue,
    heads: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """`x + mask * act(norm(o))` of what :func:`light_layer` gives, o; and o; and the norm's statistics `[2, C]`.

    Under autocast `x` has its dtype already.
    """
    x, filters, prev = _as_read(x, filters, prev)
    if not torch.is_grad_enabled():
        r, statistics, out = _end(kernels, x, filters, prev, epilogue, heads, scale)
        return out, r.out, statistics
    gamma, beta = epilogue.gamma, epilogue.beta
    found: tuple[Tensor, Tensor, Tensor] = _LightBlock.apply(
        x, *filters, prev, gamma, beta, epilogue, heads, scale, kernels
    )
    return found
