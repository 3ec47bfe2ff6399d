"""What the operators of a whole layer do when a graph runs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ela_kernels.backends.contract import KernelBackend
from ela_kernels.backends.layout import accumulate_dtype, readable, resolved
from ela_kernels.backends.types import (
    RESIDUAL,
    Arrived,
    Contribution,
    Epilogue,
    Filters,
    LayerGradients,
    LayerNeeds,
    NormAct,
    Retrieved,
    Saved,
    SavedLayer,
)
from ela_kernels.ops.autograd.gradients import in_form_of
from ela_kernels.ops.layer_attention.in_graph.call import Call, Left
from ela_kernels.ops.layer_attention.in_graph.shapes import (
    Promise,
    as_promised,
    backward_promises,
    forward_promises,
)


class _Forward(NamedTuple):
    """In the order of the operator's results; its token has no content."""

    out: Tensor | None
    weights: Tensor | None
    kl: Tensor | None
    key: Tensor
    value: Tensor
    query: Tensor | None
    mean: Tensor
    retrieved: Tensor | None
    statistics: Tensor | None


def forward(*args: Any) -> tuple[Tensor, ...]:
    call, keeps = Call(*args[:-1]), args[-1]
    backend = call.kernels()
    x = readable(resolved(call.x))
    filters = Filters(*(resolved(w) for w in (call.wq, call.wk, call.wv)))
    of_layer = (_retrieved if call.retrieves() else _skipped)(call, backend, x, filters, keeps)
    no_token = None
    promises = forward_promises(call._replace(x=x), keeps)
    return tuple(as_promised(f, p, x) for f, p in zip((*of_layer, no_token), promises, strict=True))


def _retrieved(
    call: Call, backend: KernelBackend, x: Tensor, filters: Filters, keeps: bool
) -> _Forward:
    keys, values = [resolved(k) for k in call.keys], [resolved(v) for v in call.values]
    of_scores = call.heads, call.scale, call.prev_weights
    r = backend.layer(
        x, filters, keys, values, *of_scores, call.ending(), keeps, tolerance=call.tolerance
    )
    statistics = r.statistics
    if call.norm_statistics is not None:
        statistics = call.norm_statistics.clone()  # an operator may not give what it was given
    return _Forward(r.out, r.weights, r.kl, r.k, r.v, r.q, r.mean, r.retrieved, statistics)


def _skipped(
    call: Call, backend: KernelBackend, x: Tensor, filters: Filters, keeps: bool
) -> _Forward:
    """Of a layer that does not retrieve: its pair, the block around what was kept, the divergence it would have."""
    of_pair = filters._replace(wq=None)
    ending, kept = call.ending(), None
    if call.takes_over() and isinstance(ending, NormAct):
        reused = _kept(call, x)
        kept = reused.o
        r = backend.layer(x, of_pair, (), (), call.heads, call.scale, None, ending, True, reused)
        out, statistics = r.out, reused.statistics.clone()
    else:
        r = backend.layer(x, of_pair, (), (), call.heads, call.scale, None)
        zeros = (2, x.shape[1])
        out, statistics = x.clone(), x.new_zeros(zeros, dtype=accumulate_dtype(x.dtype))
    assert filters.wq is not None
    size = filters.wq.shape[-1]
    with torch.autocast(x.device.type, enabled=False):  # of a graph that runs as it is
        query = F.conv1d(r.mean.unsqueeze(1), filters.wq, padding=size // 2).squeeze(1)
    keys = [*(resolved(k) for k in call.keys), r.k]
    weights, kl = backend.weights(query, keys, call.heads, call.scale, call.prev_weights)
    # Those of the last layer that did retrieve.
    weights.zero_()
    if call.prev_weights is not None:
        weights[..., : call.prev_weights.shape[-1]] = call.prev_weights
    # Zeros where there is nothing: an operator gives the same numbers at each call, also those that nobody reads.
    retrieved = None
    if keeps:
        retrieved = torch.zeros_like(x) if kept is None else kept.clone()
    return _Forward(out, weights, kl, r.k, r.v, query, r.mean, retrieved, statistics)


def _kept(call: Call, x: Tensor) -> Retrieved:
    """What was kept, in the form of `x`, and what it is normed with."""
    assert call.kept is not None
    given = call.kept_statistics if call.norm_statistics is None else call.norm_statistics
    assert given is not None
    return Retrieved(in_form_of(x, call.kept, False), given.contiguous())


def backward(*args: Any) -> tuple[Any, ...]:
    call, left = Call(*args[: len(Call._fields)]), Left(*args[len(Call._fields) :])
    backend = call.kernels()
    x = readable(resolved(call.x))
    later = _contributions(left, backend, x)
    index = len(call.keys) - 1
    retrieves = call.retrieves()
    saved, needs = (_of_retrieved if retrieves else _of_skipped)(call, left, x)
    arrived = Arrived(
        _map(left.dout, x),
        left.dweights if retrieves else None,
        left.dkl if retrieves else None,
        None if left.dkey is None else resolved(left.dkey),
        _map(left.dvalue, x),
        _map(left.dretrieved, x),
    )
    g: LayerGradients
    g, own = backend.layer_backward(saved, arrived, later, index, needs)
    dscores = do = dkept = None
    dprev = g.prev
    if own is not None:
        later.insert(0, own)
        dscores = own.dscores
        if left.dout is not None and call.epilogue == "norm":
            do = own.dout  # elsewhere it is an argument, which an operator may not give back
    if not retrieves:
        # Weights and what was retrieved were handed on.
        depth = 0 if call.prev_weights is None else call.prev_weights.shape[-1]
        dprev = None if left.dweights is None else left.dweights[..., :depth].clone()
        if call.takes_over() and left.needs[-1]:
            dkept = _own_memory(g.retrieved, left.dretrieved)
    # Those of a skipped layer mean nothing, and are not read.
    pairs = [
        backend.gather(later, j, call.heads, False, key, value) if later else (None, None)
        for j, (key, value) in enumerate(zip(left.need_keys, left.need_values, strict=True))
    ]
    single, keys, values = backward_promises(call._replace(x=x), left)
    found = (g.x, g.wq, g.wk, g.wv, dprev, g.gamma, g.beta, dscores, do, dkept)

    def kept(found: Iterable[Tensor | None], promises: list[Promise]) -> list[Tensor]:
        return [as_promised(f, p, x) for f, p in zip(found, promises, strict=True)]

    return (
        *kept(found, single),
        kept((dk for dk, _ in pairs), keys),
        kept((dv for _, dv in pairs), values),
    )


def _of_retrieved(call: Call, left: Left, x: Tensor) -> tuple[SavedLayer, LayerNeeds]:
    keys, values = [resolved(k) for k in call.keys], [resolved(v) for v in call.values]
    attention = Saved(
        *(left.query, keys, values, call.heads, call.scale, call.prev_weights, left.weights, False),
        call.tolerance,
    )
    saved = _saved(call, left, x, call.wq, attention, call.ending(), left.retrieved)
    return saved, LayerNeeds(*left.needs[:5])


def _of_skipped(call: Call, left: Left, x: Tensor) -> tuple[SavedLayer, LayerNeeds]:
    need_x, _, need_wk, need_wv, *_ = left.needs
    ending, kept = call.ending(), None
    if call.takes_over() and isinstance(ending, NormAct):
        kept = _kept(call, x).o
    else:
        ending = RESIDUAL  # the block is x itself, whose gradient is that of the output
    saved = _saved(call, left, x, None, None, ending, kept)
    return saved, LayerNeeds(need_x, False, need_wk, need_wv, False)


def _saved(
    call: Call,
    left: Left,
    x: Tensor,
    wq: Tensor | None,
    attention: Saved | None,
    ending: Epilogue | None,
    retrieved: Tensor | None,
) -> SavedLayer:
    wq = None if wq is None else resolved(wq)
    filters = Filters(wq, resolved(call.wk), resolved(call.wv))
    statistics = left.statistics
    return SavedLayer(x, filters, left.mean, call.heads, attention, ending, retrieved, statistics)


def _contributions(left: Left, backend: KernelBackend, x: Tensor) -> list[Contribution]:
    """What the later layers left that retrieved when the graph ran, in order of depth."""
    of_each = zip(
        left.queries,
        left.weights_after,
        left.dscores_after,
        left.douts_after,
        left.active_after,
        left.tolerances_after,
        strict=True,
    )
    return [
        backend.contribution(
            q, weights, dscores, _map(do, x) if do.numel() else None, False, tolerance
        )
        for q, weights, dscores, do, active, tolerance in of_each
        if not active.numel() or bool(active)
    ]


def _map(gradient: Tensor | None, x: Tensor) -> Tensor | None:
    """The gradient of a map, in the form of `x`, as kernels read them together."""
    return None if gradient is None else in_form_of(x, gradient, False)


def _own_memory(found: Tensor | None, given: Tensor | None) -> Tensor | None:
    """A result that is none of the arguments."""
    if found is None or given is None or found.data_ptr() != given.data_ptr():
        return found
    return torch.clone(found)
