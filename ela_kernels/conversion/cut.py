"""How the forward of a block is left at its attention, for the rest of it to be done by the kernels.

The attention raises, and whoever ran the block catches it. That is asked for in one thread for one attention, and only
while nothing stands around the attention's call that does not stand around the block's: gradients, autocast, a
checkpoint, a stream.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ela_kernels.backends.dispatch import refusal_by
from ela_kernels.explaining import refused
from ela_kernels.torch_internals import cuda_stream, top_saved_tensors_hooks

_OTHERWISE = (
    "the block calls its attention under other circumstances than it is called itself (gradients, autocast, a "
    "checkpoint, a stream)"
)


class Given(NamedTuple):
    """What the attention was given at which a block was left: the map, and the history or the output before."""

    x: Tensor
    state: Any


class _Reached(BaseException):
    """A block ran up to its attention. No `Exception`, which the block's own code may catch."""

    def __init__(self, attention: nn.Module, given: Given) -> None:
        super().__init__()
        self.attention, self.given = attention, given


class _TracedReached(BaseException):
    """The same in a graph that is compiled, where an exception carries nothing."""


class _Cut(threading.local):
    attention: nn.Module | None = None
    circumstances: tuple[object, ...] = ()


_cut = _Cut()


def _circumstances(x: Tensor) -> tuple[object, ...]:
    device = x.device
    on = device.type
    return (
        on,
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled(on),
        torch.get_autocast_dtype(on),
        None if top_saved_tensors_hooks is None else top_saved_tensors_hooks(True),
        cuda_stream(device.index) if on == "cuda" and cuda_stream is not None else None,
    )


def run_up_to(
    attention: nn.Module,
    forward: Callable[..., Any],
    args: tuple[Any, ...],
    options: dict[str, Any],
) -> Any:
    """What the attention was :class:`Given`, where `forward` could be left there; otherwise its result."""
    if torch.compiler.is_compiling():
        return _traced_up_to(attention, forward, args, options)
    before = _cut.attention, _cut.circumstances
    _cut.attention, _cut.circumstances = attention, _circumstances(args[0])
    try:
        return forward(*args, **options)
    except _Reached as reached:
        if reached.attention is not attention:
            raise
        return reached.given
    finally:
        _cut.attention, _cut.circumstances = before


def _traced_up_to(
    attention: nn.Module,
    forward: Callable[..., Any],
    args: tuple[Any, ...],
    options: dict[str, Any],
) -> Any:
    """:func:`run_up_to` while a graph is compiled, which cannot look at what a thread has to itself."""
    object.__setattr__(attention, _ENDS, True)
    try:
        return forward(*args, **options)
    except _TracedReached:
        pass
    finally:
        object.__setattr__(attention, _ENDS, False)
    given = getattr(attention, _GIVEN)
    object.__setattr__(attention, _GIVEN, None)
    return given


_ENDS, _GIVEN = "_ends_its_block", "_given"


def end_here(attention: nn.Module, layer: nn.Module, x: Tensor, state: Any) -> None:
    """Called by an attention with what it was given: leaves the block around it, if that asked for it.

    `layer`: the layer in it, of which it is noted why the block was not left.
    """
    if torch.compiler.is_compiling():
        if getattr(attention, _ENDS, False):
            object.__setattr__(attention, _GIVEN, Given(x, state))
            raise _TracedReached
        return
    if _cut.attention is not attention:
        return
    if _cut.circumstances == _circumstances(x):
        raise _Reached(attention, Given(x, state))
    refused(layer, "block", refusal_by((_OTHERWISE,)))
