"""A block around an earlier layer's retrieval, in one autograd node: `x + mask * act(norm(o))`, and its pair or none.

Least bytes, forward: `o` and `x` read, the output written, and with a pair the value written; the statistics of the
batch are those that were taken when `o` was made. Backward: `o` and the output's gradient read twice, for the norm's
two sums and for the gradient of `o`, which is written; that of `x` is that of the output where no pair was read.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ela_kernels.backends.contract import KernelBackend
from ela_kernels.backends.layout import readable
from ela_kernels.backends.types import (
    Arrived,
    Filters,
    LayerNeeds,
    NormAct,
    Retrieved,
    SavedLayer,
)
from ela_kernels.ops.autograd.gradients import in_form_of, refuse_second_derivative
from ela_kernels.ops.autograd.opaque import opaque
from ela_kernels.ops.autograd.record import applied, new_token, token_gradient
from ela_kernels.ops.autograd.saved_tensors import save, unpacked
from ela_kernels.ops.layer_attention.layer_node import (
    gradients,
    in_dtype_of,
    value_and_stand_in,
    value_outputs,
    with_parameters,
    without_gradient,
    without_parameters,
)
from ela_kernels.ops.layer_attention.link import Link, contributions, keep
from ela_kernels.torch_internals import runs_as_written


def _block(x: Tensor, reused: Retrieved, epilogue: NormAct, backend: KernelBackend) -> Tensor:
    out = backend.norm_forward(reused.o, x, reused.statistics, epilogue)
    if epilogue.track is not None:
        epilogue.track(reused.statistics)
    return out


@opaque
class _Reuse(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        o: Tensor,
        gamma: Tensor | None,
        beta: Tensor | None,
        statistics: Tensor,
        epilogue: NormAct,
        backend: KernelBackend,
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.epilogue, ctx.backend = without_parameters(epilogue), backend
        out = _block(x, Retrieved(o, statistics), epilogue, backend)
        save(ctx, o, gamma, beta, statistics)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        if dout is None:
            return (None,) * 7
        o, gamma, beta, statistics = unpacked(ctx)
        norm = with_parameters(ctx.epilogue, gamma, beta)
        assert type(norm) is NormAct
        found = ctx.backend.norm_backward(o, in_form_of(o, dout, False), statistics, norm)
        own = in_dtype_of(gamma, found.gamma), in_dtype_of(beta, found.beta)
        return dout, found.o, *own, None, None, None


@opaque
class _ReuseAndProvide(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        wk: Tensor,
        wv: Tensor,
        o: Tensor,
        gamma: Tensor | None,
        beta: Tensor | None,
        statistics: Tensor,
        epilogue: NormAct,
        token: Tensor | None,
        link: Link,
    ) -> tuple[Tensor | None, ...]:
        keep(ctx, link)
        ctx.token, ctx.epilogue = token, without_parameters(epilogue)
        reused = Retrieved(o, statistics)
        out, mean, k, v = _block_and_pair(x, Filters(None, wk, wv), reused, epilogue, link)
        save(ctx, x, wk, wv, mean, o, gamma, beta, statistics)
        v, held = value_outputs(v, x, link)
        without_gradient(ctx, held)
        return out, new_token(token, x), k, v, held

    @staticmethod
    def backward(
        ctx: Any,
        dout: Tensor | None,
        _: Tensor | None,
        dk: Tensor | None,
        dv: Tensor | None,
        __: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        x, wk, wv, mean, o, gamma, beta, statistics = unpacked(ctx)
        epilogue = with_parameters(ctx.epilogue, gamma, beta)
        assert type(epilogue) is NormAct
        dout = None if dout is None else in_form_of(o, dout, False)
        dx = dwk = dwv = do = dgamma = dbeta = None
        if dout is not None and dk is None and dv is None and not contributions(ctx):
            dx = dout
            do, dgamma, dbeta = ctx.backend.norm_backward(o, dout, statistics, epilogue)
        else:
            need_x, need_wk, need_wv = ctx.needs_input_grad[:3]
            filters = Filters(None, wk, wv)
            saved = SavedLayer(x, filters, mean, ctx.heads, None, epilogue, o, statistics)
            needs = LayerNeeds(need_x, False, need_wk, need_wv, False)
            found = gradients(ctx, saved, Arrived(dout, None, None, dk, dv), needs)
            dx, _, dwk, dwv, _, dgamma, dbeta, do = found
        of_norm = in_dtype_of(gamma, dgamma), in_dtype_of(beta, dbeta)
        return dx, dwk, dwv, do, *of_norm, None, None, token_gradient(ctx, ctx.token), None


def _block_and_pair(
    x: Tensor, filters: Filters, reused: Retrieved, epilogue: NormAct, link: Link
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`(out, mean, key, value)`."""
    r = link.backend.layer(
        x,
        filters,
        (),
        (),
        link.heads,
        link.scale,
        None,
        epilogue,
        reused=reused,
        value_dtype=link.held,
    )
    assert r.out is not None
    if epilogue.track is not None:
        epilogue.track(reused.statistics)
    return r.out, r.mean, r.k, r.v


@runs_as_written
def reuse_pull(x: Tensor, reused: Retrieved, epilogue: NormAct, backend: KernelBackend) -> Tensor:
    """The block's output, of a layer that gives no pair."""
    x = readable(x)
    if not torch.is_grad_enabled():
        return _block(x, reused, epilogue, backend)
    of_norm = epilogue.gamma, epilogue.beta, reused.statistics
    out: Tensor = applied(_Reuse, x, reused.o, *of_norm, epilogue, backend)
    return out


@runs_as_written
def reuse_and_provide_pull(
    x: Tensor,
    filters: Filters,
    reused: Retrieved,
    epilogue: NormAct,
    token: Tensor | None,
    link: Link,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor | None]:
    """`(out, token, key, value, stand_in)` of a layer that gives its pair too."""
    x = readable(x)
    if not torch.is_grad_enabled():
        out, _, k, v = _block_and_pair(x, filters._replace(wq=None), reused, epilogue, link)
        return out, token, k, v, None
    of_norm = epilogue.gamma, epilogue.beta, reused.statistics
    out, own, k, v, held = applied(
        _ReuseAndProvide, x, filters.wk, filters.wv, reused.o, *of_norm, epilogue, token, link
    )
    return out, own if own.requires_grad else token, k, *value_and_stand_in(v, held)
