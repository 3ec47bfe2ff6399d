"""The mix for autograd and for torch.compile.

Two PyTorch ops, `ela_kernels::depth_mix` and `ela_kernels::depth_mix_backward`, so that compiled graphs and fake
tensors see each as one node. Plain tensors take an `autograd.Function` that calls the kernels past the dispatcher.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ela_kernels.backends.contract import KernelBackend
from ela_kernels.backends.dispatch import kernels_for
from ela_kernels.backends.layout import empty_map, is_interleaved, resolved
from ela_kernels.backends.memory import PLAIN_TENSORS
from ela_kernels.backends.tracing import needs_dispatcher
from ela_kernels.ops.autograd.gradients import with_own_memory
from ela_kernels.ops.autograd.opaque import opaque
from ela_kernels.ops.autograd.operators import given_or_zero, library, runs_elsewhere
from ela_kernels.ops.autograd.saved_tensors import save, unpacked
from ela_kernels.ops.depth_mix.reference import depth_mix_backward_reference, depth_mix_reference
from ela_kernels.ops.layer_attention.in_graph.flops import count_flops

library.define("depth_mix(Tensor weights, Tensor[] values, bool channels_last) -> Tensor")
library.define(
    "depth_mix_backward(Tensor weights, Tensor[] values, Tensor dout, bool channels_last) "
    "-> (Tensor dweights, Tensor[] dvalues)"
)


def _forward_op(weights: Tensor, values: list[Tensor], channels_last: bool) -> Tensor:
    backend = kernels_for("depth_mix", values[-1], len(values))
    if backend is not None:
        return backend.mix(resolved(weights), [resolved(v) for v in values], channels_last)
    out = depth_mix_reference(weights, values, channels_last)
    # In one memory format, whichever backend ran.
    return _forward_shapes(weights, values, channels_last).copy_(out)


def _forward_shapes(weights: Tensor, values: list[Tensor], channels_last: bool) -> Tensor:
    last = values[-1]
    return empty_map(last, channels_last, is_interleaved(last, channels_last))


def _backward_op(
    weights: Tensor, values: list[Tensor], dout: Tensor, channels_last: bool
) -> tuple[Tensor, list[Tensor]]:
    every = [True] * len(values)
    backend = kernels_for("depth_mix", values[-1], len(values))
    if backend is None:
        found = depth_mix_backward_reference(weights, values, dout, channels_last, True, every)
    else:
        maps = [resolved(v) for v in values]
        found = backend.mix_backward(resolved(weights), maps, dout, channels_last, True, every)
    dweights, dvalues = found
    like_weights, like_values = _backward_shapes(weights, values, dout, channels_last)
    return given_or_zero(dweights, like_weights), [
        given_or_zero(d, o) for d, o in zip(dvalues, like_values, strict=True)
    ]


def _backward_shapes(
    weights: Tensor, values: list[Tensor], dout: Tensor, channels_last: bool
) -> tuple[Tensor, list[Tensor]]:
    return weights.new_empty(weights.shape), [
        _forward_shapes(weights, values, channels_last) for _ in values
    ]


def _check_shapes(shapes: tuple[Any, Any], weights: Tensor, maps: Sequence[Tensor]) -> None:
    """Refuse others than the forward had: a tensor's `.data` is set behind autograd's back."""
    for name, allowed, tensors in (("weights", shapes[0], (weights,)), ("values", shapes[1], maps)):
        for tensor in tensors:
            if tensor.shape != allowed:
                raise ValueError(
                    f"{name}: got shape {list(tensor.shape)} in the backward; allowed is that of the forward, "
                    f"{list(allowed)}. A tensor must keep its data until the backward is done"
                )


@opaque
class _DepthMix(torch.autograd.Function):
    """The kernels on plain tensors."""

    @staticmethod
    def forward(
        ctx: Any, weights: Tensor, channels_last: bool, backend: KernelBackend, *values: Tensor
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.channels_last, ctx.backend = channels_last, backend
        ctx.shapes = weights.shape, values[-1].shape
        # No value is read where no gradient of the weights is wanted.
        save(ctx, weights, *(values if ctx.needs_input_grad[0] else ()))
        return backend.mix(weights, values, channels_last)

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None) -> tuple[Tensor | None, ...]:
        need_weights, _, _, *need_values = ctx.needs_input_grad
        if dout is None:
            return (None,) * (3 + len(need_values))
        weights, *values = unpacked(ctx)
        _check_shapes(ctx.shapes, weights, (*values, dout))
        given = weights, values, dout, ctx.channels_last, need_weights, need_values
        if torch.is_grad_enabled():
            # A second derivative is wanted: the reference gives a first one that has it.
            dweights, dvalues = depth_mix_backward_reference(*given)
        else:
            with_own_memory(dout, "depth_mix")
            dweights, dvalues = ctx.backend.mix_backward(*given)
        return (dweights, None, None, *dvalues)


def depth_mix_autograd(
    weights: Tensor, values: Sequence[Tensor], channels_last: bool, backend: KernelBackend | None
) -> Tensor:
    """The mix by a backend's kernels, differentiable; by what the operator chooses where there is none.

    Args:
        weights: `[B, G, T]` in the accumulation dtype.
    """
    if backend is None and runs_elsewhere():
        return depth_mix_reference(weights, values, channels_last)
    is_plain = all(type(t) in PLAIN_TENSORS for t in (weights, *values))
    if backend is None or not is_plain or needs_dispatcher(weights):
        out: Tensor = torch.ops.ela_kernels.depth_mix(weights, list(values), channels_last)
        return out
    maps = [resolved(v) for v in values]
    mixed: Tensor = _DepthMix.apply(resolved(weights), channels_last, backend, *maps)
    return mixed


def _setup_op_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weights, values, ctx.channels_last = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(weights, *values)


def _backward_of_op(ctx: Any, dout: Tensor | None) -> tuple[Any, ...]:
    weights, *values = ctx.saved_tensors
    if dout is None:
        return None, [None] * len(values), None
    dweights, dvalues = torch.ops.ela_kernels.depth_mix_backward(
        weights, values, dout, ctx.channels_last
    )
    return dweights, dvalues, None


def _no_second_derivative(ctx: Any, *_: Any) -> None:
    raise RuntimeError(
        "torch.ops.ela_kernels.depth_mix: a second derivative was asked for, and the operator has none; call "
        "ela_kernels.depth_mix outside of torch.compile and of dispatch modes, or use_backend('eager')"
    )


def _flops(weights: Tensor, values: Sequence[Tensor], *_: Any) -> int:
    return 2 * values[-1].numel() * len(values)


def _backward_flops(*args: Any) -> int:
    return 2 * _flops(*args)


library.impl("depth_mix", _forward_op, "CompositeExplicitAutograd")
library.impl("depth_mix_backward", _backward_op, "CompositeExplicitAutograd")
torch.library.register_fake("ela_kernels::depth_mix", _forward_shapes, lib=library)
torch.library.register_fake("ela_kernels::depth_mix_backward", _backward_shapes, lib=library)
torch.library.register_autograd(
    "ela_kernels::depth_mix", _backward_of_op, setup_context=_setup_op_context, lib=library
)
torch.library.register_autograd(
    "ela_kernels::depth_mix_backward", _no_second_derivative, lib=library
)
count_flops("depth_mix", _flops)
count_flops("depth_mix_backward", _backward_flops)
