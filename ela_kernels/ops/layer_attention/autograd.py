"""The stateless op for autograd and for torch.compile: the push form, which returns the gradient of every value.

Two PyTorch ops, `ela_kernels::layer_attention` and `ela_kernels::layer_attention_backward`, are registered with
`torch.library`, so that torch.compile and fake tensors see each as one node. Plain tensors take an
`autograd.Function` that calls the kernels directly, past the dispatcher.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ela_kernels.backends.contract import KernelBackend
from ela_kernels.backends.dispatch import kernels_for
from ela_kernels.backends.layout import accumulate_dtype, empty_map, is_interleaved, resolved
from ela_kernels.backends.tracing import needs_dispatcher
from ela_kernels.backends.types import Saved
from ela_kernels.ops.autograd.gradients import differentiable_gradients, with_own_memory
from ela_kernels.ops.autograd.opaque import opaque
from ela_kernels.ops.autograd.operators import given_or_zero, library, runs_elsewhere
from ela_kernels.ops.autograd.saved_tensors import save, unpacked
from ela_kernels.ops.layer_attention.reference import (
    layer_attention_backward_reference,
    layer_attention_reference,
)

library.define(
    "layer_attention(Tensor q, Tensor[] keys, Tensor[] values, int heads, float scale, Tensor? prev_weights, "
    "bool channels_last, float tolerance) -> (Tensor out, Tensor weights, Tensor kl)"
)
library.define(
    "layer_attention_backward(Tensor q, Tensor[] keys, Tensor[] values, int heads, float scale, Tensor? prev_weights, "
    "Tensor weights, Tensor? dout, Tensor? dweights, Tensor? dkl, bool channels_last, float tolerance) "
    "-> (Tensor dq, Tensor[] dkeys, Tensor[] dvalues, Tensor dprev)"
)


def _forward_op(
    q: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    heads: int,
    scale: float,
    prev_weights: Tensor | None,
    channels_last: bool,
    tolerance: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    backend = kernels_for("layer_attention", q, len(keys))
    if backend is None:
        out, weights, kl = layer_attention_reference(
            q, keys, values, heads, scale, prev_weights, channels_last, tolerance
        )
        like = empty_map(values[-1], channels_last, is_interleaved(values[-1], channels_last))
        out = like.copy_(out)  # one memory format, whichever backend ran
    else:
        out, weights, kl = backend.attend(
            resolved(q),
            [resolved(k) for k in keys],
            [resolved(v) for v in values],
            heads,
            scale,
            prev_weights,
            channels_last,
            tolerance,
        )
    # A schema has no optional result: without previous weights the divergence is empty.
    return out, weights, weights.new_empty(0) if kl is None else kl


def _forward_shapes(
    q: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    heads: int,
    scale: float,
    prev_weights: Tensor | None,
    channels_last: bool,
    tolerance: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    last = values[-1]
    out = empty_map(last, channels_last, is_interleaved(last, channels_last))
    dtype = accumulate_dtype(q.dtype)
    weights = q.new_empty((q.shape[0], heads, len(keys)), dtype=dtype)
    return (
        out,
        weights,
        q.new_empty((0,) if prev_weights is None else (q.shape[0], heads), dtype=dtype),
    )


def _backward_op(
    q: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    heads: int,
    scale: float,
    prev_weights: Tensor | None,
    weights: Tensor,
    dout: Tensor | None,
    dweights: Tensor | None,
    dkl: Tensor | None,
    channels_last: bool,
    tolerance: float = 0.0,
) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor]:
    depth = len(keys)
    dq: Tensor | None
    dprev: Tensor | None
    dkeys: Sequence[Tensor | None]
    dvalues: Sequence[Tensor | None]
    backend = kernels_for("layer_attention", q, depth)
    if backend is None:
        dq, dkeys, dvalues, dprev = layer_attention_backward_reference(
            q,
            keys,
            values,
            heads,
            scale,
            prev_weights,
            weights,
            dout,
            dweights,
            dkl,
            channels_last,
            tolerance,
        )
    else:
        maps = [resolved(x) for x in (q, *keys, *values)]
        saved = Saved(
            maps[0],
            maps[1 : 1 + depth],
            maps[1 + depth :],
            heads,
            scale,
            prev_weights,
            weights.contiguous(),
            channels_last,
            tolerance,
        )
        every = [True] * depth
        g = backend.attend_backward(saved, dout, dweights, dkl, True, True, every, every)
        dq, dprev, dkeys, dvalues = g.dq, g.dprev, g.dkeys, g.dvalues
    dq_out, dkeys_out, dvalues_out, dprev_out = _backward_shapes(
        q, keys, values, heads, scale, prev_weights, weights, dout, dweights, dkl, channels_last
    )
    return (
        given_or_zero(dq, dq_out),
        [given_or_zero(d, o) for d, o in zip(dkeys, dkeys_out, strict=True)],
        [given_or_zero(d, o) for d, o in zip(dvalues, dvalues_out, strict=True)],
        given_or_zero(dprev, dprev_out),
    )


def _backward_shapes(
    q: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    heads: int,
    scale: float,
    prev_weights: Tensor | None,
    weights: Tensor,
    dout: Tensor | None,
    dweights: Tensor | None,
    dkl: Tensor | None,
    channels_last: bool,
    tolerance: float = 0.0,
) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor]:
    interleaved = is_interleaved(values[-1], channels_last)
    return (
        q.new_empty(q.shape),
        [q.new_empty(q.shape) for _ in keys],
        [empty_map(values[-1], channels_last, interleaved) for _ in values],
        weights.new_empty(0) if prev_weights is None else weights.new_empty(prev_weights.shape),
    )


def _differentiable_gradients(
    inputs: Sequence[Tensor | None],
    heads: int,
    scale: float,
    channels_last: bool,
    tolerance: float,
    grad_outputs: Sequence[Tensor | None],
) -> tuple[Tensor | None, ...]:
    """Gradients by autograd through the reference, themselves differentiable; in the order of `inputs`.

    `inputs` are q, prev_weights, keys and values.
    """
    depth = (len(inputs) - 2) // 2
    q, prev = inputs[0], inputs[1]
    keys = [x for x in inputs[2 : 2 + depth] if x is not None]
    values = [x for x in inputs[2 + depth :] if x is not None]
    assert q is not None
    return differentiable_gradients(
        lambda: layer_attention_reference(
            q, keys, values, heads, scale, prev, channels_last, tolerance
        ),
        inputs,
        grad_outputs,
    )


@opaque
class _LayerAttention(torch.autograd.Function):
    """The kernels on plain tensors."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        prev_weights: Tensor | None,
        heads: int,
        scale: float,
        channels_last: bool,
        tolerance: float,
        backend: KernelBackend,
        *maps: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        depth = len(maps) // 2
        ctx.set_materialize_grads(False)
        ctx.heads, ctx.scale, ctx.channels_last, ctx.backend = heads, scale, channels_last, backend
        ctx.tolerance = tolerance
        out, weights, kl = backend.attend(
            q, maps[:depth], maps[depth:], heads, scale, prev_weights, channels_last, tolerance
        )
        save(ctx, q, prev_weights, weights, *maps)
        return out, weights, kl

    @staticmethod
    def backward(
        ctx: Any, dout: Tensor | None, dweights: Tensor | None, dkl: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        q, prev, weights, *maps = unpacked(ctx)
        depth, heads, scale, channels_last = len(maps) // 2, ctx.heads, ctx.scale, ctx.channels_last
        if torch.is_grad_enabled():
            # A second derivative is wanted: the reference gives a first one that has it.
            found = _differentiable_gradients(
                (q, prev, *maps), heads, scale, channels_last, ctx.tolerance, (dout, dweights, dkl)
            )
            return (found[0], found[1], None, None, None, None, None, *found[2:])
        need = ctx.needs_input_grad
        dout, dweights, dkl = (
            None if d is None else with_own_memory(d) for d in (dout, dweights, dkl)
        )
        saved = Saved(
            *(q, maps[:depth], maps[depth:], heads, scale, prev, weights, channels_last),
            ctx.tolerance,
        )
        g = ctx.backend.attend_backward(
            saved, dout, dweights, dkl, need[0], need[1], need[7 : 7 + depth], need[7 + depth :]
        )
        return (g.dq, g.dprev, None, None, None, None, None, *g.dkeys, *g.dvalues)


def layer_attention_autograd(
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    heads: int,
    scale: float,
    prev_weights: Tensor | None,
    channels_last: bool,
    backend: KernelBackend | None,
    tolerance: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`(out, weights, kl)` of a backend's kernels, differentiable; of what the operator chooses where there is none."""
    if backend is None and runs_elsewhere():
        return layer_attention_reference(
            q, keys, values, heads, scale, prev_weights, channels_last, tolerance
        )
    if backend is None or needs_dispatcher(q):
        out, weights, kl = torch.ops.ela_kernels.layer_attention(
            q, list(keys), list(values), heads, scale, prev_weights, channels_last, tolerance
        )
        return out, weights, None if prev_weights is None else kl
    maps = [resolved(x) for x in (*keys, *values)]
    out, weights, kl = _LayerAttention.apply(
        resolved(q), prev_weights, heads, scale, channels_last, tolerance, backend, *maps
    )
    return out, weights, kl


def _setup_op_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, keys, values, ctx.heads, ctx.scale, prev_weights, ctx.channels_last, ctx.tolerance = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, prev_weights, output[1], *keys, *values)


def _backward_of_op(
    ctx: Any, dout: Tensor | None, dweights: Tensor | None, dkl: Tensor | None
) -> tuple[Any, ...]:
    q, prev_weights, weights, *maps = ctx.saved_tensors
    depth = len(maps) // 2
    dq, dkeys, dvalues, dprev = torch.ops.ela_kernels.layer_attention_backward(
        q,
        maps[:depth],
        maps[depth:],
        ctx.heads,
        ctx.scale,
        prev_weights,
        weights,
        dout,
        dweights,
        None if prev_weights is None else dkl,
        ctx.channels_last,
        ctx.tolerance,
    )
    return dq, dkeys, dvalues, None, None, None if prev_weights is None else dprev, None, None


def _no_second_derivative(ctx: Any, *_: Any) -> None:
    raise RuntimeError(
        "torch.ops.ela_kernels.layer_attention: a second derivative was asked for, and the operator has none; call "
        "ela_kernels.layer_attention outside of torch.compile and of dispatch modes, or use_backend('eager')"
    )


library.impl("layer_attention", _forward_op, "CompositeExplicitAutograd")
library.impl("layer_attention_backward", _backward_op, "CompositeExplicitAutograd")
torch.library.register_fake("ela_kernels::layer_attention", _forward_shapes, lib=library)
torch.library.register_fake("ela_kernels::layer_attention_backward", _backward_shapes, lib=library)
torch.library.register_autograd(
    "ela_kernels::layer_attention", _backward_of_op, setup_context=_setup_op_context, lib=library
)
torch.library.register_autograd(
    "ela_kernels::layer_attention_backward", _no_second_derivative, lib=library
)
