"""Histories in models that `torch.fx` traces: calls of the layers are nodes of the graph, and so is their history."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor, nn


def is_traced(x: object) -> bool:
    """Whether a tracer hands `x` over in the place of a tensor."""
    return isinstance(x, torch.fx.Proxy)


def after(history: Any, out: Any) -> Any:
    """`history` as it is when `out` was made: in a graph, so that nobody leaves a layer out that later ones read."""
    # A graph that is traced again, as unpickling does.
    if isinstance(history, Traced) and is_traced(out):
        history._went_on(out.tracer, out)
    return history


class _NoNumbers:
    """What a history holds while it is traced."""

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        raise TypeError(
            "history: got a read of it in a model that torch.fx traces, where there are no numbers; allowed is to hand "
            "it to layers of this package. Read it in a module that is a leaf of the trace, or use torch.export.export"
        )


def no_numbers() -> Any:
    """In the place of a snapshot."""
    return _NoNumbers()


class Traced:
    """What is made anew in each forward pass and handed from layer to layer, in a graph of `torch.fx` too.

    A graph has no place for an object that its trace made: it would be the same one in every pass. So the first layer
    that it is handed to puts the call into the graph that makes it, and each layer a node that the next one depends on.
    """

    _in_graph: tuple[Any, Any, Any] | None = (
        None  # the tracer, what stands for it, and what was made since
    )

    def _new_arguments(self) -> dict[str, Any]:
        """What another one is made with, in each pass."""
        return {}

    def _begin_trace(self) -> None:
        """Nothing that it holds may be read from now on."""

    def __fx_create_arg__(self, tracer: Any) -> Any:
        """The node that stands for it: `torch.fx` asks each argument of a call for one that has none."""
        if self._in_graph is None or self._in_graph[0] is not tracer:
            made = tracer.create_proxy("call_function", type(self), (), self._new_arguments())
            self._begin_trace()
            self._in_graph = tracer, made, None
        _, stands_for_it, out = self._in_graph
        if out is not None:
            # Not before somebody asks: it counts as a node of the module that does, whose last one is to be its output.
            stands_for_it = tracer.create_proxy("call_function", after, (stands_for_it, out), {})
            self._in_graph = tracer, stands_for_it, None
        return stands_for_it.node

    def _went_on(self, tracer: Any, out: Any) -> None:
        assert self._in_graph is not None
        self._in_graph = tracer, self._in_graph[1], out


def traced_call(module: nn.Module, x: Any, *args: Any, **kwargs: Any) -> Tensor:
    """The call of a module as one node, whatever the tracer takes for a leaf; `x` is what the tracer handed over."""
    tracer = x.tracer
    given = (x, *args)
    out: Tensor = tracer.create_proxy("call_module", tracer.path_of_module(module), given, kwargs)
    for argument in args:
        if isinstance(argument, Traced):
            argument._went_on(tracer, out)
    return out
