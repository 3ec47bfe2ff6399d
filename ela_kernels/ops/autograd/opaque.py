"""Compiled autograd, which traces a backward: what kernels do to memory it cannot see, so theirs run outside of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.compiler import is_compiling

from ela_kernels.torch_internals import (
    node_class,
    saved_by,
    tracing_context,
    zeros_like_input,
)

Backward = Callable[..., tuple[Tensor | None, ...]]
F = TypeVar("F", bound=type[torch.autograd.Function])

_REASON = (
    "the kernels of ela_kernels read memory, which a graph has none of; allowed is fullgraph=False for the backward, "
    "or ela_kernels.use_backend('eager') for the forward"
)


def opaque(function: F) -> F:
    """A function whose backward compiled autograd calls as it is, between two of its graphs."""
    backward: Backward = function.backward
    outside: list[Backward] = []

    def make_outside() -> None:
        # Not before it is needed: it imports the compiler, which takes a second.
        outside.append(torch.compiler.disable(_filled(backward), reason=_REASON))

    def run_outside(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        if not outside:
            make_outside()
        return outside[0](ctx, *gradients)

    def run(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        if is_compiling():
            return run_outside(ctx, *gradients)
        return backward(ctx, *gradients)

    def saved(ctx: Any) -> Any:
        """`ctx.saved_tensors`, but for the tracer, which is handed them another way.

        It would look at them too, in order to notice when they change; and of a retained graph's, those that are
        outputs are new objects at each look, so that it takes them for changed at once.
        """
        if is_compiling() and tracing_context() is not None:
            if not outside:  # what it cannot trace; the backward comes next
                make_outside()
            raise RuntimeError("saved_tensors: a tracer asked for them")
        return saved_by(ctx)

    function.backward = staticmethod(run)  # type: ignore[method-assign]
    node = node_class(function)
    if node is not None:
        node.saved_tensors = property(saved)
    return function


def _filled(backward: Backward) -> Backward:
    """With zeros for gradients that are none: the graphs add up those that meet, and cannot add nothing."""

    def run(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        # An edge leads on from each input that has a gradient.
        edges = iter([edge for edge in ctx.next_functions if edge[0] is not None])
        found = []
        for needed, gradient in zip(ctx.needs_input_grad, backward(ctx, *gradients), strict=True):
            if needed:
                node, i = next(edges)
                if gradient is None:
                    gradient = zeros_like_input(node, i)
            found.append(gradient)
        return tuple(found)

    return run
