"""Who retrieved what a layer gave: learnt from the passes that ran, so that nobody has to guess at the model."""

from __future__ import annotations

import weakref
from typing import Protocol

import torch


class Skippable(Protocol):
    """A layer that retrieves, or does not."""

    @property
    def skipped(self) -> bool: ...

    @property
    def readers(self) -> Readers: ...


class Readers:
    """Everybody who can retrieve a layer's pair, in all histories that the layer gave one to.

    Layers that can be skipped count, skipped or not, and are held weakly: whether they retrieve is asked of them later.
    Any other reader (a `LayerAttention` of its own, a call of :meth:`ela_kernels.LayerHistory.attend`) is taken to go
    on reading.
    """

    __slots__ = ("_layers", "came_by", "follower", "known", "learnt", "others", "varies")

    def __init__(self) -> None:
        self.known = False  # whether the layer gave a pair to any history
        self.learnt = False  # whether a pass that it came by in is over: in one under way others are still to come
        self.came_by = False  # whether the layer was called outside of compiled graphs, so that it is among readers
        self.others = False
        self.follower: weakref.ref[Skippable] | None = None  # who came by next, the last time
        self.varies = False  # whether that was another before, as after a layer that is used twice
        self._layers: set[weakref.ref[Skippable]] = set()

    def add(self, reader: weakref.ref[Skippable]) -> None:
        """`reader` came by after the pair was given."""
        self._layers.add(reader)

    def exist(self) -> bool:
        """Whether there is anybody who may read the pair, skipped or not."""
        return self.others or any(reference() is not None for reference in tuple(self._layers))

    def are_all_here(self) -> bool:
        """Whether none of them is gone, as those of a replica are, whose place others take in every pass."""
        return all(reference() is not None for reference in tuple(self._layers))

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
        present: whose turn it is; None where it is nobody's of them.
        watched: whether EBQM watches one of them.
    """

    __slots__ = ("_before", "_given_by", "_is_on", "present", "stage", "watched")

    def __init__(self) -> None:
        self.stage: int | None = None
        self.present: Skippable | None = None
        self.watched = False
        self._before: Readers | None = None
        self._given_by: list[Readers] = []
        self._is_on = False

    def __del__(self) -> None:
        """The pass is over, as far as it got."""
        # A compiled graph makes the object before what is in it.
        for readers in getattr(self, "_given_by", ()):
            readers.learnt = True

    def begin(self, layer: Skippable, number: int, recomputing: bool) -> None:
        """`layer`, whose number this is, may read until :meth:`end`."""
        if self.stage is None:
            self.stage = number
        self._is_on = True
        if recomputing or torch.compiler.is_compiling():
            return
        self.present = layer
        layer.readers.came_by = True
        # Skipped or not: it may come back.
        reader = weakref.ref(layer)
        for readers in self._given_by:
            readers.add(reader)
        if self._before is not None:
            before = self._before.follower
            follower = None if before is None else before()
            if follower is not layer:
                self._before.varies = self._before.varies or follower is not None
                self._before.follower = reader
        self._before = layer.readers

    def end(self, readers: Readers | None) -> None:
        """The turn is over. Who comes by from now on is one of `readers`; None where no pair was given."""
        self._is_on, self.present = False, None
        if readers is not None and not torch.compiler.is_compiling():
            readers.known = True
            self._given_by.append(readers)

    def note_read(self) -> None:
        """All pairs held are read: outside of a turn by somebody who cannot be skipped."""
        if not self._is_on:
            for readers in self._given_by:
                readers.others = True
