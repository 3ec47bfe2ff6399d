"""A whole layer as one node of a compiled graph, and its backward as another, in the pull form.

`ela_kernels::layer` and `ela_kernels::layer_backward` are registered with `torch.library`. What an eager backward pass
leaves in a record for earlier layers, a compiled one hands on as tensors of its graph: the record is one of the trace,
in which each layer finds what the layers after it will have left when the graph runs. The layers of a stage know each
other by their tokens, as in eager PyTorch: the node that made a layer's token is that of the layer before it.

Neither node prescribes a memory format: each takes a map in the form that it has, and gives maps of that form.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ela_kernels.ops.autograd.operators import library
from ela_kernels.ops.autograd.record import Record
from ela_kernels.ops.layer_attention.in_graph import kernels
from ela_kernels.ops.layer_attention.in_graph.call import CALL_SCHEMA, LEFT_SCHEMA, Call, Left
from ela_kernels.ops.layer_attention.in_graph.shapes import (
    backward_shapes,
    forward_shapes,
    none_like,
)

# No memory format is asked for: the compiler may choose the one that its convolutions like.
_TAGS = (torch.Tag.flexible_layout, torch.Tag.pt2_compliant_tag)

library.define(
    f"layer({CALL_SCHEMA}, bool keeps) -> (Tensor out, Tensor weights, Tensor kl, Tensor key, Tensor value, "
    "Tensor query, Tensor mean, Tensor retrieved, Tensor statistics, Tensor next_token)",
    tags=_TAGS,
)
library.define(
    f"layer_backward({CALL_SCHEMA}, {LEFT_SCHEMA}) -> (Tensor dx, Tensor dwq, Tensor dwk, Tensor dwv, Tensor dprev, "
    "Tensor dgamma, Tensor dbeta, Tensor dscores, Tensor do, Tensor dkept, Tensor[] dkeys, Tensor[] dvalues)",
    tags=_TAGS,
)

_FIRST_OPTION = Call._fields.index("heads")
_LISTS = Call._fields.index("keys"), Call._fields.index("values")


class _Trace(NamedTuple):
    """What a layer's backward leaves in a trace for those that it retrieved from; see `Contribution`."""

    query: Tensor
    weights: Tensor
    dscores: Tensor
    dout: Tensor | None
    active: Tensor | None
    tolerance: float
    dout_version: int = 0


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    call = Call(*inputs[:-1])
    _, weights, _, key, value, query, mean, retrieved, statistics, _ = output
    ctx.set_materialize_grads(False)
    before: Any = None if call.token is None else call.token.grad_fn
    # A token that another graph made, or that has no gradient: this layer knows of none before it. Nor does one that
    # finds pairs which no layer that it knows of has made.
    if isinstance(getattr(before, "record", None), Record) and len(before.path) == len(call.keys):
        ctx.record, path = before.record, before.path
    else:
        ctx.record, path, before = Record(), (None,) * len(call.keys), None
    ctx.path = (*path, object())
    ctx.follows = before is not None
    ctx.depth, ctx.normed = len(call.keys), call.epilogue == "norm"
    ctx.options = call[_FIRST_OPTION:]
    ctx.mark_non_differentiable(query, mean, statistics, *(() if ctx.normed else (retrieved,)))
    first, last = _LISTS
    ctx.save_for_backward(
        *call[:first],
        *call[last + 1 : _FIRST_OPTION],
        *(query, mean, weights, retrieved, statistics),
        *(*call.keys, key, *call.values, value),
    )


def _backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
    dout, dweights, dkl, dkey, dvalue, _, _, dretrieved, _, _ = gradients
    first = _LISTS[0]
    saved = list(ctx.saved_tensors)
    depth, length = ctx.depth + 1, _FIRST_OPTION - len(_LISTS)
    single, (query, mean, weights, retrieved, statistics) = (
        saved[:length],
        saved[length : length + 5],
    )
    pairs = saved[length + 5 :]
    maps = pairs[:depth], pairs[depth:]
    arguments: list[Any] = [*single[:first], *maps, *single[first:], *ctx.options]
    call = Call(*arguments)
    if not ctx.normed:
        retrieved = statistics = dretrieved = None
    if call.prev_weights is None:
        dkl = None
    needs = dict(zip(Call._fields, ctx.needs_input_grad[:-1], strict=True))
    if dkl is None and call.active is None:
        needs["prev_weights"] = False
    later: list[Any] = ctx.record.contributions(ctx.path)
    # The pairs before a layer that knows of no other are gathered here, for all layers that do.
    gathers = not ctx.follows and ctx.depth > 0
    none = none_like(weights)
    left = Left(
        *(query, mean, weights, retrieved, statistics),
        *(dout, dweights, dkl, dkey, dvalue, dretrieved),
        [after.query for after in later],
        [after.weights for after in later],
        [after.dscores for after in later],
        [none if after.dout is None else after.dout for after in later],
        [none if after.active is None else after.active for after in later],
        [after.tolerance for after in later],
        [needs[name] for name in ("x", "wq", "wk", "wv", "prev_weights", "kept")],
        needs["keys"] if gathers else [],
        needs["values"] if gathers else [],
    )
    found = torch.ops.ela_kernels.layer_backward(*call._replace(token=None), *left)
    dx, dwq, dwk, dwv, dprev, dgamma, dbeta, dscores, do, dkept, dkeys, dvalues = found
    if left.is_reached():
        of_retrieval = dout
        if ctx.normed:
            of_retrieval = dretrieved if dout is None else do
        ctx.record.add(
            ctx.path, _Trace(query, weights, dscores, of_retrieval, call.active, call.tolerance)
        )
    none_of_pairs: list[Tensor | None] = [None] * ctx.depth
    given: dict[str, Any] = {
        "x": dx,
        "wq": dwq,
        "wk": dwk,
        "wv": dwv,
        "prev_weights": dprev,
        "gamma": dgamma,
        "beta": dbeta,
        "kept": dkept,
        "keys": _wanted(dkeys, needs["keys"]) if gathers else none_of_pairs,
        "values": _wanted(dvalues, needs["values"]) if gathers else none_of_pairs,
    }
    if call.token is not None:
        # Nobody reads it: it sees to it that this backward has run before that of the layer before.
        given["token"] = torch.zeros_like(call.token)
    # Lists have to be lists, also empty ones.
    of_inputs = (given.get(n) if need or need == [] else None for n, need in needs.items())
    return (*of_inputs, None)


def _no_second_derivative(ctx: Any, *_: Any) -> None:
    raise RuntimeError(
        "torch.ops.ela_kernels.layer: a second derivative was asked for, and the operator has none; call the layer "
        "outside of torch.compile under use_backend('eager')"
    )


def _wanted(found: list[Tensor], wanted: list[bool]) -> list[Tensor | None]:
    return [d if w else None for d, w in zip(found, wanted, strict=True)]


for name, run, shapes in (
    ("layer", kernels.forward, forward_shapes),
    ("layer_backward", kernels.backward, backward_shapes),
):
    library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"ela_kernels::{name}", shapes, lib=library)
torch.library.register_autograd(
    "ela_kernels::layer", _backward, setup_context=_setup_context, lib=library
)
torch.library.register_autograd("ela_kernels::layer_backward", _no_second_derivative, lib=library)
