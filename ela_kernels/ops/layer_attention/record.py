"""The pull form of the backward: a value's gradient is gathered once, from all later layers.

Layer t's output uses the values of all layers j <= t, so autograd's own way adds up T partial gradients for each value
(the push form). Here the engine is made to run the layers' backwards in reverse order by a chain of one-element
tokens; each leaves its output gradient, weights and score gradients in a record, and each reads from that record what
the layers after it left. A record is kept for each backward pass (graph task), so that a second pass over a retained
graph, or a pass over a part of it, never sees another's entries; and an entry knows the path of layers that it
retrieved from, so that of two continuations of one history neither sees the other's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn
from weakref import ref

import torch
from torch import Tensor

from ela_kernels.backends.contract import KernelBackend
from ela_kernels.backends.layout import in_form, is_interleaved, resolved
from ela_kernels.backends.types import Contribution
from ela_kernels.ops.layer_attention.snapshot import Pairs
from ela_kernels.torch_internals import (
    are_transforms_active,
    call_after_backward,
    graph_task,
    is_batched_gradient,
    version_of,
)

Entry = tuple[tuple[int, ...], Contribution]
"""The path of a layer, and what its backward leaves for the layers on it."""


class Pass(list[Entry]):
    """What the layers of one stage have left in one backward pass.

    The engine holds it, as a callback of the pass that has nothing to do: so it goes when the pass does, also one that
    raised, whose callbacks are never called. A record that held it would keep the graph alive that the record is part
    of, since the weights left here know the node that made them.
    """

    __slots__ = ("__weakref__",)

    def __call__(self) -> None:
        pass


class Record:
    """Contributions of the backward passes under way over one stage, by graph task."""

    def __init__(self) -> None:
        self._passes: dict[int, ref[Pass]] = {}
        self._token_gradient: Tensor | None = None

    def _entries(self) -> Pass | None:
        """What the pass under way has left so far."""
        found = self._passes.get(graph_task())
        return None if found is None else found()

    def add(self, path: tuple[int, ...], contribution: Contribution) -> None:
        entries = self._entries()
        if entries is None:
            entries, passes, task = Pass(), self._passes, graph_task()
            call_after_backward(entries)
            passes[task] = ref(entries, lambda _: passes.pop(task, None))
        elif entries and type(entries[0][1]) is not type(contribution):
            refuse_other_kernels()
        entries.append((path, contribution))

    def contributions(self, path: tuple[int, ...]) -> list[Contribution]:
        """What those left that retrieved from the layer at the end of `path`, in order of depth."""
        entries = self._entries()
        if entries is None:
            return []
        index, serial = len(path) - 1, path[-1]
        found = [
            left for others, left in entries if len(others) > index and others[index] == serial
        ]
        found.reverse()  # later layers left theirs first
        return found

    def forget(self, path: tuple[int, ...]) -> None:
        """Drop what no layer before the one at the end of `path` will ask for."""
        entries = self._entries()
        if entries:
            served = {id(left) for left in self.contributions(path)}
            entries[:] = [entry for entry in entries if id(entry[1]) not in served]

    def token_gradient(self, token: Tensor) -> Tensor:
        """One shared tensor, held here so that the engine never adds to it in place."""
        if self._token_gradient is None:
            self._token_gradient = torch.zeros_like(token)
        return self._token_gradient


class Link(NamedTuple):
    """One layer's place in its history: its path, its own number last, and the pairs that it retrieves from.

    Attributes:
        keys, values: up to the layer's own; of a whole layer, which makes its own, those before it.
        before: the pairs before a whole layer, which stand for `keys` and `values`.
        held: the dtype that the history holds values in, where it is not that of the layer.
        tolerance: retrievals of a smaller weight are left out.
    """

    path: tuple[int, ...]
    keys: Sequence[Tensor]
    values: Sequence[Tensor]
    heads: int
    scale: float
    channels_last: bool
    backend: KernelBackend
    record: Record
    before: Pairs | None = None
    held: torch.dtype | None = None
    tolerance: float = 0.0


def refuse_other_kernels(history: str = "LayerHistory") -> NoReturn:
    raise RuntimeError(
        f"{history}: got layers that kernels of different backends served, whose gradients do not meet; "
        "allowed is one backend for the layers of a history, and eager PyTorch beside it"
    )


def contributions(ctx: Any) -> list[Any]:
    """What those left so far that retrieved the layer that `ctx` belongs to, in order of depth."""
    found: list[Contribution] = ctx.record.contributions(ctx.path)
    for left in found:
        if type(left) is not ctx.backend.contributes:
            refuse_other_kernels()
        check_unchanged(left.dout, left.dout_version)
    return found


def check_unchanged(dout: Tensor | None, version: int) -> None:
    """Refuse an output gradient that is no longer what a layer left."""
    if dout is not None and version_of(dout) != version:
        raise RuntimeError(
            "the gradient of a layer attention output was changed in place during the backward pass (by a hook?), "
            "but earlier layers still need it; return a new tensor from the hook instead"
        )


def with_own_memory(dout: Tensor, op: str = "layer attention") -> Tensor:
    """An output gradient that has memory of its own to read."""
    if is_batched_gradient(dout):
        raise RuntimeError(
            f"{op}: got batched gradients (is_grads_batched=True, or vectorize=True of a Jacobian), which "
            "have no memory for a kernel to read; use ela_kernels.use_backend('eager')"
        )
    return resolved(dout)


def in_form_of(value: Tensor, dout: Tensor, channels_last: bool) -> Tensor:
    """An output gradient as the kernels read it beside a map that they made; once, not for every earlier layer.

    The gradient of a sum is expanded, for instance.
    """
    dout = with_own_memory(dout)
    if dout.stride() == value.stride():
        return dout
    return in_form(dout, channels_last, is_interleaved(value, channels_last))


def refuse_second_derivative(
    history: str = "LayerHistory", functional: str = "layer_attention"
) -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{history}: a second derivative was asked for (create_graph=True), and the kernels' pull backward "
            f"has none; use ela_kernels.use_backend('eager'), or the functional {functional}"
        )


def keep(ctx: Any, link: Link) -> None:
    # Not the link itself: ctx outlives the backward, and would keep all values alive with it.
    ctx.set_materialize_grads(False)
    ctx.path, ctx.heads, ctx.scale = link.path, link.heads, link.scale
    ctx.tolerance = link.tolerance
    ctx.channels_last, ctx.backend, ctx.record = link.channels_last, link.backend, link.record


def token_gradient(ctx: Any, token: Tensor | None) -> Tensor | None:
    """Ends a layer's backward: the chain goes on to the layer before, or the record has served."""
    if token is not None and ctx.needs_input_grad[-2]:
        gradient: Tensor = ctx.record.token_gradient(token)
        return gradient
    ctx.record.forget(ctx.path)
    return None


def applied(function: type[torch.autograd.Function], *args: Any) -> Any:
    """`function.apply(*args)`, by the shorter way that it takes itself where no transform of `torch.func` is active."""
    if are_transforms_active():
        return function.apply(*args)
    return super(torch.autograd.Function, function).apply(*args)  # type: ignore[misc]


def new_token(token: Tensor | None, like: Tensor) -> Tensor:
    """A token for the next layer. Nobody reads it, so no kernel fills it."""
    return like.new_empty(1) if token is None else torch.empty_like(token)
