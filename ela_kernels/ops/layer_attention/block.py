"""A whole residual block in one autograd node: `x + mask * act(norm(what the layer retrieves))`.

As `layer.py`, with what follows the retrieval: the norm's statistics are taken while the retrieval is still in cache,
and one more pass ends the block.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ela_kernels.backends.layout import readable
from ela_kernels.backends.types import (
    Epilogue,
    Filters,
    LayerForward,
    NormGradients,
)
from ela_kernels.ops.layer_attention.layer import LayerOutput, attended, gradients
from ela_kernels.ops.layer_attention.opaque import opaque
from ela_kernels.ops.layer_attention.record import (
    Link,
    applied,
    in_form_of,
    keep,
    layer_kernels,
    new_token,
    refuse_second_derivative,
    token_gradient,
)
from ela_kernels.ops.layer_attention.saved_tensors import (
    release_pairs,
    save_with_pairs,
    unpacked_with_pairs,
)

NO_NORM_GRADIENTS = NormGradients(None, None, None)


def of_parameters(
    norm: NormGradients, gamma: Tensor | None, beta: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of a norm's parameters, in their dtype."""
    dgamma, dbeta = (
        None if d is None or w is None else d.to(w.dtype)
        for d, w in ((norm.gamma, gamma), (norm.beta, beta))
    )
    return dgamma, dbeta


@opaque
class _Block(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        wq: Tensor,
        wk: Tensor,
        wv: Tensor,
        gamma: Tensor | None,
        beta: Tensor | None,
        prev_weights: Tensor | None,
        epilogue: Epilogue,
        token: Tensor | None,
        link: Link,
    ) -> tuple[Tensor | None, ...]:
        keep(ctx, link)
        ctx.token = token
        # Not the parameters, which are saved below: autograd checks their versions.
        ctx.epilogue = epilogue._replace(gamma=None, beta=None, track=None)
        r, statistics, out = _end(x, Filters(wq, wk, wv), prev_weights, epilogue, link, True)
        save_with_pairs(
            ctx,
            link,
            r.k,
            r.v,
            x,
            wq,
            wk,
            wv,
            gamma,
            beta,
            r.mean,
            r.q,
            r.weights,
            prev_weights,
            r.out,
            statistics,
        )
        ctx.mark_non_differentiable(statistics)
        return out, r.weights, r.kl, new_token(token, x), r.k, r.v, statistics

    @staticmethod
    def backward(
        ctx: Any,
        dout: Tensor | None,
        dweights: Tensor | None,
        dkl: Tensor | None,
        _: Tensor | None,
        dk: Tensor | None,
        dv: Tensor | None,
        __: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        tensors, keys, values = unpacked_with_pairs(ctx)
        x, wq, wk, wv, gamma, beta, mean, q, weights, prev, o, statistics = tensors
        norm = NO_NORM_GRADIENTS
        if dout is not None:
            dout = in_form_of(values[-1], dout, ctx.channels_last)
            epilogue = ctx.epilogue._replace(gamma=gamma, beta=beta)
            norm = ctx.layer.norm_backward(o, dout, statistics, epilogue)
        needs, filters = ctx.needs_input_grad, Filters(wq, wk, wv)
        own = attended(ctx, q, keys, values, prev, weights, norm.o, dweights, dkl, needs[6])
        found = gradients(ctx, x, filters, mean, own, dk, dv, dout, needs[:4], norm.pending)
        release_pairs(ctx)
        *inputs, dprev = found
        dgamma, dbeta = of_parameters(norm, gamma, beta)
        return *inputs, dgamma, dbeta, dprev, None, token_gradient(ctx, ctx.token), None


def _end(
    x: Tensor,
    filters: Filters,
    prev_weights: Tensor | None,
    epilogue: Epilogue,
    link: Link,
    keeps_out: bool,
) -> tuple[LayerForward, Tensor, Tensor]:
    """The layer, the statistics that its retrieval is normed with, and the block's output."""
    kernels = layer_kernels(link)
    r = kernels.layer_forward(
        x,
        filters,
        link.keys,
        link.values,
        link.heads,
        link.scale,
        prev_weights,
        False,
        epilogue=epilogue,
        keeps_out=keeps_out,
    )
    statistics = r.statistics if epilogue.statistics is None else epilogue.statistics
    assert statistics is not None
    if epilogue.track is not None:
        epilogue.track(statistics)
    if r.block is not None:
        return r, statistics, r.block
    assert r.out is not None
    return r, statistics, kernels.norm_forward(r.out, x, statistics, epilogue)


def block_pull(
    x: Tensor,
    filters: Filters,
    epilogue: Epilogue,
    prev_weights: Tensor | None,
    token: Tensor | None,
    link: Link,
) -> tuple[LayerOutput, Tensor]:
    """One block on a history, as :func:`layer_pull`; and the statistics `[2, C]` that it was normed with."""
    x = readable(x)
    if not torch.is_grad_enabled():
        r, statistics, out = _end(x, filters, prev_weights, epilogue, link, False)
        assert r.weights is not None
        return (out, r.weights, r.kl, token, r.k, r.v), statistics
    gamma, beta = epilogue.gamma, epilogue.beta
    out, weights, kl, own, k, v, statistics = applied(
        _Block, x, *filters, gamma, beta, prev_weights, epilogue, token, link
    )
    return (out, weights, kl, own if own.requires_grad else token, k, v), statistics
