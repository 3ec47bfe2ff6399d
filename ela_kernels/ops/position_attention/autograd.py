"""The operation for autograd and for torch.compile: the push form, which returns the gradient of every value.

`ela_kernels::position_attention` and its backward are registered with `torch.library`, so that torch.compile and fake
tensors see each as one node. Plain tensors take an `autograd.Function` that calls the kernels past the dispatcher.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ela_kernels.backends.contract import KernelBackend
from ela_kernels.backends.dispatch import kernels_for
from ela_kernels.backends.layout import accumulate_dtype, empty_map, is_interleaved, resolved
from ela_kernels.backends.position import PositionCall, PositionNeeds
from ela_kernels.backends.tracing import needs_dispatcher
from ela_kernels.ops.autograd.gradients import differentiable_gradients, with_own_memory
from ela_kernels.ops.autograd.opaque import opaque
from ela_kernels.ops.autograd.operators import given_or_zero, library, runs_elsewhere
from ela_kernels.ops.autograd.saved_tensors import save, unpacked
from ela_kernels.ops.position_attention.reference import (
    Outputs,
    position_attention_backward_reference,
    position_attention_reference,
)

OP = "position_attention"
_ARGUMENTS = (
    "Tensor row, Tensor? query, Tensor[] values, Tensor[] keys, bool normed, float eps, Tensor? prev_weights, "
    "bool channels_last"
)
library.define(f"{OP}({_ARGUMENTS}) -> (Tensor out, Tensor weights, Tensor kl)")
library.define(
    f"{OP}_backward({_ARGUMENTS}, Tensor weights, Tensor? dout, Tensor? dweights, Tensor? dkl) "
    "-> (Tensor drow, Tensor dquery, Tensor[] dvalues, Tensor[] dkeys, Tensor dprev)"
)


def _call(
    row: Tensor,
    query: Tensor | None,
    values: Sequence[Tensor],
    keys: Sequence[Tensor],
    normed: bool,
    eps: float,
    prev_weights: Tensor | None,
    channels_last: bool,
) -> PositionCall:
    """As the operators take it, which know no list that is none: no key stands for keys that are the values."""
    return PositionCall(row, query, values, keys or None, normed, eps, prev_weights, channels_last)


def readable(call: PositionCall) -> PositionCall:
    """With the signs of all tensors in memory."""
    return call._replace(
        row=resolved(call.row),
        query=None if call.query is None else resolved(call.query),
        values=[resolved(v) for v in call.values],
        keys=None if call.keys is None else [resolved(k) for k in call.keys],
    )


def _new_like_value(call: PositionCall) -> Tensor:
    last = call.values[-1]
    return empty_map(last, call.channels_last, is_interleaved(last, call.channels_last))


def _forward_op(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    call = _call(*arguments)
    backend = kernels_for(OP, call.values[-1], len(call.values))
    if backend is None:
        out, weights, kl = position_attention_reference(call)
        out = _new_like_value(call).copy_(out)  # one memory format, whichever backend ran
    else:
        out, weights, kl = backend.position_attend(readable(call))
    # A schema has no optional result: without previous weights the divergence is empty.
    return out, weights.contiguous(), weights.new_empty(0) if kl is None else kl


def _forward_shapes(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    call = _call(*arguments)
    batch, *places = call.places
    dtype = accumulate_dtype(call.values[-1].dtype)
    last, depth = call.values[-1], len(call.values)
    kl = (0,) if call.prev_weights is None else (batch, *places)
    return (
        _new_like_value(call),
        last.new_empty((batch, depth, *places), dtype=dtype),
        last.new_empty(kl, dtype=dtype),
    )


Gradients = tuple[Tensor, Tensor, list[Tensor], list[Tensor], Tensor]


def _backward_op(*arguments: Any) -> Gradients:
    call = _call(*arguments[:8])
    weights, dout, dweights, dkl = arguments[8:]
    backend = kernels_for(OP, call.values[-1], len(call.values))
    found: tuple[Any, ...]
    if backend is None:
        found = position_attention_backward_reference(call, weights, dout, dweights, dkl)
    else:
        every = [True] * len(call.values)
        needs = PositionNeeds(True, call.query is not None, True, every, every if call.keys else ())
        g = backend.position_attend_backward(
            readable(call), weights, None if dout is None else resolved(dout), dweights, dkl, needs
        )
        found = g.row, g.query, g.values, g.keys, g.prev
    drow, dquery, dvalues, dkeys, dprev = found
    row_out, query_out, values_out, keys_out, prev_out = _backward_shapes(*arguments)
    return (
        given_or_zero(drow, row_out),
        given_or_zero(dquery, query_out),
        [given_or_zero(d, o) for d, o in zip(dvalues, values_out, strict=True)],
        [given_or_zero(d, o) for d, o in zip(dkeys, keys_out, strict=True)],
        given_or_zero(dprev, prev_out),
    )


def _backward_shapes(*arguments: Any) -> Gradients:
    call = _call(*arguments[:8])
    prev = call.prev_weights
    return (
        call.row.new_empty(call.row.shape),
        call.row.new_empty(0) if call.query is None else _new_like_value(call),
        [_new_like_value(call) for _ in call.values],
        [_new_like_value(call) for _ in call.keys or ()],
        call.row.new_empty(0) if prev is None else call.row.new_empty(prev.shape),
    )


def gradients_with_gradients(
    call: PositionCall, grad_outputs: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """Of row, query, previous weights, values and keys, differentiable again."""
    return differentiable_gradients(
        lambda: position_attention_reference(call),
        (call.row, call.query, call.prev_weights, *call.values, *(call.keys or ())),
        grad_outputs,
    )


@opaque
class _PositionAttention(torch.autograd.Function):
    """The kernels on plain tensors."""

    @staticmethod
    def forward(
        ctx: Any,
        row: Tensor,
        query: Tensor | None,
        prev: Tensor | None,
        normed: bool,
        eps: float,
        channels_last: bool,
        depth: int,
        backend: KernelBackend,
        *maps: Tensor,
    ) -> Outputs:
        ctx.set_materialize_grads(False)
        ctx.form, ctx.depth, ctx.backend = (normed, eps, channels_last), depth, backend
        call = PositionCall(
            row, query, maps[:depth], maps[depth:] or None, normed, eps, prev, channels_last
        )
        out, weights, kl = backend.position_attend(call)
        save(ctx, row, query, prev, weights, *maps)
        return out, weights, kl

    @staticmethod
    def backward(
        ctx: Any, dout: Tensor | None, dweights: Tensor | None, dkl: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        row, query, prev, weights, *maps = unpacked(ctx)
        (normed, eps, channels_last), depth = ctx.form, ctx.depth
        call = PositionCall(
            row, query, maps[:depth], maps[depth:] or None, normed, eps, prev, channels_last
        )
        if torch.is_grad_enabled():
            # A second derivative is wanted: the reference gives a first one that has it.
            found = gradients_with_gradients(call, (dout, dweights, dkl))
            return (*found[:3], None, None, None, None, None, *found[3:])
        need = ctx.needs_input_grad
        needs = PositionNeeds(need[0], need[1], need[2], need[8 : 8 + depth], need[8 + depth :])
        dout, dweights, dkl = (
            None if d is None else with_own_memory(d, OP) for d in (dout, dweights, dkl)
        )
        g = ctx.backend.position_attend_backward(call, weights, dout, dweights, dkl, needs)
        return (g.row, g.query, g.prev, None, None, None, None, None, *g.values, *g.keys)


def position_attention_autograd(call: PositionCall, backend: KernelBackend | None) -> Outputs:
    """`(out, weights, kl)` of a backend's kernels, differentiable; of what the operator chooses where there is none."""
    if backend is None and runs_elsewhere():
        return position_attention_reference(call)
    row, query, values, keys, normed, eps, prev, channels_last = call
    if backend is None or needs_dispatcher(values[-1]):
        out, weights, kl = getattr(torch.ops.ela_kernels, OP)(
            row, query, list(values), list(keys or ()), normed, eps, prev, channels_last
        )
        return out, weights, None if prev is None else kl
    row, query, values, keys, *_ = readable(call)
    found: Outputs = _PositionAttention.apply(
        row, query, prev, normed, eps, channels_last, len(values), backend, *values, *(keys or ())
    )
    return found


def _setup_op_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    row, query, values, keys, normed, eps, prev, channels_last = inputs
    ctx.form, ctx.depth = (normed, eps, channels_last), len(values)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(row, query, prev, output[1], *values, *keys)


def _backward_of_op(
    ctx: Any, dout: Tensor | None, dweights: Tensor | None, dkl: Tensor | None
) -> tuple[Any, ...]:
    row, query, prev, weights, *maps = ctx.saved_tensors
    (normed, eps, channels_last), depth = ctx.form, ctx.depth
    drow, dquery, dvalues, dkeys, dprev = torch.ops.ela_kernels.position_attention_backward(
        *(row, query, maps[:depth], maps[depth:], normed, eps, prev, channels_last),
        weights,
        dout,
        dweights,
        None if prev is None else dkl,
    )
    return (
        drow,
        None if query is None else dquery,
        dvalues,
        dkeys,
        None,
        None,
        None if prev is None else dprev,
        None,
    )


def _no_second_derivative(ctx: Any, *_: Any) -> None:
    raise RuntimeError(
        "torch.ops.ela_kernels.position_attention: a second derivative was asked for, and the operator has none; call "
        "ela_kernels.position_attention outside of torch.compile and of dispatch modes, or use_backend('eager')"
    )


library.impl(OP, _forward_op, "CompositeExplicitAutograd")
library.impl(f"{OP}_backward", _backward_op, "CompositeExplicitAutograd")
torch.library.register_fake(f"ela_kernels::{OP}", _forward_shapes, lib=library)
torch.library.register_fake(f"ela_kernels::{OP}_backward", _backward_shapes, lib=library)
torch.library.register_autograd(
    f"ela_kernels::{OP}", _backward_of_op, setup_context=_setup_op_context, lib=library
)
torch.library.register_autograd(f"ela_kernels::{OP}_backward", _no_second_derivative, lib=library)
