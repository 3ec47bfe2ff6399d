"""Who looks on while layers come by in the histories of one thread: the analysis of a model does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

import torch
from torch import Tensor

from ela_kernels.ops.layer_attention.interface import LayerAttentionWeights
from ela_kernels.ops.layer_attention.snapshot import Snapshot


class Observer(Protocol):
    """What a history tells; `history` is the one that it happens in."""

    def came_by(self, history: Any, caller: Any, before: Snapshot, after: Snapshot) -> None:
        """`caller` retrieved (then the weights of `after` are others), gave its pair, or passed by."""
        ...

    def came_by_at_positions(
        self,
        history: Any,
        caller: Any,
        place: int,
        weights: Tensor | None,
        kl: Tensor | None,
        retrieves: bool,
    ) -> None:
        """The same of a `PositionHistory`: weights `[B, T, *positions]` and divergence `[B, *positions]` of `caller`.

        Where it is skipped, those that it would have had; None where nobody asked.
        """
        ...

    def probed(self, history: Any, found: LayerAttentionWeights) -> None:
        """The layer that comes by next would have retrieved so."""
        ...


_observer: ContextVar[Observer | None] = ContextVar("ela_kernels_observer", default=None)


def present_observer() -> Observer | None:
    """Asked once for each history, so that layers need not ask. A compiled graph is made for nobody who looks on."""
    return None if torch.compiler.is_compiling() else _observer.get()


@contextmanager
def observed_by(observer: Observer) -> Iterator[None]:
    """Histories that this thread makes meanwhile tell `observer`."""
    token = _observer.set(observer)
    try:
        yield
    finally:
        _observer.reset(token)
