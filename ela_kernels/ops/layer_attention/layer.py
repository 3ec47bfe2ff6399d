"""A whole layer in one autograd node: from a feature map to what it retrieves, with the pull form of the backward.

The value's gradient is gathered from the later layers' output gradients, and convolved; on the CPU a part at a time,
while that part is in cache, so that it is never stored. Key and value are outputs of the node too: a later layer that
no kernel serves reads them as autograd inputs, and what it sends back is added.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ela_kernels.backends.layout import readable
from ela_kernels.backends.types import (
    Attended,
    Filters,
    LayerForward,
    LayerGradients,
    Saved,
)
from ela_kernels.ops.layer_attention.opaque import opaque
from ela_kernels.ops.layer_attention.record import (
    Link,
    applied,
    in_form_of,
    keep,
    layer_kernels,
    left_by_later_layers,
    new_token,
    refuse_second_derivative,
    token_gradient,
)
from ela_kernels.ops.layer_attention.saved_tensors import (
    release_pairs,
    save,
    save_with_pairs,
    unpacked,
    unpacked_with_pairs,
)

LayerOutput = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor, Tensor]
"""out, weights, kl, token, key, value."""


def attended(
    ctx: Any,
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    prev_weights: Tensor | None,
    weights: Tensor,
    dout: Tensor | None,
    dweights: Tensor | None,
    dkl: Tensor | None,
    need_prev: bool,
) -> Attended | None:
    """The layer's own attention for its backward, and into the record what the layers before it will need.

    None where no gradient arrives through it. The last key and value are its own.
    """
    if dout is None and dweights is None and dkl is None:
        return None
    saved = Saved(q, keys, values, ctx.heads, ctx.scale, prev_weights, weights, ctx.channels_last)
    dscores = torch.empty_like(weights)
    left = ctx.kernels.Retrieved(q, weights, dscores, dout, ctx.channels_last)
    ctx.record.add(ctx.path, left)
    return Attended(saved, dout, dweights, dkl, dscores, need_prev)


def gradients(
    ctx: Any,
    x: Tensor,
    filters: Filters,
    mean: Tensor,
    own: Attended | None,
    dk: Tensor | None,
    dv: Tensor | None,
    residual: Tensor | None,
    needs: tuple[bool, ...],
    pending: Any = None,
) -> LayerGradients:
    left = left_by_later_layers(ctx)
    if not left and dk is None and dv is None:  # its own, where it has one, is among those
        return LayerGradients(None, None, None, None, None)
    index = len(ctx.path) - 1
    found: LayerGradients = ctx.layer.layer_backward(
        x, filters, mean, ctx.heads, index, own, left, dk, dv, residual, needs, pending
    )
    return found


@opaque
class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        wq: Tensor,
        wk: Tensor,
        wv: Tensor,
        prev_weights: Tensor | None,
        has_residual: bool,
        token: Tensor | None,
        link: Link,
    ) -> LayerOutput:
        keep(ctx, link)
        ctx.token, ctx.has_residual = token, has_residual
        r = _retrieve(x, Filters(wq, wk, wv), prev_weights, has_residual, link)
        save_with_pairs(ctx, link, r.k, r.v, x, wq, wk, wv, r.mean, r.q, r.weights, prev_weights)
        assert r.out is not None
        assert r.weights is not None
        return r.out, r.weights, r.kl, new_token(token, x), r.k, r.v

    @staticmethod
    def backward(
        ctx: Any,
        dout: Tensor | None,
        dweights: Tensor | None,
        dkl: Tensor | None,
        _: Tensor | None,
        dk: Tensor | None,
        dv: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        (x, wq, wk, wv, mean, q, weights, prev), keys, values = unpacked_with_pairs(ctx)
        if dout is not None:
            dout = in_form_of(values[-1], dout, ctx.channels_last)
        needs = ctx.needs_input_grad
        own = attended(ctx, q, keys, values, prev, weights, dout, dweights, dkl, needs[4])
        residual = dout if ctx.has_residual else None
        found = gradients(ctx, x, Filters(wq, wk, wv), mean, own, dk, dv, residual, needs[:4])
        release_pairs(ctx)
        return *found, None, token_gradient(ctx, ctx.token), None


@opaque
class _Provider(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, wk: Tensor, wv: Tensor, token: Tensor | None, link: Link
    ) -> tuple[Tensor, Tensor, Tensor]:
        keep(ctx, link)
        ctx.token = token
        r = _provide(x, Filters(None, wk, wv), link)
        save(ctx, x, wk, wv, r.mean)
        return new_token(token, x), r.k, r.v

    @staticmethod
    def backward(
        ctx: Any, _: Tensor | None, dk: Tensor | None, dv: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        x, wk, wv, mean = unpacked(ctx)
        need_x, need_wk, need_wv = ctx.needs_input_grad[:3]
        needs = (need_x, False, need_wk, need_wv)
        found = gradients(ctx, x, Filters(None, wk, wv), mean, None, dk, dv, None, needs)
        return found.x, found.wk, found.wv, token_gradient(ctx, ctx.token), None


def _retrieve(
    x: Tensor, filters: Filters, prev_weights: Tensor | None, has_residual: bool, link: Link
) -> LayerForward:
    return layer_kernels(link).layer_forward(
        x, filters, link.keys, link.values, link.heads, link.scale, prev_weights, has_residual
    )


def _provide(x: Tensor, filters: Filters, link: Link) -> LayerForward:
    return layer_kernels(link).layer_forward(
        x, filters, (), (), link.heads, link.scale, None, False
    )


def layer_pull(
    x: Tensor,
    filters: Filters,
    prev_weights: Tensor | None,
    has_residual: bool,
    token: Tensor | None,
    link: Link,
) -> LayerOutput:
    """One layer on a history: `link` holds the keys and values before it, and its own place last in the path."""
    x = readable(x)
    if not torch.is_grad_enabled():
        r = _retrieve(x, filters, prev_weights, has_residual, link)
        assert r.out is not None
        assert r.weights is not None
        return r.out, r.weights, r.kl, token, r.k, r.v
    out, weights, kl, own, k, v = applied(
        _Layer, x, *filters, prev_weights, has_residual, token, link
    )
    return out, weights, kl, own if own.requires_grad else token, k, v


def provider_pull(
    x: Tensor, filters: Filters, token: Tensor | None, link: Link
) -> tuple[Tensor | None, Tensor, Tensor]:
    """`(token, key, value)` of a layer that gives its pair and retrieves nothing."""
    x = readable(x)
    if not torch.is_grad_enabled():
        r = _provide(x, filters._replace(wq=None), link)
        return token, r.k, r.v
    own, k, v = applied(_Provider, x, filters.wk, filters.wv, token, link)
    return own if own.requires_grad else token, k, v
