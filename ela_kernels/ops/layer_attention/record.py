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
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor

from ela_kernels.backends.contract import Kernels, LayerKernels
from ela_kernels.backends.layout import (
    in_form,
    is_interleaved,
    resolved,
)
from ela_kernels.backends.types import (
    Retrieval,
    Saved,
)
from ela_kernels.ops.layer_attention.opaque import opaque
from ela_kernels.ops.layer_attention.saved_tensors import (
    save,
    unpacked,
)
from ela_kernels.ops.layer_attention.snapshot import Pairs
from ela_kernels.torch_internals import (
    are_transforms_active,
    call_after_backward,
    graph_task,
    is_batched_gradient,
    version_of,
)

Entry = tuple[tuple[int, ...], Retrieval]
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
    """Retrievals of the backward passes under way over one stage, by graph task."""

    def __init__(self) -> None:
        self._passes: dict[int, ref[Pass]] = {}
        self._token_gradient: Tensor | None = None

    def _left(self) -> Pass | None:
        """What the pass under way has left so far."""
        found = self._passes.get(graph_task())
        return None if found is None else found()

    def add(self, path: tuple[int, ...], left: Retrieval) -> None:
        entries = self._left()
        if entries is None:
            entries, passes, task = Pass(), self._passes, graph_task()
            call_after_backward(entries)
            passes[task] = ref(entries, lambda _: passes.pop(task, None))
        elif entries and type(entries[0][1]) is not type(left):
            raise RuntimeError(
                "LayerHistory: got layers that kernels of different backends served, whose gradients do not meet; "
                "allowed is one backend for the layers of a history, and eager PyTorch beside it"
            )
        entries.append((path, left))

    def retrieved(self, path: tuple[int, ...]) -> list[Retrieval]:
        """What those left that retrieved from the layer at the end of `path`, in order of depth."""
        entries = self._left()
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
        entries = self._left()
        if entries:
            served = {id(left) for left in self.retrieved(path)}
            entries[:] = [entry for entry in entries if id(entry[1]) not in served]

    def token_gradient(self, token: Tensor) -> Tensor:
        """One shared tensor, held here so that the engine never adds to it in place."""
        if self._token_gradient is None:
            self._token_gradient = torch.zeros_like(token)
        return self._token_gradient


class Link(NamedTuple):
    """One layer's place in its history, its own pair last; for a whole layer, which makes its own, those before it."""

    path: tuple[int, ...]
    keys: Sequence[Tensor]
    values: Sequence[Tensor]
    heads: int
    scale: float
    channels_last: bool
    kernels: Kernels
    record: Record
    layer: LayerKernels | None = None
    before: Pairs | None = None


def layer_kernels(link: Link) -> LayerKernels:
    """Those of a link that was made for a whole layer."""
    assert link.layer is not None
    return link.layer


def left_by_later_layers(ctx: Any) -> list[Any]:
    """What those left that retrieved the layer that `ctx` belongs to, itself included, in order of depth."""
    found: list[Retrieval] = ctx.record.retrieved(ctx.path)
    for left in found:
        dout = left.dout
        if dout is not None and version_of(dout) != left.dout_version:
            raise RuntimeError(
                "the gradient of a layer attention output was changed in place during the backward pass (by a hook?), "
                "but earlier layers still need it; return a new tensor from the hook instead"
            )
    return found


def _gather(ctx: Any, need_key: bool, need_value: bool) -> tuple[Tensor | None, Tensor | None]:
    """`(dk, dv)` of the layer that `ctx` belongs to."""
    left = left_by_later_layers(ctx)
    if not left:
        return None, None
    index = len(ctx.path) - 1
    gathered: tuple[Tensor | None, Tensor | None] = ctx.kernels.gather(
        left, index, ctx.heads, ctx.channels_last, need_key, need_value
    )
    return gathered


def _plain(dout: Tensor) -> Tensor:
    """An output gradient that has memory of its own to read."""
    if is_batched_gradient(dout):
        raise RuntimeError(
            "layer attention: got batched gradients (is_grads_batched=True, or vectorize=True of a Jacobian), which "
            "have no memory for a kernel to read; use ela_kernels.use_backend('eager')"
        )
    return resolved(dout)


def in_form_of(value: Tensor, dout: Tensor, channels_last: bool) -> Tensor:
    """An output gradient as the kernels read it beside a map that they made; once, not for every earlier layer.

    The gradient of a sum is expanded, for instance.
    """
    dout = _plain(dout)
    if dout.stride() == value.stride():
        return dout
    return in_form(dout, channels_last, is_interleaved(value, channels_last))


def refuse_second_derivative() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "LayerHistory: a second derivative was asked for (create_graph=True), and the kernels' pull backward "
            "has none; use ela_kernels.use_backend('eager'), or the functional layer_attention"
        )


def keep(ctx: Any, link: Link) -> None:
    # Not the link itself: ctx outlives the backward, and would keep all values alive with it.
    ctx.set_materialize_grads(False)
    ctx.path, ctx.heads, ctx.scale = link.path, link.heads, link.scale
    ctx.channels_last, ctx.kernels, ctx.record = link.channels_last, link.kernels, link.record
    ctx.layer = link.layer


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


@opaque
class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        prev_weights: Tensor | None,
        token: Tensor | None,
        link: Link,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        keep(ctx, link)
        ctx.token = token
        out, weights, kl = link.kernels.forward(
            q, link.keys, link.values, link.heads, link.scale, prev_weights, link.channels_last
        )
        save(ctx, q, weights, prev_weights, *link.keys, *link.values)
        return out, weights, kl, new_token(token, q)

    @staticmethod
    def backward(
        ctx: Any,
        dout: Tensor | None,
        dweights: Tensor | None,
        dkl: Tensor | None,
        _: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        need_q, need_k, need_v, need_prev = ctx.needs_input_grad[:4]
        dq = dprev = None
        if dout is not None or dweights is not None or dkl is not None:
            q, weights, prev_weights, *maps = unpacked(ctx)
            depth = len(maps) // 2
            values = maps[depth:]
            if dout is not None:
                # A user's value may be in no form that the kernels read, and the gradient be strided as it is.
                form = ctx.channels_last, is_interleaved(values[-1], ctx.channels_last)
                dout = in_form(_plain(dout), *form)
            saved = Saved(
                q,
                maps[:depth],
                values,
                ctx.heads,
                ctx.scale,
                prev_weights,
                weights,
                ctx.channels_last,
            )
            found = ctx.kernels.backward(saved, dout, dweights, dkl, need_q, need_prev)
            dq, dprev = found.dq, found.dprev
            left = ctx.kernels.Retrieved(q, weights, found.dscores, dout, ctx.channels_last)
            ctx.record.add(ctx.path, left)
        dk, dv = _gather(ctx, need_k, need_v)
        return dq, dk, dv, dprev, token_gradient(ctx, ctx.token), None


@opaque
class _Provide(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, k: Tensor, v: Tensor, token: Tensor | None, link: Link) -> Tensor:
        keep(ctx, link)
        ctx.token = token
        return new_token(token, k)

    @staticmethod
    def backward(ctx: Any, _: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        dk, dv = _gather(ctx, ctx.needs_input_grad[0], ctx.needs_input_grad[1])
        return dk, dv, token_gradient(ctx, ctx.token), None


def attend_pull(
    q: Tensor, k: Tensor, v: Tensor, token: Tensor | None, prev_weights: Tensor | None, link: Link
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """`(out, weights, kl, token)`; the token of the last layer that has a gradient goes on."""
    if not torch.is_grad_enabled():
        out, weights, kl = link.kernels.forward(
            q, link.keys, link.values, link.heads, link.scale, prev_weights, link.channels_last
        )
        return out, weights, kl, token
    out, weights, kl, own = applied(_Attend, q, k, v, prev_weights, token, link)
    return out, weights, kl, own if own.requires_grad else token


def provide_pull(k: Tensor, v: Tensor, token: Tensor | None, link: Link) -> Tensor | None:
    """The token after a layer that gives its pair and retrieves nothing."""
    if not torch.is_grad_enabled():
        return token
    own = applied(_Provide, k, v, token, link)
    return own if own.requires_grad else token
