"""Who retrieved what a layer gave: learnt from the passes that ran, so that nobody has to guess at the model."""

from __future__ import annotations

import weakref
from typing import Protocol

import torch


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

    def add(self, reader: weakref.ref[Skippable] | None) -> None:
        """`reader` retrieved the pair; None for one that cannot be skipped."""
        if reader is None:
            self.others = True
        else:
            self._layers.add(reader)

    def retrieve(self) -> bool:
        """Whether one of them would retrieve the pair in a pass now."""
        if self.others:
            return True
        found = (reference() for reference in tuple(self._layers))
        return any(layer is not None and not layer.skipped for layer in found)


class Turns:
    """The layers that can be skipped as they come by in one pass: whose turn it is, and who reads whose pair.

    A compiled graph takes no note of that: it would be made for it.

    Attributes:
        stage: the number of the first of them, which stands for the stage; None before it came by.
        watched: whether EBQM watches one of them.
    """

    __slots__ = ("_given_by", "_reader", "stage", "watched")

    def __init__(self) -> None:
        self.stage: int | None = None
        self.watched = False
        self._given_by: list[Readers] = []
        self._reader: weakref.ref[Skippable] | None = None

    def begin(self, layer: Skippable, number: int) -> None:
        """`layer`, whose number this is, is the one that reads until :meth:`end`."""
        if self.stage is None:
            self.stage = number
        if not torch.compiler.is_compiling():
            self._reader = weakref.ref(layer)

    def end(self, readers: Readers | None) -> None:
        """The turn is over. Who retrieves from now on is one of `readers`; None where no pair was given."""
        self._reader = None
        if readers is not None and not torch.compiler.is_compiling():
            readers.known = True
            self._given_by.append(readers)

    def note_read(self) -> None:
        """All pairs held are read, by the layer whose turn it is, or by somebody else."""
        if torch.compiler.is_compiling():
            return
        for readers in self._given_by:
            readers.add(self._reader)
