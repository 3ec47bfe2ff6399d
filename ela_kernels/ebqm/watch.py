"""The layers that an EBQM watches: which they are, and what they have seen."""

from __future__ import annotations

import operator
import warnings
from typing import NamedTuple

from torch import Tensor, nn

from ela_kernels.ebqm.stages import find_layers, present_layers
from ela_kernels.modules.watched import MOST_OBSERVATIONS, Watched


class Seen(NamedTuple):
    """What one layer saw: divergences `[B, G]`, and what compiled graphs added up of more (at most one tensor)."""

    divergences: list[Tensor]
    totals: list[Tensor]


class Watch:
    """The layers of a model, which keep their divergences until they are taken.

    Several may watch one layer: whoever takes what it kept hands it to the others.
    """

    def __init__(self, model: nn.Module) -> None:
        found = find_layers(model)
        self.model = model
        self.names, self.layers = list(found), list(found.values())
        self._inbox: dict[Watched, Seen] = {}

    def attach(self) -> None:
        """Have the layers keep their divergences."""
        if any(len(layer.watchers) > (self in layer.watchers) for layer in self.layers):
            warnings.warn(
                "model: got a model that another EBQM watches; both will see its passes, and both decide which layers "
                "are skipped. Call detach() of one of them",
                stacklevel=4,
            )
        for layer in self.layers:
            if not layer.watchers:  # what an EBQM left that was dropped without detach()
                layer.observations.clear()
                layer.totals.take()
            layer.watchers.add(self)
            layer.watched = True

    def detach(self) -> None:
        for layer in self.layers:
            self._leave(layer)

    def follow_model(self) -> list[int | None] | None:
        """Take note of layers that were exchanged, added or removed.

        Returns:
            For each layer now the number that it had, None for a new one; None altogether where nothing has changed.
        """
        present = present_layers(self.model)
        if len(present) == len(self.layers) and all(map(operator.is_, present, self.layers)):
            return None
        found = find_layers(self.model)
        numbers = {layer: i for i, layer in enumerate(self.layers)}
        for layer in self.layers:
            if layer not in found.values():
                self._leave(layer)
        self.names, self.layers = list(found), list(found.values())
        for layer in self.layers:
            layer.watchers.add(self)
            layer.watched = True
        return [numbers.get(layer) for layer in self.layers]

    def take(self) -> list[Seen]:
        """What each layer saw since the last call."""
        for layer in self.layers:
            # Detached again: inside torch.func.grad that was for the transform alone.
            divergences, totals = [kl.detach() for kl in layer.observations], layer.totals.take()
            layer.observations.clear()
            if not divergences and totals is None:
                continue
            for watch in list(layer.watchers):
                kept = watch._inbox.setdefault(layer, Seen([], []))
                kept.divergences.extend(divergences[: MOST_OBSERVATIONS - len(kept.divergences)])
                if totals is not None:
                    kept.totals[:] = [sum(kept.totals, totals)]
        inbox, self._inbox = self._inbox, {}
        return [inbox.get(layer, Seen([], [])) for layer in self.layers]

    def _leave(self, layer: Watched) -> None:
        layer.watchers.discard(self)
        if not layer.watchers:
            layer.watched = layer.probe_next = layer.weights_next = False
            layer.kept_weights = None
            layer.observations.clear()
            layer.totals.take()

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_inbox": {}}
