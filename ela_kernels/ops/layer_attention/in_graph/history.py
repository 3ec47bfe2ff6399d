"""What a history does for whole layers in a graph that is being compiled: one operator each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ela_kernels.backends.contract import Request
from ela_kernels.backends.dispatch import Refusal, plan, refusal_in_a_graph
from ela_kernels.backends.setting import current_setting
from ela_kernels.backends.tracing import waits_for_device
from ela_kernels.backends.types import Epilogue, Filters, NormAct, Residual
from ela_kernels.ops import checks
from ela_kernels.ops.autocast import as_autocast, layer_dtype
from ela_kernels.ops.layer_attention.decided import Decided, decided_after
from ela_kernels.ops.layer_attention.deferral import DeferredPairs
from ela_kernels.ops.layer_attention.in_graph import flops as flops  # what their products count
from ela_kernels.ops.layer_attention.in_graph import operator as operator  # registers them
from ela_kernels.ops.layer_attention.in_graph.call import FORMULA
from ela_kernels.ops.layer_attention.plan import all_fit
from ela_kernels.ops.layer_attention.snapshot import Kept, Snapshot
from ela_kernels.torch_internals import are_transforms_active, constant_in_graphs, is_exporting


class GraphPlan(NamedTuple):
    """What serves a whole layer in a graph.

    Attributes:
        backend: the name of the one whose kernels run when the graph does.
        filters: the layer's parameters, not cast yet.
        dtype: in which it is computed.
        tolerance: retrievals of a smaller weight are left out.
    """

    backend: str
    filters: Filters
    dtype: torch.dtype
    tolerance: float


@constant_in_graphs
def _kernels(
    setting: str, op: str, device: torch.device, dtype: torch.dtype, depth: int
) -> str | None:
    """The name of the backend that serves a layer when the graph runs; None where PyTorch's pieces do.

    `setting` is asked for by the caller, where the compiler sees it and compiles anew when it changes.
    """
    # An exported program is to run where there may be no kernels, and a transform has to see every operation.
    if is_exporting() or are_transforms_active():
        return None
    found = plan(Request(op, device, dtype, depth))
    return None if isinstance(found, Refusal) else found.name


class LayersInGraphs(DeferredPairs):
    """Whole layers in compiled graphs."""

    _retrieves_its_own_way = False
    _decided: Decided | None = None

    def plan_in_graph(
        self,
        x: Tensor,
        filters: Sequence[Tensor | None] | None,
        op: str,
        tolerance: float | None = None,
    ) -> GraphPlan | Refusal:
        """As :meth:`plan_layer`, in a graph that is being compiled; `filters` None where something stands against."""
        if filters is None or self._retrieves_its_own_way or type(x) is not Tensor or not x.numel():
            return refusal_in_a_graph()
        # No kernel takes pairs that may be missing.
        if self._decided is not None and any(given is not None for given in self._decided.given):
            return refusal_in_a_graph()
        dtype, pairs = layer_dtype(x), self._now.pairs
        # Values are rounded there, and held as they are: the compiler decides what is kept for a backward.
        if self._dtype is not None and self._held_dtype(dtype) is not None:
            return refusal_in_a_graph()
        if not pairs.are_all(dtype) or not all_fit(filters, x, dtype):
            return refusal_in_a_graph()
        name = _kernels(current_setting(), op, x.device, dtype, len(pairs.keys) + 1)
        if name is None:
            return refusal_in_a_graph()
        wq, wk, wv = filters
        return GraphPlan(name, Filters(wq, wk, wv), dtype, self.tolerance_of(tolerance))  # type: ignore[arg-type]

    def takes_decision(self, x: Tensor, keeps: bool, takes_batch: bool) -> bool:
        """Whether an operator may be told by a tensor whether a block of `x` retrieves: it is read when the graph runs.

        Args:
            keeps: where it does not retrieve, the block is that around what the last layer retrieved.
            takes_batch: its norm takes the statistics of the batch.
        """
        if waits_for_device(x):
            return False
        kept = self._now.kept
        if not keeps or (kept is None and self._now.weights is None):
            return True
        if kept is None or kept.o.dtype != x.dtype:
            return False
        return kept.statistics is not None or not takes_batch

    def attend_in_graph(
        self,
        x: Tensor,
        plan: GraphPlan,
        *,
        heads: int,
        epilogue: Epilogue | None = None,
        caller: Any = None,
        keeps: bool = False,
        active: Tensor | None = None,
    ) -> Tensor:
        """As :meth:`attend_layer`, by one operator in the graph.

        Args:
            active: whether the layer retrieves, where that is data. Where it is false, and `keeps`, the block is that
                around what the last layer retrieved; else it is `x`.
        """
        norm = epilogue if isinstance(epilogue, NormAct) else None
        residual = isinstance(epilogue, Residual)
        if epilogue is not None and norm is None and not residual:
            kind = type(epilogue).__name__
            raise TypeError(f"epilogue: got {kind}; allowed are None, Residual and NormAct")
        if x.dtype != plan.dtype and residual:
            return x + self.attend_in_graph(x, plan, heads=heads, caller=caller)
        x, filters = as_autocast(x, plan.filters)
        snapshot = self._enter(caller, (x, *filters), False)
        channels = x.shape[1]
        heads = checks.check_heads(heads, channels)
        snapshot.check_fits(x, heads)
        pairs, prev = snapshot.pairs, snapshot.weights
        decided = self._decided
        if decided is None and active is not None:
            decided = Decided((None,) * len(pairs.keys))
        over = snapshot.kept if active is not None and keeps else None
        gamma, beta, statistics, mask = norm[:4] if norm is not None else (None,) * 4
        taken, exists = (over.statistics, over.exists) if over is not None else (None, None)
        found: tuple[Tensor, ...] = torch.ops.ela_kernels.layer(
            *(x, *filters, list(pairs.keys), list(pairs.values), prev),
            *(gamma, beta, statistics, mask, snapshot.token),
            *(active, None if over is None else over.o, taken, exists),
            *(heads, 1.0 / math.sqrt(channels // heads), plan.tolerance),
            "norm" if norm is not None else "residual" if residual else "none",
            0.0 if norm is None else norm.eps,
            norm is not None and norm.relu,
            plan.backend,
            FORMULA,
            keeps or torch.is_grad_enabled(),
        )
        out, weights, kl, key, value, _, _, retrieved, found_statistics, token = found
        divergence = None if prev is None else kl
        if decided is not None:
            decided = decided._replace(given=(*decided.given, None))
            divergence, self._decided = decided_after(decided, active, prev, divergence)
        # Whether the norm has seen anything, where that is data.
        applies = active
        if active is not None and over is not None:
            applies = None if exists is None else active | exists
        if norm is not None and norm.track is not None:
            norm.track(found_statistics, applies)
        kept = None
        if keeps and norm is not None:
            kept = Kept.of(retrieved, found_statistics if statistics is None else None, applies)
        # Layers outside of graphs find no record of this one's: they add their own gradients to those of the pair.
        extended, at = pairs.extended(key, value, have_node=False), snapshot.position + 1
        of_layer = heads, weights, divergence, token, kept, plan.tolerance
        self._leave(Snapshot(extended, at, *of_layer), False, caller)
        return out
