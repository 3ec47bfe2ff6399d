"""What layers tell while a model runs: one row for each layer in each of its places."""

from __future__ import annotations

import weakref
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from ela_kernels.ops.layer_attention import LayerAttentionWeights
from ela_kernels.ops.layer_attention.snapshot import Snapshot


class Row:
    """One layer in one place of its stage, with sums over the batches.

    Attributes:
        layer: the module, an `ELA` with the layer in it; None where nobody was named.
        stage, place: numbers from 0.
        kind: what is said to be its class.
        retrieves: whether it retrieves, or was only asked what it would.
        samples: how many samples the sums are over.
    """

    def __init__(self, layer: Any, stage: int, place: int, retrieves: bool) -> None:
        self.layer, self.stage, self.place, self.retrieves = layer, stage, place, retrieves
        self.kind = "function" if layer is None else type(layer).__name__
        self.samples = self.compared = 0
        self._weights: Tensor | None = None
        self._kl: Tensor | None = None

    def add(self, weights: Tensor | None, kl: Tensor | None) -> None:
        """One pass: `[B, G, t]` and `[B, G]`. Nothing is read here, so that a device is not waited for."""
        # A model may enable gradients for itself, and its graph is not to be kept.
        if weights is not None:
            weights = weights.detach()
            total = weights.mean(1, dtype=torch.float64).sum(0)
            self.samples += weights.shape[0]
            self._weights = total if self._weights is None else self._weights + total
        if kl is not None:
            kl = kl.detach()
            sum_kl = kl.mean(1, dtype=torch.float64).sum()
            self.compared += kl.shape[0]
            self._kl = sum_kl if self._kl is None else self._kl + sum_kl

    @property
    def weights(self) -> tuple[float, ...]:
        """Mean over samples and heads, one number for each pair; empty where it retrieves nothing."""
        if self._weights is None or not self.samples:
            return ()
        return tuple((self._weights / self.samples).tolist())

    @property
    def kl(self) -> float:
        """Mean over samples and heads; NaN without one."""
        return (
            float("nan")
            if self._kl is None or not self.compared
            else float(self._kl) / self.compared
        )


class Collector:
    """Looks on while layers come by; `begin` has to be called before each batch."""

    def __init__(self) -> None:
        self._rows: dict[Hashable, Row] = {}
        self.batches: list[dict[Any, list[Tensor]]] = []
        self._stages: dict[Hashable, int] = {}
        self._stage_of: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self._unnamed = 0
        self._probed: LayerAttentionWeights | None = None

    def begin(self) -> None:
        """The next batch is about to come."""
        self.batches.append({})
        self._unnamed = 0

    @property
    def rows(self) -> list[Row]:
        """Stage by stage, each in the order in which its layers ran."""
        return sorted(self._rows.values(), key=lambda row: (row.stage, row.place))

    def probed(self, history: Any, found: LayerAttentionWeights) -> None:
        """A skipped layer was asked what it would retrieve; it comes by next."""
        self._probed = found

    def came_by(self, history: Any, caller: Any, before: Snapshot, after: Snapshot) -> None:
        """A layer came by: see :class:`ela_kernels.ops.layer_attention.observer.Observer`."""
        layer = history.turns.present or caller
        probed, self._probed = self._probed, None
        retrieves = after.weights is not before.weights
        if retrieves:
            weights, kl = after.weights, after.kl
        else:
            weights, kl = (None, None) if probed is None else (probed.weights, probed.kl)
        self._note(history.origin, layer, before.position, retrieves, weights, kl)

    def came_by_at_positions(
        self,
        history: Any,
        caller: Any,
        place: int,
        weights: Tensor | None,
        kl: Tensor | None,
        retrieves: bool,
    ) -> None:
        """The same of a `PositionHistory`; each position of a sample is taken for one of its heads."""
        if weights is not None:
            weights = weights.unsqueeze(2).flatten(2).transpose(1, 2)
        kl = None if kl is None else kl.unsqueeze(1).flatten(1)
        self._note(history, caller, place, retrieves, weights, kl)

    def _note(
        self,
        origin: Any,
        layer: Any,
        place: int,
        retrieves: bool,
        weights: Tensor | None,
        kl: Tensor | None,
    ) -> None:
        stage = self._stage(origin, layer)
        depth = 0 if weights is None else weights.shape[-1]
        key = (stage, place, None if layer is None else id(layer), depth, retrieves)
        row = self._rows.get(key)
        if row is None:
            row = self._rows[key] = Row(layer, stage, place, retrieves)
        row.add(weights, kl)
        if kl is not None and layer is not None:
            self.batches[-1].setdefault(layer, []).append(kl.detach())

    def _stage(self, origin: Any, layer: Any) -> int:
        """A stage is known by the layer that comes first, in whatever history of whatever batch.

        A history may go on as another object, which has the same origin.
        """
        found = self._stage_of.get(origin)
        if found is None:
            first: Hashable = id(layer)
            if layer is None:
                first = ("unnamed", self._unnamed)
                self._unnamed += 1
            found = self._stage_of[origin] = self._stages.setdefault(first, len(self._stages))
        return found
