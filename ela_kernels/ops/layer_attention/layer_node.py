"""A whole layer in one autograd node, alone or with the residual block around it, with the pull form of the backward.

From a feature map to what it retrieves and what follows. The value's gradient is gathered from the later layers' output
gradients, and convolved; some backends do that a part at a time, while it is in cache, and never store it. Key and
value are outputs of the node too: a later layer that no kernel serves reads them as autograd inputs, and what it sends
back is added.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ela_kernels.backends.layout import readable
from ela_kernels.backends.types import (
    Arrived,
    Epilogue,
    Filters,
    LayerForward,
    LayerGradients,
    LayerNeeds,
    NormAct,
    Saved,
    SavedLayer,
)
from ela_kernels.ops.autograd.gradients import in_form_of, refuse_second_derivative
from ela_kernels.ops.autograd.opaque import opaque
from ela_kernels.ops.autograd.record import applied, new_token, token_gradient
from ela_kernels.ops.autograd.saved_tensors import save, unpacked
from ela_kernels.ops.layer_attention.held import stand_in_like
from ela_kernels.ops.layer_attention.link import Link, contributions, keep
from ela_kernels.ops.layer_attention.saved_pairs import (
    release_pairs,
    save_with_pairs,
    unpacked_with_pairs,
)


class LayerOutput(NamedTuple):
    """What a layer on a history gives, and what the history keeps of it.

    `retrieved`: what a norm was given, where it was to be kept, and with `statistics` `[2, C]` if the norm took them.
    `stand_in`: of a value that is held in another dtype, what leads gradients to it.
    """

    out: Tensor
    weights: Tensor
    kl: Tensor | None
    token: Tensor | None
    key: Tensor
    value: Tensor
    retrieved: Tensor | None = None
    statistics: Tensor | None = None
    stand_in: Tensor | None = None


def without_parameters(epilogue: Epilogue | None) -> Epilogue | None:
    """As a node keeps it: the parameters are saved, so that autograd checks their versions."""
    if type(epilogue) is NormAct:
        return epilogue._replace(gamma=None, beta=None, track=None)
    return epilogue


def with_parameters(
    epilogue: Epilogue | None, gamma: Tensor | None, beta: Tensor | None
) -> Epilogue | None:
    return epilogue._replace(gamma=gamma, beta=beta) if type(epilogue) is NormAct else epilogue


def in_dtype_of(parameter: Tensor | None, gradient: Tensor | None) -> Tensor | None:
    return None if parameter is None or gradient is None else gradient.to(parameter.dtype)


def gradients(ctx: Any, saved: SavedLayer, arrived: Arrived, needs: LayerNeeds) -> LayerGradients:
    """The backend's, and into the record what the layers before this one will need."""
    found: LayerGradients
    index = len(ctx.path) - 1
    found, own = ctx.backend.layer_backward(saved, arrived, contributions(ctx), index, needs)
    if own is not None:
        ctx.record.add(ctx.path, own)
    return found


def _tracked(r: LayerForward, epilogue: Epilogue | None) -> LayerForward:
    if type(epilogue) is NormAct and epilogue.track is not None and not r.tracked:
        assert r.statistics is not None
        epilogue.track(r.statistics)
    return r


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
        gamma: Tensor | None,
        beta: Tensor | None,
        epilogue: Epilogue | None,
        keeps: bool,
        token: Tensor | None,
        link: Link,
    ) -> tuple[Tensor | None, ...]:
        keep(ctx, link)
        ctx.token, ctx.epilogue = token, without_parameters(epilogue)
        r = _retrieve(x, Filters(wq, wk, wv), prev_weights, epilogue, link, True)
        of_norm: tuple[Tensor | None, ...] = ()
        if r.statistics is not None:
            of_norm = (gamma, beta, r.retrieved, r.statistics)
        save_with_pairs(
            ctx, link, r.k, r.v, x, wq, wk, wv, r.mean, r.q, r.weights, prev_weights, *of_norm
        )
        retrieved = r.retrieved if keeps else None
        v, held = value_outputs(r.v, x, link)
        without_gradient(ctx, r.statistics, held)
        token = new_token(token, x)
        return r.out, r.weights, r.kl, token, r.k, v, retrieved, r.statistics, held

    @staticmethod
    def backward(
        ctx: Any,
        dout: Tensor | None,
        dweights: Tensor | None,
        dkl: Tensor | None,
        _: Tensor | None,
        dk: Tensor | None,
        dv: Tensor | None,
        dretrieved: Tensor | None,
        *_of_others: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        tensors, keys, values = unpacked_with_pairs(ctx)
        x, wq, wk, wv, mean, q, weights, prev, *of_norm = tensors
        gamma, beta, retrieved, statistics = of_norm or (None, None, None, None)
        if dout is not None:
            dout = in_form_of(values[-1], dout, ctx.channels_last)
        if dretrieved is not None:
            dretrieved = in_form_of(values[-1], dretrieved, ctx.channels_last)
        attention = Saved(
            *(q, keys, values, ctx.heads, ctx.scale, prev, weights, ctx.channels_last),
            ctx.tolerance,
        )
        epilogue = with_parameters(ctx.epilogue, gamma, beta)
        filters = Filters(wq, wk, wv)
        saved = SavedLayer(x, filters, mean, ctx.heads, attention, epilogue, retrieved, statistics)
        needs = LayerNeeds(*ctx.needs_input_grad[:5])
        arrived = Arrived(dout, dweights, dkl, dk, dv, dretrieved)
        *inputs, dgamma, dbeta, _ = gradients(ctx, saved, arrived, needs)
        release_pairs(ctx)
        return (
            *inputs,
            in_dtype_of(gamma, dgamma),
            in_dtype_of(beta, dbeta),
            None,
            None,
            token_gradient(ctx, ctx.token),
            None,
        )


@opaque
class _Provider(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, wk: Tensor, wv: Tensor, token: Tensor | None, link: Link
    ) -> tuple[Tensor | None, ...]:
        keep(ctx, link)
        ctx.token = token
        r = _provide(x, Filters(None, wk, wv), link)
        save(ctx, x, wk, wv, r.mean)
        v, held = value_outputs(r.v, x, link)
        without_gradient(ctx, held)
        return new_token(token, x), r.k, v, held

    @staticmethod
    def backward(
        ctx: Any, _: Tensor | None, dk: Tensor | None, dv: Tensor | None, __: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        x, wk, wv, mean = unpacked(ctx)
        saved = SavedLayer(x, Filters(None, wk, wv), mean, ctx.heads, None, None, None, None)
        need_x, need_wk, need_wv = ctx.needs_input_grad[:3]
        needs = LayerNeeds(need_x, False, need_wk, need_wv, False)
        found = gradients(ctx, saved, Arrived(None, None, None, dk, dv), needs)
        return found.x, found.wk, found.wv, token_gradient(ctx, ctx.token), None


def _retrieve(
    x: Tensor,
    filters: Filters,
    prev_weights: Tensor | None,
    epilogue: Epilogue | None,
    link: Link,
    keeps_retrieved: bool,
) -> LayerForward:
    return _tracked(
        link.backend.layer(
            x,
            filters,
            link.keys,
            link.values,
            link.heads,
            link.scale,
            prev_weights,
            epilogue,
            keeps_retrieved,
            value_dtype=link.held,
            tolerance=link.tolerance,
        ),
        epilogue,
    )


def _provide(x: Tensor, filters: Filters, link: Link) -> LayerForward:
    return link.backend.layer(
        x, filters, (), (), link.heads, link.scale, None, value_dtype=link.held
    )


def value_outputs(v: Tensor, x: Tensor, link: Link) -> tuple[Tensor, Tensor | None]:
    """Two outputs of a node that made `v` from `x`: one that has its gradient, and what is held, if that is another."""
    return (v, None) if link.held is None else (stand_in_like(x), v)


def without_gradient(ctx: Any, *outputs: Tensor | None) -> None:
    given = [t for t in outputs if t is not None]
    if given:
        ctx.mark_non_differentiable(*given)


def value_and_stand_in(v: Tensor, held: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """From these two outputs what is held, and what leads gradients to it."""
    return (v, None) if held is None else (held, v if v.requires_grad else None)


def layer_pull(
    x: Tensor,
    filters: Filters,
    epilogue: Epilogue | None,
    prev_weights: Tensor | None,
    token: Tensor | None,
    link: Link,
    keeps: bool = False,
) -> LayerOutput:
    """One layer on a history: `link` holds the keys and values before it, and its own place last in the path.

    `keeps`: give what a norm was given, too.
    """
    x = readable(x)
    if not torch.is_grad_enabled():
        r = _retrieve(x, filters, prev_weights, epilogue, link, keeps)
        assert r.out is not None
        assert r.weights is not None
        taken = _taken(epilogue, r.statistics)
        return LayerOutput(r.out, r.weights, r.kl, token, r.k, r.v, r.retrieved, taken)
    gamma = beta = None
    if type(epilogue) is NormAct:
        gamma, beta = epilogue.gamma, epilogue.beta
    out, weights, kl, own, k, v, retrieved, statistics, held = applied(
        _Layer, x, *filters, prev_weights, gamma, beta, epilogue, keeps, token, link
    )
    own = own if own.requires_grad else token
    v, stand_in = value_and_stand_in(v, held)
    taken = _taken(epilogue, statistics)
    return LayerOutput(out, weights, kl, own, k, v, retrieved, taken, stand_in)


def _taken(epilogue: Epilogue | None, statistics: Tensor | None) -> Tensor | None:
    """Those of the batch, if the norm took them: a norm of another layer can take them over."""
    return statistics if type(epilogue) is NormAct and epilogue.statistics is None else None


def provider_pull(
    x: Tensor, filters: Filters, token: Tensor | None, link: Link
) -> tuple[Tensor | None, Tensor, Tensor, Tensor | None]:
    """`(token, key, value, stand_in)` of a layer that gives its pair and retrieves nothing."""
    x = readable(x)
    if not torch.is_grad_enabled():
        r = _provide(x, filters._replace(wq=None), link)
        return token, r.k, r.v, None
    own, k, v, held = applied(_Provider, x, filters.wk, filters.wv, token, link)
    return own if own.requires_grad else token, k, *value_and_stand_in(v, held)
