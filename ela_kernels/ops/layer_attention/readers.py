"""Who retrieved what a layer gave: learnt from the passes that ran, so that nobody has to guess at the model."""

from __future__ import annotations

import weakref
from typing import Protocol


class Skippable(Protocol):
    """A layer that retrieves, or does not."""

    @property
    def skipped(self) -> bool: ...


class Readers:
    """Everybody who retrieved a layer's pair, in all histories that the layer gave one to.

    Layers that can be skipped are held weakly: whether they retrieve is asked of them later. Any other reader (a
    `LayerAttention` of its own, a call of :meth:`ela_kernels.LayerHistory.attend`) is taken to go on reading.
    """

    __slots__ = ("_layers", "known", "others")

    def __init__(self) -> None:
        self.known = False  # whether the layer gave a pair to any history
        self.others = False
        self._layers: set[weakref.ref[Skippable]] = set()

    def add(self, reader: Skippable | None) -> None:
        """`reader` retrieved the pair; None for one that cannot be skipped."""
        if reader is None:
            self.others = True
        else:
            self._layers.add(weakref.ref(reader))

    def retrieve(self) -> bool:
        """Whether one of them would retrieve the pair in a pass now."""
        if self.others:
            return True
        found = (reference() for reference in tuple(self._layers))
        return any(layer is not None and not layer.skipped for layer in found)
