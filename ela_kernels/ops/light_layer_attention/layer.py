"""A whole light layer in one autograd node, alone or with the residual block around it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ela_kernels.backends.contract import KernelBackend
from ela_kernels.backends.layout import as_read_beside, readable, resolved
from ela_kernels.backends.memory import cast as to_dtype
from ela_kernels.backends.types import (
    Filters,
    LightFilters,
    LightForward,
    LightNeeds,
    NormAct,
    SavedLightLayer,
    ValueAct,
)
from ela_kernels.ops.autocast import as_autocast
from ela_kernels.ops.autograd.gradients import in_form_of
from ela_kernels.ops.autograd.opaque import opaque
from ela_kernels.ops.autograd.saved_tensors import save, unpacked
from ela_kernels.ops.checks import check_value_act
from ela_kernels.ops.layer_attention.layer_node import in_dtype_of
from ela_kernels.torch_internals import runs_as_written


def _refuse_second_derivative() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "LightLayerAttention: a second derivative was asked for (create_graph=True), and the kernels have none; "
            "use ela_kernels.use_backend('eager'), or the functional light_layer_attention"
        )


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
        gamma: Tensor | None,
        beta: Tensor | None,
        epilogue: NormAct | None,
        heads: int,
        scale: float,
        value_act: ValueAct | None,
        backend: KernelBackend,
    ) -> tuple[Tensor | None, ...]:
        ctx.set_materialize_grads(False)
        ctx.heads, ctx.scale, ctx.backend, ctx.epilogue = heads, scale, backend, None
        ctx.value_act = value_act
        filters = LightFilters(wq, wk, wv, decay)
        r = _run(backend, x, filters, prev, epilogue, heads, scale, value_act, True)
        of_norm: tuple[Tensor | None, ...] = ()
        if epilogue is not None:
            assert r.statistics is not None
            # Parameters are saved, so that autograd checks their versions.
            ctx.epilogue = epilogue._replace(gamma=None, beta=None, track=None)
            of_norm = (r.out, r.statistics, gamma, beta)
            ctx.mark_non_differentiable(r.statistics)
        # Without a norm not its own output, which the backward has no use for.
        save(ctx, x, *filters, prev, *r[1:6], *of_norm)
        return r.out, r.block, r.statistics

    @staticmethod
    def backward(
        ctx: Any, dnext: Tensor | None, dout: Tensor | None, _: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        _refuse_second_derivative()
        if dout is None and dnext is None:
            return (None,) * 13
        x, wq, wk, wv, decay, prev, mean, q, k, v, factors, *of_norm = unpacked(ctx)
        out, statistics, gamma, beta = of_norm or (None, None, None, None)
        epilogue = ctx.epilogue
        if epilogue is not None:
            epilogue = epilogue._replace(gamma=gamma, beta=beta)
        saved = SavedLightLayer(
            x,
            LightFilters(wq, wk, wv, decay),
            prev,
            ctx.heads,
            ctx.scale,
            ctx.value_act,
            epilogue,
            mean,
            q,
            k,
            v,
            factors,
            out,
            statistics,
        )
        dnext = None if dnext is None else in_form_of(v, dnext, False)
        dout = None if dout is None else in_form_of(v, dout, False)
        needs = LightNeeds(*ctx.needs_input_grad[:6])
        *inputs, dgamma, dbeta = ctx.backend.light_layer_backward(saved, dout, dnext, needs)
        of_parameters = in_dtype_of(gamma, dgamma), in_dtype_of(beta, dbeta)
        return *inputs, *of_parameters, None, None, None, None, None


def _run(
    backend: KernelBackend,
    x: Tensor,
    filters: LightFilters,
    prev: Tensor,
    epilogue: NormAct | None,
    heads: int,
    scale: float,
    value_act: ValueAct | None,
    keeps: bool,
) -> LightForward:
    r = backend.light_layer(x, filters, prev, heads, scale, epilogue, value_act, keeps)
    if epilogue is not None and epilogue.track is not None and not r.tracked:
        assert r.statistics is not None
        epilogue.track(r.statistics)
    return r


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


@runs_as_written
def light_layer(
    backend: KernelBackend,
    x: Tensor,
    filters: LightFilters,
    prev: Tensor,
    heads: int,
    scale: float,
    epilogue: NormAct | None = None,
    value_act: ValueAct | None = None,
) -> tuple[Tensor, Tensor | None]:
    """What a light layer makes of `x` and the previous output, each `[B, C, H, W]`, and of it the block around it.

    Equivalent PyTorch::

        y = x.mean((2, 3)).unsqueeze(1)                                           # [B, 1, C]
        q, k = (F.conv1d(y, w, padding=w.shape[-1] // 2).squeeze(1) for w in (wq, wk))
        v = F.conv2d(x, wv, padding=1, groups=C)                                  # and F.gelu(v) with `value_act`
        out = ek.light_layer_attention(q, k, v, prev, decay, heads, scale)
        block = x + mask * act(norm(out))                                         # with an epilogue; None without

    Under autocast the maps and filters are cast to its dtype, as a convolution casts them; `x` of a block has it
    already.

    Args:
        backend: what :func:`~ela_kernels.ops.light_layer_attention.plan.plan_light_layer` gave.
    """
    check_value_act(value_act)
    x, filters, prev = _as_read(x, filters, prev)
    if not torch.is_grad_enabled():
        r = _run(backend, x, filters, prev, epilogue, heads, scale, value_act, False)
        return r.out, r.block
    gamma = beta = None
    if epilogue is not None:
        gamma, beta = epilogue.gamma, epilogue.beta
    out, block, _ = _LightLayer.apply(
        x, *filters, prev, gamma, beta, epilogue, heads, scale, value_act, backend
    )
    return out, block
