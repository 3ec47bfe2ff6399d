"""The pull form of the backward: a value's gradient is gathered once, from all later layers.

Layer t's output uses the values of all layers j <= t, so autograd's own way adds up T partial gradients for each value
(the push form). Here the engine is made to run the layers' backwards in reverse order by a chain of one-element
tokens; each leaves its output gradient, weights and score gradients in a record, and each reads from that record what
the layers after it left. A record is kept for each backward pass (graph task), so that a second pass over a retained
graph, or a pass over a part of it, never sees another's entries; and an entry knows the path of layers that it
retrieved from, so that of two continuations of one history neither sees the other's.
"""

from __future__ import annotations

from typing import Any, NoReturn
from weakref import ref

import torch
from torch import Tensor

from ela_kernels import torch_internals
from ela_kernels.backends.types import Contribution
from ela_kernels.torch_internals import are_transforms_active, call_after_backward


def graph_task() -> int:
    """Which backward pass is running in this thread; -1 outside of one."""
    return -1 if torch.compiler.is_compiling() else torch_internals.graph_task()


def is_recomputing(made_in: int) -> bool:
    """Whether a checkpoint recomputes now, in a backward pass, what was made in the pass `made_in`, or in none."""
    return graph_task() not in (-1, made_in)


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


def refuse_other_kernels(history: str = "LayerHistory") -> NoReturn:
    raise RuntimeError(
        f"{history}: got layers that kernels of different backends served, whose gradients do not meet; "
        "allowed is one backend for the layers of a history, and eager PyTorch beside it"
    )


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
